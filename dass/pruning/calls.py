"""How a model calls its blocks, and what enters the first: recorded in one run of the model with stubs for blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.memory import Halved, attempted, half, note_halved
from dass.pruning.blocks import Block, Hold
from dass.pruning.call import HANDED_ON, Call, alike, may_change
from dass.pruning.mixed import Mixed
from dass.pruning.parked import Parked

Forward = Callable[[], object]
"""Runs the model's decoder on one batch."""


@dataclass
class Activations:
    """What enters the current block."""

    inputs: list[Tensor | Forward]
    """Token ids, `(batch, seq_len)` each, or what runs them."""
    batches: Parked
    """Hidden states, `(batch, seq_len, d)` each, in the model's dtype."""
    calls: list[list[Call]] = field(default_factory=list)
    """For each batch, the call of every block; batches in a row that the model calls alike share them."""
    n_sequences: int = 0
    """Of all batches, and of all processes of a run."""
    tail: tuple[Any, ...] | None = None
    """What else a block returns beside the hidden states; None where it returns them alone."""

    @property
    def share_state(self) -> bool:
        """Whether blocks are given objects that others may fill, so that none can run without those before it."""
        return any(may_change(call) for calls in self.calls for call in calls)

    def returned(self, hidden: Tensor) -> Any:
        """What a block returns that gives these hidden states."""
        return hidden if self.tail is None else (hidden, *self.tail)


def enter_first_block(
    model: PreTrainedModel,
    blocks: list[Block],
    inputs: Sequence[Tensor | Forward],
    scratch: Path | None = None,
    halved: Halved = note_halved,
) -> Activations:
    """Embed all sequences and record how the model calls each block; only the first block runs, once.

    In place of the others stands a stub that hands its input on, so this costs next to nothing; what else a block
    returns, no stub knows, see `HandedOn`.

    Args:
        inputs: batches of token ids, `(batch, seq_len)` int64 each, on the device, halved where its memory does not
            suffice; or what runs one.
        scratch: see `Parked`.
        halved: is told of the size of the batches from then on.
    """
    while (activations := attempted(partial(_entered, model, blocks, inputs, scratch))) is None:
        inputs = _cut(inputs, _half_of(inputs, halved))
    return activations


def halve(
    model: PreTrainedModel, blocks: list[Block], halved: Halved, activations: Activations, start: int = 0
) -> None:
    """Halve the batches from one on, in place, and ask the model anew how it calls its blocks; none of them runs.

    Raises:
        DassError: they are single sequences, or cannot be cut, such as where blocks have handed state to each other.
    """
    if activations.share_state:
        raise _uncut()
    size = _half_of(activations.inputs[start:], halved)
    activations.inputs[start:] = _cut(activations.inputs[start:], size)
    activations.batches.cut(start, size)
    activations.calls[start:] = _entered(model, blocks, activations.inputs[start:], None, activations).calls


def _uncut() -> DassError:
    """Batches that cannot be halved on the way."""
    return DassError(
        "The memory of the device does not suffice, and batches of this kind cannot be halved on the way: set a "
        "smaller batch_size.",
        field="batch_size",
    )


def _half_of(inputs: Sequence[Tensor | Forward], halved: Halved) -> int:
    if not all(isinstance(batch, Tensor) for batch in inputs):
        raise _uncut()
    return half(max(len(batch) for batch in inputs if isinstance(batch, Tensor)), halved)


def _cut(inputs: Sequence[Tensor | Forward], size: int) -> list[Tensor | Forward]:
    return [part for batch in inputs if isinstance(batch, Tensor) for part in batch.split(size)]


def _entered(
    model: PreTrainedModel,
    blocks: list[Block],
    inputs: Sequence[Tensor | Forward],
    scratch: Path | None,
    known: Activations | None = None,
) -> Activations:
    """As `enter_first_block`; no block runs where what it returns is `known`."""
    activations = Activations(list(inputs), Parked(model.device, scratch), tail=None if known is None else known.tail)
    entered: Tensor | None = None
    ran = known is not None

    def stub(index: int, calls: list[Call]) -> Callable[..., Any]:
        original = blocks[index].module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            nonlocal entered, ran
            hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
            calls.append(Call(rest, keywords))
            if index == 0:
                activations.batches.append(hidden)
                entered = hidden
            elif hidden is not entered:
                raise DassError(f"{type(model).__name__} computes between its blocks, which this walk does not see.")
            if not ran:  # whether blocks return tuples, and what else is in them, only a real run can tell
                output, ran = original(hidden, *rest, **keywords), True
                activations.tail = tuple(output[1:]) if isinstance(output, tuple | list) else None
            tail = activations.tail
            return hidden if tail is None else (hidden, *tree_map(lambda _: HANDED_ON, tail))

        return forward

    for batch in inputs:
        calls: list[Call] = []
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(replaced_forward(block.module, stub(index, calls)))
            if isinstance(batch, Tensor):
                model.base_model(input_ids=batch, use_cache=False)
            else:
                batch()
        if len(calls) != len(blocks):
            raise DassError(
                f"The model runs {len(calls)} of the {len(blocks)} blocks that were found: check its config."
            )
        before = activations.calls[-1] if activations.calls else calls
        activations.calls.append(before if alike(before, calls) else calls)
    return activations


def block_by_block(
    model: PreTrainedModel,
    blocks: list[Block],
    inputs: Sequence[Tensor | Forward],
    hold: Hold,
    scratch: Path | None = None,
    halved: Halved = note_halved,
    done: Callable[[int], object] = lambda i: None,
) -> Iterator[AbstractContextManager[None]]:
    """Run all batches through one block after the other, so that each block is in memory once.

    Args:
        inputs, scratch: see `enter_first_block`.
        done: is told of each batch that is through one of the blocks, by its index.

    Yields:
        For each batch a context in which the model's forward on it hands over what the blocks have given.
    """
    for index, block in enumerate(blocks):
        with hold(block):
            if index == 0:
                activations = enter_first_block(model, blocks, inputs, scratch, halved)
            for i, output in outputs_of(activations, index, block, partial(halve, model, blocks, halved)):
                activations.batches[i] = output
                done(i)
    parts = iter(range(len(activations.batches)))
    for batch in inputs:
        own = [next(parts)]
        while isinstance(batch, Tensor) and sum(activations.batches.shapes[i][0] for i in own) < len(batch):
            own.append(next(parts))  # it was halved
        yield _handing_over(blocks, activations, own)


def outputs_of(
    activations: Activations,
    index: int,
    block: Block,
    smaller: Callable[[Activations, int], None],
    mixed: Mixed | None = None,
    wanted: range | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The outputs of block `index` on each batch, and the batch's number, which may be replaced by them.

    Args:
        smaller: see `halve`; does it to the batches for which the memory of the device does not suffice.
        mixed: what the mixer returned for each batch, to be replayed; None where it runs again.
        wanted: sequences; batches with none of them are left out. None: all.
        dtype: of the hidden states and of what else the block is given; None: as they are.
    """
    i = first = 0
    while i < len(activations.batches):
        after = first + activations.batches.shapes[i][0]
        if wanted is not None and not range(max(first, wanted.start), min(after, wanted.stop)):
            i, first = i + 1, after
            continue
        result = attempted(partial(_output, activations, index, block, mixed, i, dtype))
        if result is None:
            if mixed is not None:
                mixed.cut()
            smaller(activations, i)
        else:
            yield i, result
            i, first = i + 1, after


def _output(
    activations: Activations, index: int, block: Block, mixed: Mixed | None, i: int, dtype: torch.dtype | None
) -> Tensor:
    call, hidden, output = activations.calls[i][index], activations.batches[i], None if mixed is None else mixed[i]
    if dtype not in (None, hidden.dtype):
        call, hidden = call.in_dtype(dtype), hidden.to(dtype)
        output = tree_map_only(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, output)
    if block.mixer is None or output is None:
        return call(block, hidden)
    with replaced_forward(block.mixer, lambda *_, **__: output):
        return call(block, hidden)


@contextmanager
def _handing_over(blocks: list[Block], activations: Activations, own: list[int]) -> Iterator[None]:
    """No block computes: whatever enters the first, each returns what the last has given for these batches."""
    parts = [activations.batches[i] for i in own]
    returned = activations.returned(torch.cat(parts) if len(parts) > 1 else parts[0])

    def hand_over(*_: Any, **__: Any) -> Any:
        return returned

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.module, hand_over))
        yield
