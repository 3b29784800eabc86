"""The walk over the decoder blocks: statistics with dense weights, then the pruned block is run for the next one.

    for step in walk(model, input_ids, pruner.needs):
        pruner.prune(step.block, step.streams)

It knows the blocks in order and the activations that enter the current one; what is done to a block is its caller's.
Every block is run by its own forward, with the keyword arguments that the model's own forward gave it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import Block, Hold, resident
from dass.pruning.calls import Activations, Call, enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.masks import Mask
from dass.pruning.observe import eager_experts, observe, open_streams, require_enough_tokens, through_one
from dass.pruning.outputs import Outputs
from dass.pruning.pruner import BlockPruner, Needs
from dass.pruning.statistics import Streams


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
        done: is told of each block that is finished: the index of the next one, and what enters it; never where blocks
            hand state to each other, so that a later walk could not begin between them.

    Raises:
        DassError: unknown layout, missing calibration, activations that are not finite.
    """
    blocks = find_blocks(model, projections)
    wanted = any(map(needs, blocks))
    if wanted and input_ids is None:
        raise DassError("This method needs calibration tokens: choose a calibration.", field="calibration")
    with eager_experts(model):
        tokens = None if input_ids is None or not wanted else input_ids.to(model.device).split(batch_size)
        (first, batches), activations = start or (0, []), None
        if tokens is not None and 0 < first < len(blocks):
            with hold(blocks[0]):
                activations = enter_first_block(model, blocks, tokens)
            activations.batches = [batch.to(model.device) for batch in batches]
        for index, block in enumerate(blocks[first:], first):
            with hold(block):
                if tokens is not None and activations is None:
                    activations = enter_first_block(model, blocks, tokens)
                yield from _visit(index, block, needs(block), activations, min_expert_tokens, index + 1 < len(blocks))
            if activations is None or not activations.share_state:
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
        rare = require_enough_tokens(block, streams, activations, min_expert_tokens)
        for unit in block.units:
            if unit.name in rare:
                streams |= through_one(block, unit, streams, _each(activations, index), mixer, mixed)
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


def _versions(module: nn.Module | None) -> list[tuple[int, int]]:
    """What changes when a weight is written."""
    return [(id(p), p._version) for p in module.parameters()] if module is not None else []


def _each(activations: Activations, index: int) -> Iterator[tuple[Tensor, Call]]:
    """Every batch with the call of block `index`."""
    for hidden, calls in zip(activations.batches, activations.calls, strict=True):
        yield hidden, calls[index]


def _outputs(
    activations: Activations | None,
    index: int,
    block: Block,
    mixed: list[Any] | None,
    share: float = 1.0,
    sequences: range | None = None,
) -> Iterator[Tensor]:
    """The block's outputs on what enters it, batch by batch; the mixer is replayed where its outputs were kept."""
    if activations is None:
        return
    # counted in sequences: batches differ from device to device
    wanted = sequences or range(math.ceil(share * sum(map(len, activations.batches))))
    dtype, first = block.units[0].projections["up"].weight.dtype, 0
    for i, (hidden, call) in enumerate(_each(activations, index)):
        own = range(max(wanted.start - first, 0), min(wanted.stop - first, len(hidden)))
        first += len(hidden)
        if not own:
            continue
        output = mixed[i] if mixed is not None else None
        replay = replaced_forward(block.mixer, lambda *_, output=output, **__: output) if output is not None else None
        if hidden.dtype != dtype:  # its MLPs are being trained
            hidden, call = hidden.to(dtype), call.in_dtype(dtype)
        with replay or nullcontext():
            result = call(block, hidden)
        yield result[own.start : own.stop]
