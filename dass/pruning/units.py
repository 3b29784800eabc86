"""What each MLP of a block reads and writes by itself: what tells the experts of one block apart."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dass.distributed import everyone
from dass.pruning.adaptive import Outputs, squared_error
from dass.pruning.blocks import Block, Projection
from dass.pruning.products import Watch
from dass.pruning.statistics import Streams


@dataclass(frozen=True)
class Expert:
    """One of the MLPs that a router chooses from."""

    block: str
    index: int
    tokens: int
    """Calibration tokens that were routed to it."""
    errors: dict[str, float | None]
    """By method, ||Y' - Y||^2 / ||Y||^2 of what it writes for its tokens, all its projections pruned."""


@dataclass(frozen=True)
class Written:
    """What the experts of a block wrote, and what all of its MLPs read."""

    outputs: dict[str, Tensor]
    """By expert, `(its tokens, out_features)`, without a bias; one that saw no token is absent. Of several processes
    each has those of its own sequences."""
    zeros: float
    """The share of exact zeros in what the down projections read, the intermediate activations; of all processes."""


@torch.no_grad()
def written(block: Block, outputs: Outputs, share: float) -> Written:
    """What the experts of a block write with their weights as they are, for this share of the calibration sequences."""
    parts: dict[str, list[Tensor]] = {}
    zeros = read = 0

    def keep(p: Projection, _: Tensor, x: Tensor) -> None:
        nonlocal zeros, read
        unit = block.unit_of(p)
        if unit is None or p.role != "down" or not x.numel():
            return
        zeros, read = zeros + int((x == 0).sum()), read + x.numel()
        if unit.routed:
            parts.setdefault(unit.name, []).append(x.flatten(0, -2) @ p.weight.T)

    with Watch(block, keep):
        for _ in outputs(share):
            pass
    zeros, read = map(sum, zip(*everyone((zeros, read)), strict=True))
    return Written({name: torch.cat(own) for name, own in parts.items()}, zeros / max(read, 1))


def experts_of(
    block: Block, dense: Written, pruned: Mapping[str, Written], streams: Streams, rare: Mapping[str, int]
) -> list[Expert]:
    """How each method changes what each expert writes; nothing of blocks without a router.

    Args:
        pruned: by method.
        rare: experts that saw too few tokens, and how many they saw.
    """
    nothing, found = torch.zeros(1), []
    for index, unit in enumerate(unit for unit in block.units if unit.routed):
        seen = rare.get(unit.name, streams[unit.intermediate].n_tokens)
        whole = dense.outputs.get(unit.name, nothing)
        energy = sum(everyone(whole.float().square().sum().item()))
        errors = {
            method: squared_error([whole], iter([theirs.outputs.get(unit.name, nothing)])) / energy if energy else None
            for method, theirs in pruned.items()
        }
        found.append(Expert(block.name, index, seen, errors))
    return found
