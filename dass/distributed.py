"""Several processes that do one run together, as `torchrun` starts them; where there is one, all of this does nothing.

Each holds the whole model and takes its share of the sequences. What they must agree on is told in meetings, to which
all come in the same order. One that fails says so in the next meeting, where the others raise `Elsewhere`: nobody waits
for what never comes. So what a meeting raises is only caught around a `together`, which all leave alike.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dass.errors import DassError, first_line, told

PATIENCE = timedelta(days=7)
"""The first process may wait for another run, download or save; one that is dead is noticed at once."""

T = TypeVar("T")
Items = TypeVar("Items", Tensor, list[Any])


class Elsewhere(DassError):
    """Another process failed, and with it what all were doing together."""

    is_known = True
    """As of any error that the others have been told of."""


def world() -> int:
    """How many processes do this run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; the first one writes, prints and decides."""
    return dist.get_rank() if world() > 1 else 0


def share_of(items: Items) -> Items:
    """Of sequences or batches those of this process: every K-th of K processes."""
    return items[rank() :: world()]


def everyone(value: T) -> list[T]:
    """A meeting: what each process gives, by rank."""
    return _meet(value) if world() > 1 else [value]


def first(work: Callable[[], T]) -> T:
    """What the first process does or finds out, for all."""
    return everyone(work() if rank() == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes ahead, so that the others find what it fetched."""
    if rank() > 0:
        everyone(None)
    yield
    if rank() == 0:
        everyone(None)


def all_reduce(tensor: Tensor) -> None:
    """Sum a tensor over the processes, in place; right behind a meeting, so that all are there."""
    if world() > 1:
        with _connected():
            dist.all_reduce(tensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Let tensors be those of the first process: where machines round differently, its choice holds."""
    if world() == 1:
        return
    everyone(None)
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        with _connected():
            dist.broadcast(whole, 0)
        if not tensor.is_contiguous():
            tensor.copy_(whole)


def gathered(batches: Iterable[Tensor]) -> list[Iterable[Tensor]]:
    """The batches of each process, by rank; for the first one alone."""
    if world() == 1:
        return [batches]
    found: list[Iterable[Tensor]] = []
    for owner, own in enumerate(everyone([(batch.shape, batch.dtype, batch.device.type) for batch in batches])):
        mine, brought = iter(batches), []
        for shape, dtype, device in own:
            batch = next(mine) if owner == rank() else torch.empty(shape, dtype=dtype, device=device)
            with _connected():
                dist.broadcast(batch, owner)
            if rank() == 0:
                brought.append(batch.cpu())
        if rank() == 0:
            found.append(brought)
    return found


@contextmanager
def _connected() -> Iterator[None]:
    """Tell in a sentence that another process died; the error's own words are of sockets."""
    try:
        yield
    except RuntimeError as error:
        raise Elsewhere("Another process of this run is gone: the same command goes on where it stopped.") from error


@contextmanager
def together() -> Iterator[None]:
    """What all processes do or none: where one fails, the others raise at its end at the latest."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "is_known"):
            _tell(error)
        raise
    everyone(None)


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that `torchrun` started, if it did: all but the first print nothing.

    They leave together, too, unless a signal stopped them; else `torchrun` would end those that have not yet said why.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with told("The processes of this run do not find each other", "check what torchrun was given", RuntimeError):
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        with ExitStack() as stack:
            if rank() > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    except (Exception, SystemExit) as end:
        if not (isinstance(end, SystemExit) and isinstance(end.code, int) and end.code > 128):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to one that has said why
            _tell(end)
        raise
    everyone(None)
    dist.destroy_process_group()


def _tell(error: BaseException) -> None:
    """Let the others know that this process fails."""
    why = str(error) if isinstance(error, DassError) else f"{type(error).__name__}: {first_line(error)}"
    if world() > 1:
        with suppress(Elsewhere):
            _meet(None, (why, getattr(error, "field", None)))
        error.is_known = True  # type: ignore[attr-defined]


def _meet(value: Any, failure: tuple[str, str | None] | None = None) -> list[Any]:
    """Tell all what this process gives, or why it fails; Elsewhere where any of them fails."""
    found: list[Any] = [None] * world()
    with _connected():
        dist.all_gather_object(found, (value, failure))
    for number, (_, failed) in enumerate(found, 1):
        if failed is not None:
            raise Elsewhere(f"Process {number} of {world()}: {failed[0]}", failed[1])
    return [given for given, _ in found]
