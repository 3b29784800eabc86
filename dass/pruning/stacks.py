"""The experts of one parameter, one at a time in memory: where a block does not fit.

A `Stack` stands in a module in the place of a parameter of three dimensions. It gives an expert when it is indexed, as
the forward of experts does one by one; products with all of them are made one after the other.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dass.errors import DassError, told


class Stack:
    """Experts that lie on disk; the one that was asked for last is in memory, and the next one is read meanwhile."""

    def __init__(
        self, like: Tensor, device: torch.device, read: Callable[[int], Tensor], folder: Path, reader: Executor
    ) -> None:
        """Read nothing yet.

        Args:
            like: a parameter `(experts, ...)` without memory.
            read: gives an expert on the device, as it lies on disk.
            folder: takes a file, which goes with the stack, for experts that are changed.
            reader: of one thread, in which all is read and written.
        """
        self.shape, self.ndim, self.dtype, self.device = like.shape, like.ndim, like.dtype, device
        self.through: int | None = None
        """If given, it stands for every other expert."""
        self.at_hand: tuple[int, Tensor] | None = None
        """The expert that is in memory, and its index."""
        self._read, self._folder, self._reader = read, folder, reader
        self._version = 0
        self._next: tuple[int, Future[Tensor]] | None = None
        self._file: IO[bytes] | None = None
        self._changed: set[int] = set()

    def __len__(self) -> int:
        """The number of experts."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """One expert after the other."""
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """One expert on the device; what is written into it stays, whatever is asked for next."""
        if isinstance(index, slice | tuple) or (isinstance(index, Tensor) and index.ndim):
            raise _several()
        expert = int(index) if self.through is None else self.through
        if self.at_hand is None or self.at_hand[0] != expert:
            self._put_back()
            if self._next is None or self._next[0] != expert:
                self._next = None  # and with it another one that was read ahead
                self._next = expert, self._reader.submit(self._brought, expert)
            self.at_hand = expert, self._next[1].result()
            self._next = None
            self._version = self.at_hand[1]._version
            if self.through is None and len(self) > 1:
                follower = (expert + 1) % len(self)
                self._next = follower, self._reader.submit(self._brought, follower)
        return self.at_hand[1]

    def detach(self) -> "Stack":
        """Itself: none of it has a history."""
        return self

    def transpose(self, *_: int) -> "Turned":
        """Each expert transposed."""
        return Turned(self)

    def close(self) -> None:
        """Give all of it up."""
        self.at_hand = self._next = None
        if self._file is not None:
            self._file.close()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        """A product of all experts at once, whose parts do not hang on each other, is made one by one."""
        x, stack, *_ = args
        if func is torch.bmm:
            return torch.cat([func(x[e : e + 1], stack[e][None]) for e in range(len(x))])
        if func is not torch._grouped_mm:
            raise _several()
        ends, result = kwargs["offs"], x.new_empty(len(x), stack.shape[-1])
        for e, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            if start < end:
                result[start:end] = func(x[start:end], stack[e][None], offs=ends.new_tensor([end - start]))
        return result

    def _put_back(self) -> None:
        """Give up the expert at hand; what was changed is kept."""
        if self.at_hand is None:
            return
        (expert, tensor), self.at_hand = self.at_hand, None
        if tensor._version != self._version:
            self._reader.submit(self._keep, expert, tensor).result()

    def _keep(self, expert: int, tensor: Tensor) -> None:
        with told(f"Cannot keep experts in {self._folder}", "free space or choose another folder", OSError):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (it is closed with the stack)
            self._file.seek(expert * tensor.nbytes)
            self._file.write(bytes_of(tensor))
            self._file.flush()
        self._changed.add(expert)

    def _brought(self, expert: int) -> Tensor:
        if self._file is None or expert not in self._changed:
            return self._read(expert)
        tensor = torch.empty(self.shape[1:], dtype=self.dtype)
        with told(f"Experts in {self._folder} cannot be read", "begin again", OSError):
            self._file.seek(expert * tensor.nbytes)
            self._file.readinto(bytes_of(tensor))  # type: ignore[attr-defined]
        return tensor.to(self.device)


class Turned:
    """A stack with each expert transposed."""

    def __init__(self, stack: Stack) -> None:
        """`stack`: reads the experts."""
        self.stack, self.dtype, self.device = stack, stack.dtype, stack.device
        self.shape = torch.Size([stack.shape[0], stack.shape[2], stack.shape[1]])

    def __getitem__(self, index: Any) -> Tensor:
        """One expert."""
        return self.stack[index].T

    __torch_function__ = Stack.__torch_function__


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor on the host (of a copy of it, where it lies elsewhere or scattered)."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _several() -> DassError:
    return DassError(
        "This model works with several experts of a block at once, so that they cannot be brought one by one: use a "
        "machine whose memory holds a block.",
        field="memory",
    )
