"""What a block reads with its dense weights: the statistics of every input, and of experts that saw too little."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.call import Call
from dass.pruning.calls import Activations
from dass.pruning.mixed import Mixed
from dass.pruning.products import Stop, Watch, extent_of
from dass.pruning.pruner import Needs
from dass.pruning.statistics import InputStream, Streams

EXPERT_TOKENS = 32
"""So many tokens an expert must have seen where only norms are needed; for a Hessian, one for each input feature."""


def open_streams(block: Block, needs: Needs) -> Streams:
    """Empty statistics for what must be seen in a block."""
    wanted = {p.reads: p for p in block.projections if p.reads in needs}
    return {
        reads: InputStream(p.features, p.parameter.dtype, p.parameter.device, needs[reads])
        for reads, p in wanted.items()
    }


def statistics_bytes(block: Block, needs: Needs) -> int:
    """What the statistics of a block take, all of whose inputs are held at once, in fp32."""
    features = {p.reads: p.features for p in block.projections}
    return sum(4 * features[reads] ** (2 if with_hessian else 1) for reads, with_hessian in needs.items())


def observe(
    block: Block,
    mixer: nn.Module | None,
    streams: Streams,
    hidden: Tensor,
    call: Call,
    mixed: Any = None,
    through: int | None = None,
) -> Any:
    """Run a dense block up to its down projections and add what its projections read to the statistics.

    Args:
        mixed: what the mixer returned before, to be replayed.
        through: the expert that all tokens run through; None: as they are routed.

    Returns:
        What `mixer` returned, to be replayed once the MLP is pruned, or None: without a mixer, or where an MLP had run
        before it, so that its output might depend on that one.

    Raises:
        DassError: roles that do not fit what runs, or experts before the mixer.
    """
    kept, returned, depends = mixed, mixed is not None, False

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal kept, returned
        returned = True
        if mixer is not None:
            kept = (output[0], *(None for _ in output[1:])) if isinstance(output, tuple) else output

    first: dict[str, Projection] = {}  # of the projections that read one tensor
    followers: dict[str, list[Projection]] = {}
    for p in block.projections:
        if first.setdefault(p.reads, p) is not p:
            followers.setdefault(p.reads, []).append(p)
    read: dict[str, Tensor] = {}  # alive, so that no other tensor can take the memory that tells them apart

    def on_product(p: Projection, whole: Tensor, x: Tensor) -> None:
        nonlocal depends
        leader, unit = first[p.reads], block.unit_of(p)
        if p is leader and p.reads in streams:
            streams[p.reads].add(x)
        if unit is not None or p.reads in streams:  # up may run before gate
            early = [] if leader.name in read else followers.get(p.reads, [])
            for other in early if p is leader else [leader]:
                if other.name in read and extent_of(read[other.name]) != extent_of(whole):
                    raise _wrong_roles(block, f"{other.name} and {p.name} do not read the same tensor")
        if unit is None or p.role != "down":
            read[p.name] = whole
            return
        for other in unit.projections.values():
            if other is not p and other.name not in read:
                raise _wrong_roles(block, f"{p.name} runs before {other.name}")
        if len(block.units) == 1:
            raise Stop
        if block.mixer is not None and not returned:
            if p.expert is not None:
                raise DassError(
                    f"{block.name} has an unknown layout: its expert {unit.name} runs before its "
                    f"{type(block.mixer).__name__}, which may read what the experts give: use another model."
                )
            depends = True

    hook = block.mixer.register_forward_hook(keep) if block.mixer is not None and mixed is None else None
    with ExitStack() as stack:
        if mixer is not None and mixed is not None:
            stack.enter_context(replaced_forward(mixer, lambda *_, **__: mixed))
        stack.enter_context(Watch(block, on_product, through))
        try:
            call(block, hidden)
        except Stop:
            pass
        finally:
            if hook is not None:
                hook.remove()
    for stream in streams.values():
        stream.n_sequences += len(hidden)
    return None if depends else kept


def require_enough_tokens(
    block: Block, streams: Streams, activations: Activations, min_expert_tokens: int | None
) -> dict[str, int]:
    """Statistics of a part of the tokens, or of none, would give a mask without a warning.

    Returns:
        The experts that saw too few tokens, and how many they saw.
    """
    expected = activations.n_sequences * activations.batches.shapes[0][1]
    routed = {p.reads: unit for unit in block.units if unit.routed for p in unit.projections.values()}
    rare, n_routed = {}, {reads: stream.n_tokens for reads, stream in streams.items() if reads in routed}
    for reads, stream in streams.items():
        if reads in routed:
            need = stream.norm().numel() if stream.with_hessian else EXPERT_TOKENS
            if stream.n_tokens < max(1, need if min_expert_tokens is None else min_expert_tokens):
                rare[routed[reads].name] = stream.n_tokens
        elif stream.n_tokens != expected:
            raise _wrong_roles(
                block,
                f"its {reads} passed {stream.n_tokens} of {expected} tokens to the matrices that should read it",
            )
    for kind in {reads.rpartition(" ")[2] for reads in n_routed}:
        seen = sum(n for reads, n in n_routed.items() if reads.endswith(kind))
        if seen < expected:
            raise DassError(
                f"{block.name} has an unknown layout: of {expected} tokens its experts saw {seen} in all: their "
                f"{kind} is read by other matrices than gate, up and down."
            )
    return rare


def through_one(
    block: Block,
    unit: Unit,
    streams: Streams,
    activations: Activations,
    index: int,
    mixer: nn.Module | None,
    mixed: Mixed,
) -> Streams:
    """The statistics of one expert of block `index` if all tokens ran through it, each as often as it is routed.

    Args:
        mixed: what the mixer returned for each batch.
    """
    expert = unit.projections["down"].expert
    if expert is None:
        raise DassError(
            f"{unit.name} saw too few calibration tokens: give more of them, or lower min_expert_tokens.",
            field="calibration.min_expert_tokens",
        )
    own = {p.reads: streams[p.reads].with_hessian for p in unit.projections.values() if p.reads in streams}
    found = open_streams(block, own)
    for i, (hidden, calls) in enumerate(zip(activations.batches, activations.calls, strict=True)):
        output = mixed[i]
        observe(block, mixer if output is not None else None, found, hidden, calls[index], output, expert)
    return found


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let experts run one by one, each with a product of its own (the host waits for it); put the old way back."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    if set(before.values()) <= {"eager", None}:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _wrong_roles(block: Block, why: str) -> DassError:
    return DassError(
        f"{block.name} has an unknown layout: {why}; say with `projections` which matrices are gate, up and down.",
        field="model.projections",
    )
