"""Floating-point operations and memory of the stages of a run.

The counts follow the code that runs on a GPU: dass/pruning/{walk,statistics,method,update,masks}.py and
dass/evaluation/perplexity.py; benchmarks/counted.py counts what really happens. A multiplication with its addition is
two operations (FLOPs). Norms, activation functions and rotary embeddings count as traffic; attention multiplies all
pairs of positions, also those that a mask hides.
"""

from dataclasses import dataclass, replace

from dass.errors import DassError
from dass.evaluation.perplexity import LOGITS_AT_ONCE
from dass.models import DTYPES
from dass.planning.architecture import Architecture, PlannedBlock
from dass.planning.devices import Stage
from dass.pruning.masks import NM, Pattern, Unstructured
from dass.pruning.method import Method
from dass.pruning.mixed import TRIED
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import HESSIAN_BLOCK, INVERSE_BLOCK
from dass.pruning.update import LAZY

FP32 = 4  # bytes
SORT_PASSES = 4  # of a radix sort over a long group, 8 bits each


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
    streams: bool = False
    """Whether the blocks lie on disk, and two of them are in memory at a time."""
    by_expert: bool = False
    """Whether their experts then do, too, and are read anew in every forward."""

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
    def passes(self) -> int:
        """Forwards that the sequences take."""
        return -(-self.n_sequences // self.batch_size)

    @property
    def bytes_each(self) -> int:
        """Of a weight or an activation."""
        return DTYPES[self.dtype].itemsize


def share_removed(pattern: Pattern) -> float:
    """The share of the targeted weights that a pattern removes, but for the rounding down in each comparison group."""
    return pattern.ratio if isinstance(pattern, Unstructured) else 1 - pattern.n / pattern.m


def targeted_weights(model: Architecture, pruner: BlockPruner) -> int:
    """How many weights the projections hold that a method prunes, those of all experts included."""
    chosen = [(b, p) for b in model.blocks for p in pruner.projections(b.block)]
    return sum(b.inputs[p.reads].copies * p.weight.numel() for b, p in chosen)


def weights_held(model: Architecture, work: Workload) -> int:
    """Bytes of the weights that are in memory at once."""
    streamed = model.by_expert if work.by_expert else model.streamed
    return (streamed if work.streams else model.total) * work.bytes_each


def _read_again(model: Architecture, work: Workload) -> float:
    """Bytes from disk in a pass of all sequences through all blocks, beside those of reading each block once."""
    return model.in_experts * work.bytes_each * (work.passes - 1) if work.streams and work.by_expert else 0


def plan_load(model: Architecture, work: Workload) -> Stage:
    """Reading the weights onto the device, but for blocks that stay on disk."""
    weights = (model.total - model.in_blocks * work.streams) * work.bytes_each
    return Stage("load", weights, moved_bytes=2 * weights, disk_bytes=weights)


def plan_pruning(model: Architecture, pruner: BlockPruner, work: Workload) -> list[Stage]:
    """The stages of `prune_model` with one method, in order; those that it does not have are left out.

    Raises:
        DassError: the pattern does not fit a layer, or there is nothing to prune.
    """
    pruner.check([b.block for b in model.blocks])
    sweeps = pruner.method.update == "obs"
    walk, statistics = Stage("calibration walk"), Stage("statistics")  # products of 16-bit numbers are summed in fp32
    factorisation = Stage("factorisation", in_fp32=True)
    selection = Stage("OBS sweep" if sweeps else "mask selection", in_fp32=sweeps)
    choice_bytes, choice_launches = _choice(pruner.method, work)
    largest = 0.0  # bytes of the statistics of one block
    for b in model.blocks:
        needs, targets = pruner.needs(b.block), pruner.projections(b.block)
        of_block = 0.0
        for reads, one in b.inputs.items():
            n, copies, tokens = one.features, one.copies, one.runs * work.tokens
            sizes = [p.weight.numel() for p in one.projections if p in targets]
            weights, hessian = sum(sizes), needs.get(reads)
            if hessian:  # its upper block triangle; half of it is read and written
                products = sum(min(HESSIAN_BLOCK, n - i) * (n - i) for i in range(0, n, HESSIAN_BLOCK))
                of_input = copies * n**2 * FP32
                # a product is written, and added to half of the Hessian
                statistics.add(
                    2 * tokens * products, tokens * n * work.bytes_each, alone_bytes=work.passes * 2 * of_input
                )
                of_block += of_input
            elif hessian is not None:  # sums of squares
                statistics.add(2 * tokens * n, tokens * n * work.bytes_each)
                of_block += copies * n * FP32
            if hessian and sizes:  # Cholesky, n^3 / 3; each block of columns: a solve, and two products above it
                widths = [(i, min(INVERSE_BLOCK, n - i)) for i in range(0, n, INVERSE_BLOCK)]
                solve = sum(b * (b**2 + 2 * i * b + i * (i + INVERSE_BLOCK)) for i, b in widths)
                # H, and two of: damped, L, reversed
                factorisation.add(copies * (n**3 / 3 + solve), peak_bytes=3 * n**2 * FP32)
            if sweeps and sizes:  # each column corrects those behind it, in blocks of `LAZY` columns
                selection.add(
                    copies * weights * n,
                    # a column reads and writes those behind it in its block
                    copies * weights * (FP32 * LAZY + choice_bytes),
                    # weights, their stack, its transpose and the result, two masks; the factor and its scaled rows
                    weights * (4 * FP32 + 2) + 2 * n**2 * FP32,
                    launches=copies * n * (2 + choice_launches),  # per column: its error, and addr_
                    alone_bytes=copies * weights * FP32 * n / LAZY,  # a block's product: all columns behind it
                )
            elif sizes:  # hardly any arithmetic
                # the group in fp32; scores, a temporary, ranks and masks of the largest
                selection.add(0, copies * weights * choice_bytes, (weights + 4 * max(sizes)) * FP32)
        largest = max(largest, of_block)
    held, stages = float(weights_held(model, work)), [factorisation, selection]
    if statistics.flops:
        stages = [walk, statistics, *stages]
        replays = pruner.targets == "mlp" and all(b.block.mixer is not None for b in model.blocks)
        # the first block runs once more on the first batch, see `enter_first_block`
        _add_forward(walk, model, model.blocks[:1], replace(work, n_sequences=min(work.batch_size, work.n_sequences)))
        _add_forward(walk, model, model.blocks, work, ends=False)
        # for the next block's inputs; attention runs again only where it is pruned too
        _add_forward(walk, model, model.blocks[:-1], work, mixes=not replays)
        if replays:
            few = replace(work, n_sequences=2, seq_len=min(TRIED, work.seq_len))
            _add_forward(walk, model, model.blocks, few, mixes=False)
        walk.peak_bytes = statistics.peak_bytes = _working_set(model, work)
        # the inputs of a block and, where attention is replayed in the second pass, its outputs, unless one takes the
        # other's place, which only a run can tell: it is tried on a few tokens, see `Mixed`
        held += largest + (2 if replays else 1) * work.tokens * model.hidden_size * work.bytes_each
    found = [stage for stage in stages if stage.flops or stage.moved_bytes]
    if work.streams:  # read while the one before is worked on; written, and read once more for the zeros to be counted
        blocks = model.in_blocks * work.bytes_each
        found[0].disk_bytes = blocks + (_read_again(model, work) if statistics.flops else 0) * 2
        found.append(Stage("blocks to disk, zeros counted", disk_bytes=2 * blocks))
    return [replace(stage, peak_bytes=held + stage.peak_bytes) for stage in found]


def plan_evaluation(model: Architecture, work: Workload, n_windows: int, seq_len: int) -> Stage:
    """Perplexity on `n_windows` of `seq_len` tokens: all blocks, and the head on every position but the last."""
    if n_windows < 1 or seq_len < 2:
        raise DassError(f"evaluation has {n_windows} windows of {seq_len} tokens: it needs at least one of two.")
    work = replace(work, n_sequences=n_windows, seq_len=seq_len)
    # logits in the model's dtype, in fp32, and their logarithms
    chunk = min(LOGITS_AT_ONCE, work.batch_size * seq_len * model.vocabulary) * (work.bytes_each + 2 * FP32)
    stage = Stage("evaluation", weights_held(model, work) + _working_set(model, work) + chunk)
    if work.streams:  # what enters a block, of all windows
        stage.peak_bytes += work.tokens * model.hidden_size * work.bytes_each
        stage.disk_bytes = model.in_blocks * work.bytes_each + _read_again(model, work)
    head = model.hidden_size * model.vocabulary
    stage.add(2 * n_windows * (seq_len - 1) * head, work.passes * head * work.bytes_each)
    _add_forward(stage, model, model.blocks, work)
    return stage


def _add_forward(
    stage: Stage, model: Architecture, blocks: list[PlannedBlock], work: Workload, mixes: bool = True, ends: bool = True
) -> None:
    """All products of some blocks, without the mixer's unless `mixes`; unless `ends`, without those `Watch` leaves out.

    Weights are read once per forward; activations are written and read.
    """
    for b in blocks:
        computed = [
            p
            for unit in b.block.units
            for p in unit.projections.values()
            if ends or p.role != "down" or (p.expert is None and len(b.block.units) > 1)
        ]
        run = [(b.inputs[p.reads], p.weight.numel()) for p in computed]
        dense = b.routers + (b.attention if mixes else 0)
        mixing = 4 * work.seq_len * b.attention_width if mixes else 0  # queries with keys, and with values
        stage.add(
            work.tokens * (2 * (dense + sum(one.runs * weights for one, weights in run)) + mixing),
            work.passes * (dense + sum(one.copies * weights for one, weights in run)) * work.bytes_each
            + 2 * work.tokens * _vectors(model, b) * work.bytes_each,
            alone_bytes=work.tokens * _between(model, b, mixes) * work.bytes_each,
        )


def _vectors(model: Architecture, b: PlannedBlock) -> float:
    """Elements per token inside a block, as `dass.models.batch_size_for` reckons."""
    downs = [b.inputs[unit.intermediate] for unit in b.block.units]
    return 3 * sum(one.runs * one.features for one in downs) + 12 * model.hidden_size


def _between(model: Architecture, b: PlannedBlock, mixes: bool) -> float:
    """Elements per token that are read and written between the products, one operation after the other."""
    downs = [b.inputs[unit.intermediate] for unit in b.block.units]
    norms, rotary = 42 * model.hidden_size, 26 * b.attention_width if mixes else 0  # norms in fp32, and residuals
    return norms + rotary + 5 * sum(one.runs * one.features for one in downs)  # the activation, its product with up


def _working_set(model: Architecture, work: Workload) -> float:
    """Bytes of the activations inside one block for a batch."""
    return work.batch_size * work.seq_len * max(_vectors(model, b) for b in model.blocks) * FP32


def _choice(method: Method, work: Workload) -> tuple[float, float]:
    """Bytes moved per weight, a rough count, and the operations of choosing per column of a sweep."""
    pattern = method.pattern
    scores = 4 * work.bytes_each + 12 * FP32  # to fp32, two operations, checks, the mask's application
    # a sort reads and writes scores and indices, of groups that no multiprocessor can hold several times
    selection = 4.0 * FP32 * (1 if isinstance(pattern, NM) else SORT_PASSES)
    launches = 7.0  # three of the criterion; sorting, two for the mask, and to its place
    # without a sweep there is no block size, and nothing asks for the operations
    at_once = pattern.m if isinstance(pattern, NM) else float(method.all_parameters().get("block_size", 1))
    return scores + selection, launches / at_once
