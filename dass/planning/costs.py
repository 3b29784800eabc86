"""Floating-point operations and memory of the stages of a run.

The counts follow the code that runs: dass/pruning/{walk,statistics,method,update,masks}.py and
dass/evaluation/perplexity.py. A multiplication with its addition is two operations (FLOPs). Norms, activation
functions, rotary embeddings and routers are left out; attention multiplies all pairs of positions, also those that a
mask hides.
"""

from dataclasses import dataclass

from dass.errors import DassError
from dass.evaluation.perplexity import LOGITS_AT_ONCE
from dass.models import DTYPES
from dass.planning.architecture import Architecture, PlannedBlock
from dass.planning.device import Stage
from dass.pruning.blocks import ATTENTION_ROLES, INPUT_OF_ROLE, MLP_ROLES, Projection
from dass.pruning.masks import LARGEST_RANKED_M, NM, Pattern, Unstructured
from dass.pruning.method import BlockPruner, Method
from dass.pruning.statistics import HESSIAN_BLOCK
from dass.pruning.update import LAZY

FP32 = 4  # bytes
FULL: tuple[str, ...] = (*ATTENTION_ROLES, *MLP_ROLES)


@dataclass(frozen=True)
class Workload:
    """The sizes of a run."""

    dtype: str
    """Of weights and activations: float32, bfloat16 or float16. Statistics and solver are in fp32."""
    n_sequences: int
    """Of the calibration."""
    seq_len: int
    """Tokens per calibration sequence."""
    batch_size: int
    """Sequences per forward."""

    def __post_init__(self) -> None:
        """Refuse what no run can have."""
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise DassError(f"dtype={self.dtype} is unknown here: choose float32, bfloat16 or float16.")
        for name in ("n_sequences", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise DassError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return self.n_sequences * self.seq_len

    @property
    def bytes_each(self) -> int:
        """Of a weight or an activation."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Stream:
    """The running statistics of one input, `dass.pruning.statistics.InputStream` in numbers."""

    features: int
    hessian: bool
    copies: int
    runs: int

    @property
    def bytes(self) -> int:
        return self.copies * self.features * (self.features if self.hessian else 1) * FP32


@dataclass(frozen=True)
class _Group:
    """The targeted projections of one input, which are pruned together."""

    projections: list[Projection]
    hessian: bool
    copies: int

    @property
    def features(self) -> int:
        return self.projections[0].linear.in_features

    @property
    def weights(self) -> int:
        return sum(p.linear.weight.numel() for p in self.projections)

    @property
    def largest(self) -> int:
        return max(p.linear.weight.numel() for p in self.projections)


def share_removed(pattern: Pattern) -> float:
    """The share of the targeted weights that a pattern removes, but for the rounding down in each comparison group."""
    return pattern.ratio if isinstance(pattern, Unstructured) else 1 - pattern.n / pattern.m


def targeted_weights(model: Architecture, pruner: BlockPruner) -> int:
    """How many weights the projections hold that a method prunes, those of all experts included."""
    return sum(b.copies(p.role) * p.linear.weight.numel() for b in model.blocks for p in pruner.projections(b.block))


def plan_load(model: Architecture, work: Workload) -> Stage:
    """Reading the weights onto the device."""
    weights = model.total * work.bytes_each
    return Stage("load", weights, moved_bytes=2 * weights, disk_bytes=weights)


def plan_pruning(model: Architecture, pruner: BlockPruner, work: Workload) -> list[Stage]:
    """The stages of `prune_model` with one method, in order; those that it does not have are left out.

    Raises:
        DassError: the pattern does not fit a layer, or there is nothing to prune.
    """
    pruner.check([b.block for b in model.blocks])
    streams = [_streams(b, pruner) for b in model.blocks]
    groups = [group for b in model.blocks for group in _groups(b, pruner)]
    held = float(model.total * work.bytes_each)
    stages = []
    if any(streams):
        # the inputs of a block and, where attention is replayed in the second pass, its outputs
        held += (2 if pruner.targets == "mlp" else 1) * work.tokens * model.hidden_size * work.bytes_each
        held += max(sum(s.bytes for s in of_block) for of_block in streams)
        peak = held + _working_set(model, work.batch_size * work.seq_len)
        stages.append(_walk(model, work, pruner.targets == "mlp", peak))
        stages.append(_accumulation([s for of_block in streams for s in of_block], work, peak))
    if any(g.hessian for g in groups):
        stages.append(_factorisation(groups, held))
    stages.append(
        _obs_sweep(groups, pruner.method, work, held)
        if pruner.method.update == "obs"
        else _mask_selection(groups, pruner.method.pattern, work, held)
    )
    return stages


def plan_evaluation(model: Architecture, work: Workload, n_windows: int, seq_len: int) -> Stage:
    """Perplexity on `n_windows` of `seq_len` tokens: all blocks, and the head on every position but the last."""
    if n_windows < 1 or seq_len < 2:
        raise DassError(f"evaluation has {n_windows} windows of {seq_len} tokens: it needs at least one of two.")
    tokens, passes = n_windows * seq_len, -(-n_windows // work.batch_size)
    head = model.hidden_size * model.vocabulary
    flops = sum(_forward_flops(b, FULL, tokens, seq_len) for b in model.blocks)
    moved = sum(_forward_bytes(model, b, FULL, tokens, passes, work) for b in model.blocks)
    # logits in the model's dtype, in fp32, and their logarithms
    chunk = min(LOGITS_AT_ONCE, work.batch_size * seq_len * model.vocabulary) * (work.bytes_each + 2 * FP32)
    return Stage(
        "evaluation",
        model.total * work.bytes_each + _working_set(model, work.batch_size * seq_len) + chunk,
        flops + 2 * (tokens - n_windows) * head,
        moved + passes * head * work.bytes_each,
    )


def _streams(b: PlannedBlock, pruner: BlockPruner) -> list[_Stream]:
    """The statistics that a method opens in one block."""
    reader = {INPUT_OF_ROLE[role]: p for role, p in b.block.projections.items()}
    opened = [(reader[source], stream) for source, stream in pruner.open_streams(b.block).items()]
    return [
        _Stream(p.linear.in_features, stream.with_hessian, b.copies(p.role), b.runs(p.role)) for p, stream in opened
    ]


def _groups(b: PlannedBlock, pruner: BlockPruner) -> list[_Group]:
    """The targeted projections of one block by input, as `BlockPruner.prune` groups them."""
    hessian = {source for source, stream in pruner.open_streams(b.block).items() if stream.with_hessian}
    by_input: dict[str, list[Projection]] = {}
    for p in pruner.projections(b.block):
        by_input.setdefault(INPUT_OF_ROLE[p.role], []).append(p)
    return [_Group(group, source in hessian, b.copies(group[0].role)) for source, group in by_input.items()]


def _forward_flops(b: PlannedBlock, roles: tuple[str, ...], tokens: int, seq_len: int) -> float:
    """The products of the projections of these roles, and with `o` those of queries with keys and with values."""
    present = [p for role, p in b.block.projections.items() if role in roles]
    products = sum(2 * tokens * b.runs(p.role) * p.linear.weight.numel() for p in present)
    return products + sum(4 * tokens * seq_len * p.linear.in_features for p in present if p.role == "o")


def _forward_bytes(
    model: Architecture, b: PlannedBlock, roles: tuple[str, ...], tokens: int, passes: int, work: Workload
) -> float:
    """Weights of these roles once per pass, and activations, written and read."""
    weights = sum(b.copies(p.role) * p.linear.weight.numel() for r, p in b.block.projections.items() if r in roles)
    return (passes * weights + 2 * tokens * _vectors(model, b)) * work.bytes_each


def _vectors(model: Architecture, b: PlannedBlock) -> int:
    """Elements per token inside a block, as `dass.models.batch_size_for` reckons."""
    return 3 * b.active * b.block.projections["down"].linear.in_features + 12 * model.hidden_size


def _working_set(model: Architecture, tokens: int) -> float:
    """Bytes of the activations inside one block for a batch of so many tokens."""
    return tokens * max(_vectors(model, b) for b in model.blocks) * FP32


def _walk(model: Architecture, work: Workload, replays: bool, peak: float) -> Stage:
    """The forwards: up to the down projection for the statistics, then whole for the next block's inputs.

    The second pass is not needed behind the last block, and repeats attention only where that is pruned too. The first
    block runs once more on the first batch, see `enter_first_block`.
    """
    first: tuple[str, ...] = (*ATTENTION_ROLES, "gate", "up")
    second: tuple[str, ...] = MLP_ROLES if replays else FULL
    batch = min(work.batch_size, work.n_sequences) * work.seq_len
    passes = -(-work.n_sequences // work.batch_size)
    parts = [(model.blocks[0], FULL, batch, 1)]
    parts += [(b, first, work.tokens, passes) for b in model.blocks]
    parts += [(b, second, work.tokens, passes) for b in model.blocks[:-1]]
    return Stage(
        "calibration walk",
        peak,
        sum(_forward_flops(b, roles, tokens, work.seq_len) for b, roles, tokens, _ in parts),
        sum(_forward_bytes(model, b, roles, tokens, passes, work) for b, roles, tokens, passes in parts),
    )


def _accumulation(streams: list[_Stream], work: Workload, peak: float) -> Stage:
    """The Hessians' upper block triangles, or sums of squares, over all tokens."""
    passes = -(-work.n_sequences // work.batch_size)
    flops = moved = 0.0
    for s in streams:
        tokens = s.runs * work.tokens
        if s.hessian:
            starts = range(0, s.features, HESSIAN_BLOCK)
            flops += sum(2 * tokens * min(HESSIAN_BLOCK, s.features - i) * (s.features - i) for i in starts)
            moved += passes * s.bytes + tokens * s.features * (work.bytes_each + 2 * FP32)  # half is read and written
        else:
            flops += 2 * tokens * s.features
            moved += tokens * s.features * (work.bytes_each + 4 * FP32)
    return Stage("statistics", peak, flops, moved, in_fp32=True)


def _factorisation(groups: list[_Group], held: float) -> Stage:
    """A Cholesky decomposition, n^3 / 3, and a triangular solve for a full identity, n^3, of each Hessian."""
    with_hessian = [g for g in groups if g.hessian]
    return Stage(
        "factorisation",
        held + max(6 * g.features**2 * FP32 for g in with_hessian),  # H, damped, L, reversed, identity, factor
        sum(g.copies * 4 / 3 * g.features**3 for g in with_hessian),
        in_fp32=True,
    )


def _obs_sweep(groups: list[_Group], method: Method, work: Workload, held: float) -> Stage:
    """Each column corrects those behind it: out_features * in_features^2 operations, in blocks of `LAZY` columns."""
    choice = _selection_bytes(method.pattern, work)
    chosen = method.pattern.m if isinstance(method.pattern, NM) else method.block_size
    # per column: where and addr_; per choice: what `keep_most_important` takes
    launches = 2 + _selection_launches(method.pattern) / chosen
    return Stage(
        "OBS sweep",
        # weights, their stack, its transpose and the result, two masks; the factor and its scaled rows
        held + max(g.weights * (4 * FP32 + 2) + 2 * g.features**2 * FP32 for g in groups),
        sum(g.copies * g.weights * g.features for g in groups),
        # a block's product reads and writes all columns behind it, a column those behind it in its block
        sum(g.copies * g.weights * (FP32 * g.features / LAZY + FP32 * LAZY + choice) for g in groups),
        in_fp32=True,
        launches=sum(g.copies * g.features * launches for g in groups),
    )


def _mask_selection(groups: list[_Group], pattern: Pattern, work: Workload, held: float) -> Stage:
    """Scores and comparisons: hardly any arithmetic, so bytes are counted."""
    return Stage(
        "mask selection",
        # the group in fp32; scores, a temporary, ranks and masks of the largest
        held + max(g.weights * FP32 + g.largest * 4 * FP32 for g in groups),
        moved_bytes=sum(g.copies * g.weights for g in groups) * _selection_bytes(pattern, work),
    )


def _is_ranked(pattern: Pattern) -> bool:
    """Whether all pairs of M are compared, see `dass.pruning.masks`."""
    return isinstance(pattern, NM) and pattern.m <= LARGEST_RANKED_M


def _selection_bytes(pattern: Pattern, work: Workload) -> float:
    """Bytes moved per weight, a rough count."""
    scores = 3 * work.bytes_each + 8 * FP32  # to fp32, two operations, checks, the mask's application
    if isinstance(pattern, NM) and _is_ranked(pattern):
        return scores + 15 * (pattern.m - 1) / 2  # of each pair: two scores, the answer, two ranks
    return scores + 16 * FP32  # the selection's passes over the scores


def _selection_launches(pattern: Pattern) -> float:
    """Operations of one call of `keep_most_important` with the scores of a sweep."""
    if isinstance(pattern, NM) and _is_ranked(pattern):
        return 2 * pattern.m + 3 * pattern.m * (pattern.m - 1) / 2 + 7
    return 25
