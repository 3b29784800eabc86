"""How a model calls its blocks, and what enters the first: recorded in one run of the model with stubs for blocks."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.blocks import Block


@dataclass(frozen=True)
class Call:
    """How the model calls one block, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block on hidden states `(batch, seq_len, d)`."""
        output = block.module(hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple | list) else output


@dataclass
class Activations:
    """What enters the current block."""

    batches: list[Tensor] = field(default_factory=list)
    """Hidden states, `(batch, seq_len, d)` each, in the model's dtype."""
    calls: list[list[Call]] = field(default_factory=list)
    """For each batch, the call of every block; batches that the model calls alike share them."""


def enter_first_block(model: PreTrainedModel, blocks: list[Block], input_ids: Tensor, batch_size: int) -> Activations:
    """Embed all sequences and record how the model calls each block; only the first block runs, once.

    In place of the others stands a stub that hands its input on, so this costs next to nothing.

    Args:
        input_ids: `(n_sequences, seq_len)` int64.
    """
    activations = Activations()
    tail: tuple[Any, ...] | None = None
    wraps = False

    def stub(index: int, calls: list[Call]) -> Callable[..., Any]:
        original = blocks[index].module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            nonlocal tail, wraps
            hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
            calls.append(Call(rest, keywords))
            if index == 0:
                activations.batches.append(hidden)
            if tail is None:  # whether blocks return tuples, and what else is in them, only a real run can tell
                output = original(hidden, *rest, **keywords)
                wraps = isinstance(output, tuple | list)
                tail = tuple(output[1:]) if wraps else ()
            return (hidden, *tail) if wraps else hidden

        return forward

    for batch in input_ids.split(batch_size):
        calls: list[Call] = []
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(replaced_forward(block.module, stub(index, calls)))
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
        if len(calls) != len(blocks):
            raise DassError(
                f"The model runs {len(calls)} of the {len(blocks)} blocks that were found: check its config."
            )
        alike = (earlier for earlier in reversed(activations.calls) if _alike(earlier, calls))
        activations.calls.append(next(alike, calls))
    return activations


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls (or arguments of calls) hold the same values; objects that may change hold none."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Call):
        return _alike(one.arguments, other.arguments) and _alike(one.keywords, other.keywords)
    if type(one) is dict:
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, int | float | str) and bool(one == other)
