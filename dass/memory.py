"""Where the memory of a device does not suffice for a batch: its half is tried, down to a single sequence."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from dass.errors import DassError

Result = TypeVar("Result")
Halved = Callable[[int], None]
"""Told of the size of the batches from now on."""


def note_halved(size: int) -> None:
    """Say it."""
    print(f"note: the memory of the device does not suffice: goes on with batches of {size}", file=sys.stderr)


def attempted(work: Callable[[], Result]) -> Result | None:
    """What some work on a batch gives; None where the memory of the device does not suffice for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # with it goes the traceback, and all that the attempt had made
    torch.cuda.empty_cache()
    return None


def half(size: int, halved: Halved) -> int:
    """The larger half of a batch, which is told; DassError where it cannot be smaller."""
    if size < 2:
        raise DassError(
            "The memory of the device does not suffice even for one sequence at a time: keep the model on disk "
            "(memory=stream), shorten the sequences (seq_len), or use a larger GPU.",
            field="memory",
        )
    smaller = -(-size // 2)
    halved(smaller)
    return smaller
