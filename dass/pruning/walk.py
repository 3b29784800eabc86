"""The walk over the decoder blocks: statistics with dense weights, then the pruned block is run for the next one.

    for step in walk(model, input_ids, pruner.needs):
        pruner.prune(step.block, step.streams)

It knows the blocks in order and the activations that enter the current one; what is done to a block is its caller's.
Every block is run by its own forward, with the keyword arguments that the model's own forward gave it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.adaptive import AdaptivePruner, Outputs
from dass.pruning.blocks import Block, Hold, Projection, Unit, resident
from dass.pruning.calls import Activations, Call, enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.masks import Mask
from dass.pruning.products import Stop, Watch, extent_of
from dass.pruning.pruner import BlockPruner, Needs
from dass.pruning.statistics import InputStream, Streams

EXPERT_TOKENS = 32
"""So many tokens an expert must have seen where only norms are needed; for a Hessian, one for each input feature."""


@dataclass(frozen=True)
class Step:
    """One block, dense, with its statistics."""

    index: int
    block: Block
    streams: Streams
    rare: dict[str, int]
    """Experts that saw too few tokens and were given all of the block's instead: how many they saw."""
    outputs: Outputs
    """Runs the block with its weights as they are; gives nothing where no calibration is needed."""


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    input_ids: Tensor | None,
    needs: Callable[[Block], Needs],
    batch_size: int = 1,
    min_expert_tokens: int | None = None,
    projections: Mapping[str, str] | None = None,
    hold: Hold = resident,
    start: tuple[int, list[Tensor]] | None = None,
    done: Callable[[int, list[Tensor]], None] = lambda index, batches: None,
) -> Iterator[Step]:
    """Visit the blocks of a causal language model in order; each is run again once the caller has set its weights.

    Args:
        model: any decoder that `find_blocks` understands, on one device.
        input_ids: calibration tokens, `(n_sequences, seq_len)` int64; None is enough where nothing is needed.
        needs: what must be seen in a block, such as `BlockPruner.needs`.
        batch_size: sequences per forward.
        min_expert_tokens: an expert that saw fewer is judged by all tokens of the block, run through it; None: see
            `EXPERT_TOKENS`.
        projections: see `find_blocks`.
        hold: has a block in memory from before its statistics until its outputs were made, pruned.
        start: index of the block to begin with, and what enters it, as an earlier walk had it; the blocks before it are
            as that one left them.
        done: is told of each block that is finished: the index of the next one, and what enters it.

    Raises:
        DassError: unknown layout, missing calibration, activations that are not finite.
    """
    blocks = find_blocks(model, projections)
    wanted = any(map(needs, blocks))
    if wanted and input_ids is None:
        raise DassError("This method needs calibration tokens: choose a calibration.", field="calibration")
    with eager_experts(model):
        activations = None
        if wanted and input_ids is not None:
            with hold(blocks[0]):
                activations = enter_first_block(model, blocks, input_ids.to(model.device).split(batch_size))
        first, batches = start or (0, [])
        if activations is not None and first:
            activations.batches = [batch.to(model.device) for batch in batches]
        for index, block in enumerate(blocks[first:], first):
            with hold(block):
                yield from _visit(index, block, needs(block), activations, min_expert_tokens, index + 1 < len(blocks))
            done(index + 1, [] if activations is None else activations.batches)


def _visit(
    index: int,
    block: Block,
    needs: Needs,
    activations: Activations | None,
    min_expert_tokens: int | None,
    is_followed: bool,
) -> Iterator[Step]:
    """One block of the walk; `is_followed`: another one needs its outputs, which replace the activations."""
    streams = open_streams(block, needs)
    rare: dict[str, int] = {}
    mixed = None
    if activations is not None and streams:
        # where attention is to be pruned, its dense outputs are of no use later
        mixer = None if any(p.reads in streams for p in block.attention.values()) else block.mixer
        mixed = [observe(block, mixer, streams, hidden, call) for hidden, call in _each(activations, index)]
        rare = _require_enough_tokens(block, streams, activations, min_expert_tokens)
        for unit in block.units:
            if unit.name in rare:
                streams |= _through_one(block, unit, streams, _each(activations, index), mixer, mixed)
    before = _versions(block.mixer)
    yield Step(index, block, streams, rare, partial(_outputs, activations, index, block, mixed))
    if activations is not None and is_followed:
        replayed = mixed if _versions(block.mixer) == before else None
        for i, hidden in enumerate(_outputs(activations, index, block, replayed)):
            activations.batches[i] = hidden
            if replayed is not None:
                replayed[i] = None


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, pruner: BlockPruner | AdaptivePruner, input_ids: Tensor | None = None, batch_size: int = 1
) -> dict[str, Mask]:
    """Prune a causal language model in place; returns the mask of each projection by its name.

    Args:
        input_ids: calibration tokens, `(n_sequences, seq_len)` int64; magnitude needs none.
        batch_size: sequences per forward.

    Raises:
        DassError: what `walk`, `BlockPruner.check` and `BlockPruner.prune` raise.
    """
    pruner.check(find_blocks(model))
    steps = walk(model, input_ids, pruner.needs, batch_size)
    return {p.projection.name: p.mask for step in steps for p in pruner.prune(step.block, step.streams, step.outputs)}


def open_streams(block: Block, needs: Needs) -> Streams:
    """Empty statistics for what must be seen in a block."""
    weights = {p.reads: p.weight for p in block.projections}
    return {
        reads: InputStream(weights[reads].shape[1], weights[reads].dtype, weights[reads].device, with_hessian)
        for reads, with_hessian in needs.items()
    }


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


def _versions(module: nn.Module | None) -> list[tuple[int, int]]:
    """What changes when a weight is written."""
    return [(id(p), p._version) for p in module.parameters()] if module is not None else []


def _each(activations: Activations, index: int) -> Iterator[tuple[Tensor, Call]]:
    """Every batch with the call of block `index`."""
    for hidden, calls in zip(activations.batches, activations.calls, strict=True):
        yield hidden, calls[index]


def _outputs(
    activations: Activations | None, index: int, block: Block, mixed: list[Any] | None, share: float = 1.0
) -> Iterator[Tensor]:
    """The block's outputs on what enters it, batch by batch; the mixer is replayed where its outputs were kept."""
    if activations is None:
        return
    n = math.ceil(share * len(activations.batches))
    for i, (hidden, call) in enumerate(islice(_each(activations, index), n)):
        output = mixed[i] if mixed is not None else None
        replay = replaced_forward(block.mixer, lambda *_, output=output, **__: output) if output is not None else None
        with replay or nullcontext():
            result = call(block, hidden)
        yield result


def _require_enough_tokens(
    block: Block, streams: Streams, activations: Activations, min_expert_tokens: int | None
) -> dict[str, int]:
    """Statistics of a part of the tokens, or of none, would give a mask without a warning.

    Returns:
        The experts that saw too few tokens, and how many they saw.
    """
    expected = sum(hidden.shape[:-1].numel() for hidden in activations.batches)
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
        What `mixer` returned, to be replayed once the MLP is pruned, or None: without a mixer, or where it had not run
        by then, so that its output might depend on the MLP.
    """
    kept = mixed

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal kept
        kept = (output[0], *(None for _ in output[1:])) if isinstance(output, tuple) else output

    first: dict[str, Projection] = {}  # of the projections that read one tensor
    for p in block.projections:
        first.setdefault(p.reads, p)
    read: dict[str, Tensor] = {}  # alive, so that no other tensor can take the memory that tells them apart

    def on_product(p: Projection, whole: Tensor, x: Tensor) -> None:
        leader, unit = first[p.reads], block.unit_of(p)
        if p is leader:
            if p.reads in streams:
                streams[p.reads].add(x)
        elif (unit is not None or p.reads in streams) and (
            leader.name not in read or extent_of(read[leader.name]) != extent_of(whole)
        ):
            raise _wrong_roles(block, f"{leader.name} and {p.name} do not read the same tensor")
        if unit is None or p.role != "down":
            read[p.name] = whole
            return
        for other in unit.projections.values():
            if other is not p and other.name not in read:
                raise _wrong_roles(block, f"{p.name} runs before {other.name}")
        if len(block.units) == 1:
            raise Stop

    hook = mixer.register_forward_hook(keep) if mixer is not None and mixed is None else None
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
    return kept


def _wrong_roles(block: Block, why: str) -> DassError:
    return DassError(
        f"{block.name} has an unknown layout: {why}; say with `projections` which matrices are gate, up and down.",
        field="model.projections",
    )


def _through_one(
    block: Block,
    unit: Unit,
    streams: Streams,
    calls: Iterator[tuple[Tensor, Call]],
    mixer: nn.Module | None,
    mixed: list[Any],
) -> Streams:
    """The statistics of one expert if all tokens of the block ran through it, each as often as it is routed."""
    expert = unit.projections["down"].expert
    if expert is None:
        raise DassError(
            f"{unit.name} saw too few calibration tokens: give more of them, or lower min_expert_tokens.",
            field="calibration.min_expert_tokens",
        )
    own = {p.reads: streams[p.reads].with_hessian for p in unit.projections.values() if p.reads in streams}
    found = open_streams(block, own)
    for (hidden, call), output in zip(calls, mixed, strict=True):
        observe(block, mixer if output is not None else None, found, hidden, call, output, expert)
    return found
