"""Watch the products of a block: which tensor meets which weights, whatever modules they are in.

A linear layer, a transposed one, one expert of a three-dimensional parameter: all end in a product of activations with
a view of a parameter. `Watch` sees each such call of torch while it is active, and knows the projections by the memory
that they cover.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dass.pruning.blocks import Block, Projection
from dass.pruning.stacks import Stack

PRODUCTS: dict[Any, tuple[str, ...]] = {
    linear: ("input", "weight"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), ("input", "weight")),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), ("input", "weight")),
}
"""The arguments of torch's products, in order."""

OnProduct = Callable[[Projection, Tensor, Tensor], None]
"""Called with each projection that a product covers, the tensor that the product reads, and of it what the projection
reads, `(..., in_features)`."""


class Stop(Exception):
    """Ends a forward, once all that is to be seen of it has been seen."""


@dataclass(frozen=True)
class Extent:
    """The memory that a tensor covers: which storage, and from which element of it up to which."""

    storage: int
    start: int
    stop: int

    def covers(self, other: "Extent") -> bool:
        """Whether another one lies inside."""
        return self.storage == other.storage and self.start <= other.start and other.stop <= self.stop


def extent_of(tensor: Tensor) -> Extent:
    """The memory that a tensor covers."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.storage_offset()
    return Extent(tensor.untyped_storage()._cdata, start, start + length)


class Watch(TorchFunctionMode):
    """While active, reports the products with the projections of a block, and leaves those with a stacked down out.

    Of a stack of experts nothing behind its down projections is to be seen, so their product is a tensor of NaN: what
    reads it all the same is told by its statistics. Other MLPs may stand before what is to be seen, and compute.
    """

    def __init__(self, block: Block, on_product: OnProduct, through: int | None = None) -> None:
        """`through`: if given, every routed token runs through this expert, whatever the router says."""
        super().__init__()
        self.on_product, self.through = on_product, through
        self.readers: dict[int, list[tuple[Extent, Projection]]] = {}
        self.one_by_one: dict[Stack, list[Projection]] = {}
        for p in block.projections:
            if isinstance(p.parameter, Stack):
                self.one_by_one.setdefault(p.parameter, []).append(p)
                continue
            extent = extent_of(p.weight)
            self.readers.setdefault(extent.storage, []).append((extent, p))
        experts = {p.module for p in block.projections if p.expert is not None}
        count = {p.parameter.shape[0] for p in block.projections if p.expert is not None}
        self.stacks = {extent_of(q).storage: q for q in _parameters(experts) if q.ndim > 1 and q.shape[0] in count}

    def __enter__(self) -> Any:
        """Begin to see."""
        for stack in self.one_by_one:
            stack.through = self.through
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """See nothing any more."""
        super().__exit__(*error)
        for stack in self.one_by_one:
            stack.through = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See every call of torch."""
        kwargs = kwargs or {}
        if self.through is not None:
            args, kwargs = tree_map_only(Tensor, self._instead, (args, kwargs))
        names = PRODUCTS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        x, weight = given.get("input"), given.get("weight", given.get("other", given.get("mat2")))
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor | Stack):
            return func(*args, **kwargs)
        left_out = False
        for p in self._covered(weight):
            if x.ndim == 3 and weight.ndim == 3:  # all experts at once
                for part in x if self.through is not None else (x[p.expert],):
                    self.on_product(p, x, part[(part != 0).any(-1)])  # zeros: went elsewhere; the host waits for them
            else:
                self.on_product(p, x, x)
            left_out = left_out or (p.role == "down" and p.expert is not None)
        if left_out:
            return x.new_full((*x.shape[:-1], weight.shape[-2 if func is linear else -1]), torch.nan)
        return func(*args, **kwargs)

    def _covered(self, weight: Tensor | Stack) -> Iterable[Projection]:
        if isinstance(weight, Stack):
            found = self.one_by_one[weight]
        else:
            extent = extent_of(weight)
            readers = self.readers.get(extent.storage) or self._at_hand(extent)
            found = [p for own, p in readers if extent.covers(own)]
        if weight.ndim == 3 and self.through is not None:
            return [p for p in found if p.expert == self.through]
        return found

    def _at_hand(self, extent: Extent) -> list[tuple[Extent, Projection]]:
        """The projections of the one expert in memory, where this is its memory."""
        for stack, projections in self.one_by_one.items():
            if stack.at_hand is not None and extent_of(stack.at_hand[1]).storage == extent.storage:
                return [(extent_of(p.weight), p) for p in projections if p.expert == stack.at_hand[0]]
        return []

    def _instead(self, tensor: Tensor) -> Tensor:
        """The part of the one expert in place of the same part of any other."""
        extent = extent_of(tensor) if tensor.numel() else None
        stack = self.stacks.get(extent.storage) if extent else None
        if extent is None or stack is None or self.through is None:
            return tensor
        if tensor.ndim == stack.ndim and len(tensor) == len(stack):  # all of them
            return tensor[self.through].expand(tensor.shape)
        one = stack.stride(0)
        first, last = ((place - stack.storage_offset()) // one for place in (extent.start, extent.stop - 1))
        if first != last:
            return tensor
        offset = tensor.storage_offset() + (self.through - first) * one
        return torch.as_strided(stack.detach(), tensor.shape, tensor.stride(), offset)


def _parameters(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    return (parameter for module in modules for parameter in module.parameters())
