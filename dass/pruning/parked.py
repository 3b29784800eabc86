"""Where activations lie between two blocks: on the device, in host memory, or in mapped files: the first with room."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dass.errors import told
from dass.models import free_memory

SHARE = 3
"""One in so many free bytes is for what enters a block, and one for what its mixer gives; the rest is for the block."""


SLAB = 2**26
"""Bytes of host memory that are asked for at once: so many come from beside the heap, which scattered pieces bloat."""


class Parked:
    """A list of one value for each batch, a tensor or a tuple of them; what is taken out is on the device."""

    def __init__(self, device: torch.device, folder: Path | None = None, values: Iterable[Any] = ()) -> None:
        """`folder`: takes the files, may be made; None: what has no room elsewhere is in host memory all the same."""
        self.device, self.folder = device, folder
        places = dict.fromkeys((device, torch.device("cpu")))
        self.room = {place: free_memory(place) // SHARE for place in places}
        self._values: list[Any] = []
        self._places: list[torch.device | None] = []  # None: a file
        self._slab = torch.empty(0, dtype=torch.uint8)  # what is left of it
        for value in values:
            self.append(value)

    @property
    def shapes(self) -> list[torch.Size]:
        """Of each value, a tensor, which is not brought to the device for it."""
        return [value.shape for value in self._values]

    def beside(self, values: Iterable[Any]) -> "Parked":
        """Another list, of what is kept besides."""
        return Parked(self.device, self.folder, values)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        """Batch by batch."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Any:
        """The value of a batch."""
        if self._places[i] == self.device:
            return self._values[i]
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), self._values[i])

    def __setitem__(self, i: int, value: Any) -> None:
        """Put another value in the place of one; in the same memory, where it fits and is nobody else's."""
        old, place = self._values[i], self._places[i]
        if (place is None or place.type == "cpu") and _kinds_of(old) == _kinds_of(value):
            tree_map(lambda kept, new: kept.copy_(new) if isinstance(kept, Tensor) else new, old, value)
            return
        if place is not None:
            self.room[place] += _bytes_of(old)
        del old
        self._values[i] = None
        self._values[i], self._places[i] = self._put(value)

    def clear(self) -> None:
        """Give all of them up."""
        for i in range(len(self)):
            self[i] = None
        self._values, self._places = [], []

    def cut(self, start: int, size: int) -> None:
        """Put in the place of each value, a tensor, from one on its parts of so many sequences."""
        whole = [self[i] for i in range(start, len(self))]
        for i in range(start, len(self)):
            self[i] = None
        del self._values[start:], self._places[start:]
        for part in (part for value in whole for part in value.split(size)):
            self.append(part)

    def append(self, value: Any) -> None:
        """Add the value of another batch."""
        kept, place = self._put(value)
        self._values.append(kept)
        self._places.append(place)

    def _put(self, value: Any) -> tuple[Any, torch.device | None]:
        size = _bytes_of(value)
        place = next((place for place, free in self.room.items() if size <= free), None)
        if place is None and self.folder is not None:
            return tree_map_only(Tensor, self._mapped, value), None
        place = place or torch.device("cpu")
        self.room[place] -= size
        return value if place.type != "cpu" else tree_map_only(Tensor, self._carved, value), place

    def _carved(self, tensor: Tensor) -> Tensor:
        """A copy in a slab."""
        size = -(-tensor.nbytes // 64) * 64
        if size > len(self._slab):
            self._slab = torch.empty(max(size, SLAB), dtype=torch.uint8)
        own, self._slab = self._slab[: tensor.nbytes], self._slab[size:]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy in a file without a name, so that it goes with the tensor, and however the process ends."""
        assert self.folder is not None
        with told(f"Cannot keep activations in {self.folder}", "free space or choose another folder", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="activations-") as file:
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is told here; later it kills
                kept = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return kept.view(tensor.shape).copy_(tensor)


def _kinds_of(value: Any) -> Any:
    """What must be the same for a value to fit into the memory of another."""
    return tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), value)


def _bytes_of(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
