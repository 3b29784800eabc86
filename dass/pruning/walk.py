"""The walk over the decoder blocks: statistics with dense weights, then the pruned block is run for the next one.

    for step in walk(model, input_ids, pruner.needs):
        pruner.prune(step.block, step.streams)

It knows the blocks in order and the activations that enter the current one; what is done to a block is its caller's.
Every block is run by its own forward, with the keyword arguments that the model's own forward gave it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.distributed import broadcast, rank, share_of, world
from dass.errors import DassError
from dass.memory import Halved, attempted, note_halved
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import Block, Hold, resident
from dass.pruning.calls import Activations, enter_first_block, halve, outputs_of
from dass.pruning.layout import find_blocks
from dass.pruning.masks import Mask
from dass.pruning.mixed import Mixed
from dass.pruning.observe import eager_experts, observe, open_streams, require_enough_tokens, through_one
from dass.pruning.outputs import Outputs
from dass.pruning.parked import Parked
from dass.pruning.pruner import BlockPruner, Needs
from dass.pruning.statistics import Streams, add_up


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
    start: tuple[int, Sequence[Tensor]] | None = None,
    done: Callable[[int, Iterable[Tensor]], None] = lambda index, batches: None,
    scratch: Path | None = None,
    halved: Halved = note_halved,
    fixed_mixers: bool = True,
) -> Iterator[Step]:
    """Visit the blocks of a causal language model in order; each is run again once the caller has set its weights.

    Args:
        model: any decoder that `find_blocks` understands, each block on one device.
        input_ids: calibration tokens, `(n_sequences, seq_len)` int64; None is enough where nothing is needed. Of
            several processes each is given all, and takes its share.
        needs: what must be seen in a block, such as `BlockPruner.needs`.
        batch_size: sequences per forward.
        min_expert_tokens: an expert that saw fewer is judged by all tokens of the block, run through it; None: see
            `EXPERT_TOKENS`.
        projections: see `find_blocks`.
        hold: has a block in memory from before its statistics until its outputs were made, pruned.
        start: index of the block to begin with, and what enters it, as an earlier walk had it; the blocks before it are
            as that one left them.
        done: is told of each block that is finished: the index of the next one, and what enters it; never where blocks
            hand state to each other, so that a later walk could not begin between them.
        scratch: a folder, which may be made, for activations that have no room in memory; see `Parked`.
        halved: is told of a smaller batch size, from where on the memory of the device does not suffice for it.
        fixed_mixers: attention is changed only where what it reads is needed; where it is not, what it gives may take
            the place of what enters the block, see `Mixed`.

    Raises:
        DassError: unknown layout, missing calibration, activations that are not finite, too little memory, or attention
            that was changed although `fixed_mixers`.
    """
    blocks = find_blocks(model, projections)
    wanted = any(map(needs, blocks))
    if wanted and input_ids is None:
        raise DassError("This method needs calibration tokens: choose a calibration.", field="calibration")
    n_sequences = 0 if input_ids is None else len(input_ids)
    if wanted and n_sequences < world():
        why = f"{world()} processes cannot share {n_sequences} calibration sequences: start fewer, or give more."
        raise DassError(why, field="calibration.n_sequences")
    with eager_experts(model):
        (first, batches), activations = start or (0, []), None
        sizes = [len(batch) for batch in batches] or batch_size  # an earlier walk may have halved them
        tokens = None if input_ids is None or not wanted else share_of(input_ids).to(model.device).split(sizes)
        smaller = partial(halve, model, blocks, halved)
        if tokens is not None and 0 < first < len(blocks):
            with hold(blocks[0]):
                activations = enter_first_block(model, blocks, tokens, scratch, halved)
            activations.batches, activations.n_sequences = Parked(model.device, scratch, batches), n_sequences
        for index, block in enumerate(blocks[first:], first):
            with hold(block):
                if tokens is not None and activations is None:
                    activations = enter_first_block(model, blocks, tokens, scratch, halved)
                    activations.n_sequences = n_sequences
                is_last = index + 1 == len(blocks)
                mixed = None
                if activations is not None:
                    may_add = fixed_mixers and not activations.share_state
                    mixed = Mixed(activations.batches, activations.calls, index, block, may_add)
                yield from _visit(index, block, needs(block), activations, mixed, min_expert_tokens, is_last, smaller)
            if activations is None or not activations.share_state:
                done(index + 1, [] if activations is None else activations.batches)


def _visit(
    index: int,
    block: Block,
    needs: Needs,
    activations: Activations | None,
    mixed: Mixed | None,
    min_expert_tokens: int | None,
    is_last: bool,
    smaller: Callable[[Activations, int], None],
) -> Iterator[Step]:
    """One block of the walk, whose outputs replace the activations unless it is the last; `smaller`: see `halve`."""
    streams: Streams = {}
    rare: dict[str, int] = {}
    if activations is not None and mixed is not None and needs:
        # where attention is to be pruned, its dense outputs are of no use later
        mixer = None if any(p.reads in needs for p in block.attention.values()) else block.mixer
        observing = partial(_observed, activations, index, block, needs, mixer, mixed)
        while (seen := attempted(observing)) is None:  # all batches anew, so that none is counted twice
            mixed.cut()
            smaller(activations, 0)
        streams = add_up(seen)
        rare = require_enough_tokens(block, streams, activations, min_expert_tokens)
        for unit in (unit for unit in block.units if unit.name in rare):
            through = partial(through_one, block, unit, streams, activations, index, mixer, mixed)
            while (found := attempted(through)) is None:
                mixed.cut()
                smaller(activations, 0)
            streams |= add_up(found)
    before = _versions(block.mixer)
    yield Step(index, block, streams, rare, partial(_outputs, activations, index, block, smaller, mixed))
    if mixed is not None and _versions(block.mixer) != before:
        mixed.forget()
    broadcast(block.module.parameters())
    if activations is not None and not is_last:
        for i, hidden in outputs_of(activations, index, block, smaller, mixed):
            activations.batches[i] = hidden
            if mixed is not None:
                mixed.drop(i)


def _observed(
    activations: Activations, index: int, block: Block, needs: Needs, mixer: nn.Module | None, mixed: Mixed
) -> Streams:
    """The statistics of a dense block; what its mixer returned for each batch is kept."""
    streams = open_streams(block, needs)
    for i, (hidden, calls) in enumerate(zip(activations.batches, activations.calls, strict=True)):
        mixed.keep(i, observe(block, mixer, streams, hidden, calls[index], mixed[i]))
    return streams


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    pruner: BlockPruner | AdaptivePruner,
    input_ids: Tensor | None = None,
    batch_size: int = 1,
    projections: Mapping[str, str] | None = None,
    min_expert_tokens: int | None = None,
) -> dict[str, Mask]:
    """Prune a causal language model in place; returns the mask of each projection by its name.

    Args:
        input_ids: calibration tokens, `(n_sequences, seq_len)` int64; magnitude needs none.
        batch_size: sequences per forward.
        projections: a regular expression for each role, where the layout is not known.
        min_expert_tokens: see `walk`.

    Raises:
        DassError: what `walk`, `BlockPruner.check` and `BlockPruner.prune` raise.
    """
    pruner.check(find_blocks(model, projections))
    fixed = pruner.targets == "mlp"
    steps = walk(model, input_ids, pruner.needs, batch_size, min_expert_tokens, projections, fixed_mixers=fixed)
    pruned = [one for step in steps for one in pruner.prune(step.block, step.streams, step.outputs)]
    for one in pruned:
        broadcast(part for part in (one.mask.keep, one.mask.order) if part is not None)
    return {one.projection.name: one.mask for one in pruned}


def _versions(module: nn.Module | None) -> list[tuple[int, int]]:
    """What changes when a weight is written."""
    return [(id(p), p._version) for p in module.parameters()] if module is not None else []


def _outputs(
    activations: Activations | None,
    index: int,
    block: Block,
    smaller: Callable[[Activations, int], None],
    mixed: Mixed | None,
    share: float = 1.0,
    sequences: range | None = None,
) -> Iterator[Tensor]:
    """The block's outputs on what enters it, batch by batch; the mixer is replayed where its outputs were kept."""
    if activations is None:
        return
    # counted in sequences: batches differ from device to device
    wanted = sequences or range(math.ceil(share * activations.n_sequences))
    start, stop = (len(range(rank(), end, world())) for end in (wanted.start, wanted.stop))  # own ones, see `share_of`
    dtype = block.units[0].projections["up"].weight.dtype  # another one while its MLPs are being trained
    for i, result in outputs_of(activations, index, block, smaller, mixed, range(start, stop), dtype):
        first = sum(shape[0] for shape in activations.batches.shapes[:i])
        yield result[max(start - first, 0) : stop - first]
