"""How a model calls its blocks, and what enters the first: recorded in one run of the model with stubs for blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.blocks import Block, Hold


@dataclass(frozen=True)
class Call:
    """How the model calls one block, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block on hidden states `(batch, seq_len, d)`."""
        output = block.module(hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple | list) else output

    def in_dtype(self, dtype: torch.dtype) -> "Call":
        """The same with its floating-point tensors in another dtype; itself where they are in this one."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        arguments, keywords = tree_map_only(Tensor, cast, (self.arguments, self.keywords))
        return Call(arguments, keywords)


@dataclass
class Activations:
    """What enters the current block."""

    batches: list[Tensor] = field(default_factory=list)
    """Hidden states, `(batch, seq_len, d)` each, in the model's dtype."""
    calls: list[list[Call]] = field(default_factory=list)
    """For each batch, the call of every block; batches in a row that the model calls alike share them."""
    tail: tuple[Any, ...] | None = None
    """What else a block returns beside the hidden states; None where it returns them alone."""

    @property
    def share_state(self) -> bool:
        """Whether blocks are given objects that others may fill, so that none can run without those before it."""
        return any(_may_change(call) for calls in self.calls for call in calls)

    def returned(self, hidden: Tensor) -> Any:
        """What a block returns that gives these hidden states."""
        return hidden if self.tail is None else (hidden, *self.tail)


def enter_first_block(model: PreTrainedModel, blocks: list[Block], inputs: Sequence[Tensor]) -> Activations:
    """Embed all sequences and record how the model calls each block; only the first block runs, once.

    In place of the others stands a stub that hands its input on, so this costs next to nothing.

    Args:
        inputs: batches of token ids, `(batch, seq_len)` int64 each, on the device.
    """
    activations = Activations()
    ran = False

    def stub(index: int, calls: list[Call]) -> Callable[..., Any]:
        original = blocks[index].module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            nonlocal ran
            hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
            calls.append(Call(rest, keywords))
            if index == 0:
                activations.batches.append(hidden)
            elif hidden is not activations.batches[-1]:
                raise DassError(f"{type(model).__name__} computes between its blocks, which this walk does not see.")
            if not ran:  # whether blocks return tuples, and what else is in them, only a real run can tell
                output, ran = original(hidden, *rest, **keywords), True
                activations.tail = tuple(output[1:]) if isinstance(output, tuple | list) else None
            return activations.returned(hidden)

        return forward

    for batch in inputs:
        calls: list[Call] = []
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(replaced_forward(block.module, stub(index, calls)))
            model.base_model(input_ids=batch, use_cache=False)
        if len(calls) != len(blocks):
            raise DassError(
                f"The model runs {len(calls)} of the {len(blocks)} blocks that were found: check its config."
            )
        before = activations.calls[-1] if activations.calls else calls
        activations.calls.append(before if _alike(before, calls) else calls)
    return activations


def block_by_block(
    model: PreTrainedModel, blocks: list[Block], inputs: Sequence[Tensor], hold: Hold
) -> Iterator[AbstractContextManager[None]]:
    """Run all batches through one block after the other, so that each block is in memory once.

    Yields:
        For each batch a context in which the model's forward on it hands over what the blocks have given.
    """
    activations = Activations()
    for index, block in enumerate(blocks):
        with hold(block):
            if index == 0:
                activations = enter_first_block(model, blocks, inputs)
            for i, hidden in enumerate(activations.batches):
                activations.batches[i] = activations.calls[i][index](block, hidden)
    for i in range(len(activations.batches)):
        yield _handing_over(blocks, activations, i)


@contextmanager
def _handing_over(blocks: list[Block], activations: Activations, i: int) -> Iterator[None]:
    """No block computes: whatever enters the first, the last gives what is to be known of batch `i`."""

    def hand_over(*_: Any, **__: Any) -> Any:
        return activations.returned(activations.batches[i])

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.module, hand_over))
        yield


def _alike(one: list[Call], other: list[Call]) -> bool:
    """Whether the calls of two batches hold the same values; the host waits for the device once."""
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    if not _built_alike(one, other, pairs):
        return False
    equal = [(a == b).all() for a, b in pairs.values()]
    return not equal or bool(torch.stack([answer.to(equal[0].device) for answer in equal]).all())


def _may_change(value: Any) -> bool:
    """Whether an argument is more than a tensor, a number, a word, or several of them."""
    if isinstance(value, Call):
        return _may_change([*value.arguments, *value.keywords.values()])
    if isinstance(value, list | tuple):
        return any(map(_may_change, value))
    return not (value is None or isinstance(value, Tensor | int | float | str))


def _built_alike(one: Any, other: Any, pairs: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> bool:
    """Whether two calls (or arguments of calls) differ at most in the values of tensors.

    Those are put into `pairs`, each once however many blocks share them. Objects that may change are never alike.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        pairs[id(one), id(other)] = one, other
        return True
    if isinstance(one, Call):
        return _built_alike(one.arguments, other.arguments, pairs) and _built_alike(one.keywords, other.keywords, pairs)
    if type(one) is dict:
        return one.keys() == other.keys() and all(_built_alike(value, other[key], pairs) for key, value in one.items())
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(_built_alike(a, b, pairs) for a, b in zip(one, other, strict=True))
    return isinstance(one, int | float | str) and bool(one == other)
