"""Floating-point operations and memory of the stages of a run.

The counts follow the code that runs: dass/pruning/{walk,statistics,method,update,masks}.py and
dass/evaluation/perplexity.py. A multiplication with its addition is two operations (FLOPs). Norms, activation
functions and rotary embeddings are left out; attention multiplies all pairs of positions, also those that a mask hides.
"""

from dataclasses import dataclass

from dass.errors import DassError
from dass.evaluation.perplexity import LOGITS_AT_ONCE
from dass.models import DTYPES
from dass.planning.architecture import Architecture, PlannedBlock
from dass.planning.devices import Stage
from dass.pruning.blocks import Projection
from dass.pruning.masks import LARGEST_RANKED_M, NM, Pattern, Unstructured
from dass.pruning.method import BlockPruner, Method
from dass.pruning.statistics import HESSIAN_BLOCK
from dass.pruning.update import LAZY

FP32 = 4  # bytes


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

    def passes(self, n_sequences: int) -> int:
        """Forwards that so many sequences take."""
        return -(-n_sequences // self.batch_size)

    @property
    def bytes_each(self) -> int:
        """Of a weight or an activation."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Input:
    """What the projections of a unit, or of attention, read: its statistics, and those that are pruned together."""

    features: int
    hessian: bool | None
    """Whether with its Hessian; None where its statistics are not needed."""
    copies: int
    runs: float
    targets: list[Projection]

    @property
    def bytes(self) -> int:
        """Of `dass.pruning.statistics.InputStream`."""
        return (
            0 if self.hessian is None else self.copies * self.features * (self.features if self.hessian else 1) * FP32
        )

    @property
    def weights(self) -> int:
        """Of the targets."""
        return sum(p.weight.numel() for p in self.targets)


def share_removed(pattern: Pattern) -> float:
    """The share of the targeted weights that a pattern removes, but for the rounding down in each comparison group."""
    return pattern.ratio if isinstance(pattern, Unstructured) else 1 - pattern.n / pattern.m


def targeted_weights(model: Architecture, pruner: BlockPruner) -> int:
    """How many weights the projections hold that a method prunes, those of all experts included."""
    return sum(b.copies[p.reads] * p.weight.numel() for b in model.blocks for p in pruner.projections(b.block))


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
    by_block = [_inputs(b, pruner) for b in model.blocks]
    inputs = [one for of_block in by_block for one in of_block]
    pruned, seen = [one for one in inputs if one.targets], [one for one in inputs if one.hessian is not None]
    held = float(model.total * work.bytes_each)
    stages = []
    if seen:
        replays = pruner.targets == "mlp" and all(b.block.mixer is not None for b in model.blocks)
        # the inputs of a block and, where attention is replayed in the second pass, its outputs
        held += (2 if replays else 1) * work.tokens * model.hidden_size * work.bytes_each
        held += max(sum(one.bytes for one in of_block) for of_block in by_block)
        peak = held + _working_set(model, work.batch_size * work.seq_len)
        stages.append(_walk(model, work, replays, peak))
        stages.append(_accumulation(seen, work, peak))
    if factored := [one for one in pruned if one.hessian]:
        most = max(6 * one.features**2 * FP32 for one in factored)  # H, damped, L, reversed, identity, factor
        flops = sum(one.copies * 4 / 3 * one.features**3 for one in factored)  # Cholesky, n^3 / 3, and a solve, n^3
        stages.append(Stage("factorisation", held + most, flops, in_fp32=True))
    if pruner.method.update == "obs":
        return [*stages, _obs_sweep(pruned, pruner.method, work, held)]
    # the group in fp32; scores, a temporary, ranks and masks of the largest
    most = max(one.weights * FP32 + max(p.weight.numel() for p in one.targets) * 4 * FP32 for one in pruned)
    moved = sum(one.copies * one.weights for one in pruned) * _selection(pruner.method.pattern, work)[0]
    return [*stages, Stage("mask selection", held + most, moved_bytes=moved)]  # hardly any arithmetic


def plan_evaluation(model: Architecture, work: Workload, n_windows: int, seq_len: int) -> Stage:
    """Perplexity on `n_windows` of `seq_len` tokens: all blocks, and the head on every position but the last."""
    if n_windows < 1 or seq_len < 2:
        raise DassError(f"evaluation has {n_windows} windows of {seq_len} tokens: it needs at least one of two.")
    head = model.hidden_size * model.vocabulary
    flops, moved = _forward(model, model.blocks, n_windows, seq_len, work)
    # logits in the model's dtype, in fp32, and their logarithms
    chunk = min(LOGITS_AT_ONCE, work.batch_size * seq_len * model.vocabulary) * (work.bytes_each + 2 * FP32)
    return Stage(
        "evaluation",
        model.total * work.bytes_each + _working_set(model, work.batch_size * seq_len) + chunk,
        flops + 2 * n_windows * (seq_len - 1) * head,
        moved + work.passes(n_windows) * head * work.bytes_each,
    )


def _inputs(b: PlannedBlock, pruner: BlockPruner) -> list[_Input]:
    """What is read in one block, with the projections that `BlockPruner.prune` takes together."""
    needs, targets = pruner.needs(b.block), pruner.projections(b.block)
    features = {p.reads: p.weight.shape[1] for p in b.block.projections}
    return [
        _Input(n, needs.get(reads), b.copies[reads], b.runs[reads], [p for p in targets if p.reads == reads])
        for reads, n in features.items()
    ]


def _forward(
    model: Architecture,
    blocks: list[PlannedBlock],
    n_sequences: int,
    seq_len: int,
    work: Workload,
    mixes: bool = True,
    ends: bool = True,
) -> tuple[float, float]:
    """Operations and bytes of some blocks: all products, without the mixer's unless `mixes`, down's unless `ends`.

    Weights are read once per forward; activations are written and read.
    """
    tokens, passes = n_sequences * seq_len, work.passes(n_sequences)
    flops = moved = 0.0
    for b in blocks:
        run = [p for unit in b.block.units for role, p in unit.projections.items() if ends or role != "down"]
        rest = b.routers + (b.attention if mixes else 0)
        flops += 2 * tokens * (rest + sum(b.runs[p.reads] * p.weight.numel() for p in run))
        flops += 4 * tokens * seq_len * b.attention_width if mixes else 0  # queries with keys, and with values
        weights = rest + sum(b.copies[p.reads] * p.weight.numel() for p in run)
        moved += (passes * weights + 2 * tokens * _vectors(model, b)) * work.bytes_each
    return flops, moved


def _vectors(model: Architecture, b: PlannedBlock) -> float:
    """Elements per token inside a block, as `dass.models.batch_size_for` reckons."""
    downs = [unit.projections["down"] for unit in b.block.units]
    return 3 * sum(b.runs[p.reads] * p.weight.shape[1] for p in downs) + 12 * model.hidden_size


def _working_set(model: Architecture, tokens: int) -> float:
    """Bytes of the activations inside one block for a batch of so many tokens."""
    return tokens * max(_vectors(model, b) for b in model.blocks) * FP32


def _walk(model: Architecture, work: Workload, replays: bool, peak: float) -> Stage:
    """The forwards: up to the down projection for the statistics, then whole for the next block's inputs.

    The second pass is not needed behind the last block, and repeats attention only where that is pruned too. The first
    block runs once more on the first batch, see `enter_first_block`.
    """
    n, length = work.n_sequences, work.seq_len
    parts = [
        _forward(model, model.blocks[:1], min(work.batch_size, n), length, work),
        _forward(model, model.blocks, n, length, work, ends=False),
        _forward(model, model.blocks[:-1], n, length, work, mixes=not replays),
    ]
    return Stage("calibration walk", peak, sum(flops for flops, _ in parts), sum(moved for _, moved in parts))


def _accumulation(inputs: list[_Input], work: Workload, peak: float) -> Stage:
    """The Hessians' upper block triangles, or sums of squares, over all tokens."""
    passes = work.passes(work.n_sequences)
    flops = moved = 0.0
    for one in inputs:
        tokens = one.runs * work.tokens
        if one.hessian:
            starts = range(0, one.features, HESSIAN_BLOCK)
            flops += sum(2 * tokens * min(HESSIAN_BLOCK, one.features - i) * (one.features - i) for i in starts)
            # half of the Hessian is read and written
            moved += passes * one.bytes + tokens * one.features * (work.bytes_each + 2 * FP32)
        else:
            flops += 2 * tokens * one.features
            moved += tokens * one.features * (work.bytes_each + 4 * FP32)
    return Stage("statistics", peak, flops, moved, in_fp32=True)


def _obs_sweep(inputs: list[_Input], method: Method, work: Workload, held: float) -> Stage:
    """Each column corrects those behind it: out_features * in_features^2 operations, in blocks of `LAZY` columns."""
    choice, launches = _selection(method.pattern, work)
    chosen = method.pattern.m if isinstance(method.pattern, NM) else float(method.all_parameters()["block_size"])
    launches = 2 + launches / chosen  # per column: where and addr_, and its part of a choice
    return Stage(
        "OBS sweep",
        # weights, their stack, its transpose and the result, two masks; the factor and its scaled rows
        held + max(one.weights * (4 * FP32 + 2) + 2 * one.features**2 * FP32 for one in inputs),
        sum(one.copies * one.weights * one.features for one in inputs),
        # a block's product reads and writes all columns behind it, a column those behind it in its block
        sum(one.copies * one.weights * (FP32 * one.features / LAZY + FP32 * LAZY + choice) for one in inputs),
        in_fp32=True,
        launches=sum(one.copies * one.features * launches for one in inputs),
    )


def _selection(pattern: Pattern, work: Workload) -> tuple[float, float]:
    """Bytes moved per weight, a rough count, and the operations of one call of `keep_most_important` in a sweep."""
    scores = 3 * work.bytes_each + 8 * FP32  # to fp32, two operations, checks, the mask's application
    if isinstance(pattern, NM) and pattern.m <= LARGEST_RANKED_M:
        pairs = (pattern.m - 1) / 2  # per weight; of each: two scores, the answer, two ranks
        return scores + 15 * pairs, 2 * pattern.m + 3 * pattern.m * pairs + 7
    return scores + 16 * FP32, 25  # the selection's passes over the scores
