"""Choose between methods by the error of the whole MLP: no rule in advance tells which one suits a unit."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.method import Method
from dass.pruning.mlp import reconstructed
from dass.pruning.outputs import Outputs, squared_error
from dass.pruning.pruner import BlockPruner, Needs, Pruned
from dass.pruning.statistics import Streams
from dass.pruning.update import UPDATES


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
        shared = {(p.targets, p.exclude, p.method.pattern, p.method.order) for p in self.candidates.values()}
        updates = {p.method.update for p in self.candidates.values()}
        if len(shared) > 1:  # who prunes less would win
            raise DassError("The candidates differ in their targets, exclude, pattern or order: give all the same.")
        if len(updates) > 1 and any(UPDATES.find(update).whole for update in updates):
            raise DassError("Some candidates train their MLPs and some do not: give all the same update.")

    @property
    def first(self) -> BlockPruner:
        """The first candidate."""
        return next(iter(self.candidates.values()))

    @property
    def targets(self) -> str:
        """The same for all candidates, see `BlockPruner`."""
        return self.first.targets

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that are pruned."""
        return self.first.projections(block)

    def storing(self, dtype: torch.dtype) -> "AdaptivePruner":
        """The same, whose weights will be rounded to `dtype`."""
        return replace(self, candidates={name: pruner.storing(dtype) for name, pruner in self.candidates.items()})

    @property
    def method(self) -> Method:
        """The first candidate's method: all have its pattern and order, and train their MLPs if it does."""
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
        if UPDATES.find(self.method.update).whole:  # of the winner alone: it takes its time
            masking = replace(self, candidates={name: one.masking() for name, one in self.candidates.items()})
            return reconstructed(self.method, self.first.stored, block, streams, outputs, masking.prune)
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
