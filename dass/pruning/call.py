"""How a model calls one block, and whether it calls blocks alike for two batches."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dass.errors import DassError
from dass.pruning.blocks import Block


class HandedOn:
    """Stands for what a block returned beside the hidden states, while blocks are not run one behind the other.

    Models hand it to the next block or collect it, whether or not anybody reads it. Who does is told.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """A product, a sum or whatever else of it and tensors."""
        raise _handed_on()

    def __getattr__(self, name: str) -> Any:
        """Its shape, its device and so on."""
        raise _handed_on()

    def __iter__(self) -> Any:
        """Its parts."""
        raise _handed_on()


HANDED_ON = HandedOn()
"""The only one, so that calls of blocks are alike that hold it."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block on hidden states `(batch, seq_len, d)`, on the device where its weights are."""
        to_block = partial(Tensor.to, device=next(p.device for p in block.module.parameters() if not p.is_meta))
        arguments, keywords = tree_map_only(Tensor, to_block, (self.arguments, self.keywords))
        output = block.module(to_block(hidden), *arguments, **keywords)
        return output[0] if isinstance(output, tuple | list) else output

    def in_dtype(self, dtype: torch.dtype) -> "Call":
        """The same with its floating-point tensors in another dtype; itself where they are in this one."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        arguments, keywords = tree_map_only(Tensor, cast, (self.arguments, self.keywords))
        return Call(arguments, keywords)


def alike(one: list[Call], other: list[Call]) -> bool:
    """Whether the calls of two batches hold the same values; the host waits for the device once."""
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    if not _built_alike(one, other, pairs):
        return False
    equal = [(a == b).all() for a, b in pairs.values()]
    return not equal or bool(torch.stack([answer.to(equal[0].device) for answer in equal]).all())


def may_change(value: Any) -> bool:
    """Whether an argument is more than a tensor, a number, a word, or several of them."""
    if isinstance(value, Call):
        return may_change([*value.arguments, *value.keywords.values()])
    if isinstance(value, list | tuple):
        return any(map(may_change, value))
    return not (value is None or isinstance(value, Tensor | int | float | str | HandedOn))


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


def _handed_on() -> DassError:
    return DassError(
        "This model hands state from block to block beside the hidden states, so that no block can run by itself: use "
        "another model (magnitude, and an evaluation with memory=resident, run none by itself)."
    )
