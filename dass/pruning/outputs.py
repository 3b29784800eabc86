"""What a block gives with its weights as they are, and how far that is from what it gave before."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from dass.distributed import everyone
from dass.pruning.blocks import Block


class Outputs(Protocol):
    """Runs a block with its weights as they are."""

    def __call__(self, share: float = 1.0, sequences: range | None = None) -> Iterator[Tensor]:
        """Its outputs batch by batch, in the dtype that its MLPs have by now.

        Args:
            share: of the calibration sequences, the first ones.
            sequences: which of them, instead of a share.
        """


def squared_error(dense: list[Tensor], outputs: Iterable[Tensor]) -> float:
    """||Y' - Y||^2 over the outputs of a block; infinite where it is no number, so that no candidate wins by that.

    The batches of Y' may be smaller than those of Y, where the memory of the device did not suffice. Summed over the
    processes of a run, of which some may have no outputs.
    """
    parts, left = [], list(dense)
    for one in outputs:
        whole = left.pop(0)
        left[:0] = [whole[len(one) :]] if len(one) < len(whole) else []
        parts.append((one.float() - whole[: len(one)].float()).square().sum())
    error = float(torch.stack(parts).sum().nan_to_num(nan=math.inf, posinf=math.inf)) if parts else 0.0
    return sum(everyone(error))


def added(block: Block, dense: list[Tensor], outputs: Callable[[], Iterable[Tensor]]) -> float:
    """||Y - Y_0||^2 of the outputs of a block, Y_0 without what its MLPs write."""
    last = [unit.projections["down"] for unit in block.units]
    written = [part for p in last for part in (p.weight, p.bias) if part is not None]
    before = [part.clone() for part in written]
    try:
        for part in written:
            part.zero_()
        return squared_error(dense, outputs())
    finally:
        for part, values in zip(written, before, strict=True):
            part.copy_(values)
