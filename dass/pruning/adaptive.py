"""Choose between methods by the error of the whole MLP: no rule in advance tells which one suits a unit."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dass.distributed import everyone
from dass.errors import DassError
from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner, Needs, Pruned
from dass.pruning.statistics import Streams

Outputs = Callable[[float], Iterator[Tensor]]
"""Runs a block with its weights as they are on this share of its sequences; gives its outputs batch by batch."""


@dataclass(frozen=True)
class AdaptivePruner:
    """Each MLP unit is pruned by the candidate that changes the output of its block least."""

    candidates: Mapping[str, BlockPruner]
    """By name; attention, where it is a target, is pruned by the first."""
    share: float = 0.25
    """Of the calibration sequences that errors are measured on."""

    def __post_init__(self) -> None:
        """Refuse a choice that is none."""
        if len(self.candidates) < 2:
            raise DassError("adaptive needs at least two candidates: name them.", field="method.candidates")
        if not 0 < self.share <= 1:
            raise DassError(f"share={self.share} must be above 0 and at most 1.", field="method.share")
        shared = {(p.targets, p.method.pattern, p.method.order, p.method.update) for p in self.candidates.values()}
        if len(shared) > 1:
            raise DassError("The candidates differ in their targets, pattern, order or update: give all the same.")

    @property
    def first(self) -> BlockPruner:
        """The first candidate."""
        return next(iter(self.candidates.values()))

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that are pruned."""
        return self.first.projections(block)

    def storing(self, dtype: torch.dtype) -> "AdaptivePruner":
        """The same, whose weights will be rounded to `dtype`."""
        return replace(self, candidates={name: pruner.storing(dtype) for name, pruner in self.candidates.items()})

    @property
    def method(self) -> Method:
        """The first candidate's method: all have its pattern, order and update."""
        return self.first.method

    def check(self, blocks: list[Block]) -> None:
        """Refuse a pattern that does not fit a layer, see `BlockPruner.check`."""
        for pruner in self.candidates.values():
            pruner.check(blocks)

    def needs(self, block: Block) -> Needs:
        """What the candidates must see in this block; the input of each unit at least, so that the block is run."""
        found: Needs = {unit.projections["up"].reads: False for unit in block.units}
        for pruner in self.candidates.values():
            for reads, with_hessian in pruner.needs(block).items():
                found[reads] = found.get(reads, False) or with_hessian
        return found

    @torch.no_grad()
    def prune(self, block: Block, streams: Streams, outputs: Outputs) -> list[Pruned]:
        """Prune a block, unit by unit, the others of the block dense while one is judged.

        Args:
            outputs: see `Step`.

        Raises:
            DassError: what `BlockPruner.prune` raises.
        """
        dense = list(outputs(self.share))
        best: dict[str, tuple[float, dict[str, Tensor], list[Pruned]]] = {}
        for unit in block.units:
            alone, before = replace(block, units=(unit,), attention={}), _weights(unit)
            for name, candidate in self.candidates.items():
                pruner = replace(candidate, targets="mlp")
                if not pruner.projections(alone):
                    continue
                pruned = pruner.prune(alone, {reads: copy.copy(stream) for reads, stream in streams.items()})
                error = squared_error(dense, outputs(self.share))
                if unit.name not in best or error < best[unit.name][0]:
                    best[unit.name] = error, _weights(unit), [replace(one, chosen=name) for one in pruned]
                _put(unit, before)
        pruned = []
        for unit in block.units:
            if unit.name in best:
                _put(unit, best[unit.name][1])
                pruned += best[unit.name][2]
        rest = replace(block, units=())
        return pruned + (self.first.prune(rest, streams) if self.first.projections(rest) else [])


def squared_error(dense: list[Tensor], outputs: Iterator[Tensor]) -> float:
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


def _weights(unit: Unit) -> dict[str, Tensor]:
    """Copies of what pruning changes in an MLP: its matrices, and where neurons change places their biases."""
    found = {}
    for role, p in unit.projections.items():
        found[role] = p.weight.clone()
        if p.bias is not None:
            found[f"{role} bias"] = p.bias.clone()
    return found


def _put(unit: Unit, weights: dict[str, Tensor]) -> None:
    """Write such copies back."""
    for role, p in unit.projections.items():
        p.weight.copy_(weights[role])
        if p.bias is not None:
            p.bias.copy_(weights[f"{role} bias"])
