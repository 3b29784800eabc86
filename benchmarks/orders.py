"""What an order of the neurons keeps of the scores, and how long it is looked for."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.table import row
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.order import ORDERS, Neurons, kept, seeded
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import walk

COMPARED = ("released", "random", "spread", "matched")


def order_row(model: PreTrainedModel, input_ids: Tensor, limit: float, detail: str) -> str:
    """Seconds of `matched` in all blocks for DaSS at 2:4, and the share of the scores that each order keeps."""
    pattern = NM(2, 4)
    pruner = BlockPruner(Method("dass", {"gate": "out", "up": "out", "down": "in"}, pattern))
    share, seconds, everything = dict.fromkeys(COMPARED, 0.0), dict.fromkeys(COMPARED, 0.0), 0.0
    for step in walk(model, input_ids, pruner.needs):
        for unit in step.block.units:
            scores = {role: pruner.scores(step.block, p, step.streams) for role, p in unit.projections.items()}
            lines = torch.cat([one if role == "down" else one.T for role, one in scores.items()])
            everything += lines.sum(dtype=torch.float64).item()
            norm = step.streams[unit.intermediate].norm
            for name in COMPARED:
                neurons = Neurons(lines.shape[1], pattern, seeded(0, unit.name), norm, lambda lines=lines: lines)  # type: ignore[misc]
                began = time.perf_counter()
                found = ORDERS[name].function(neurons)
                seconds[name] += time.perf_counter() - began
                share[name] += kept(lines, found, pattern)
        pruner.prune(step.block, step.streams)
    shares = ", ".join(f"{name} {share[name] / everything:.4f}" for name in COMPARED)
    return row(
        "dass: seconds of order=matched",
        seconds["matched"],
        "at most",
        limit,
        f"{detail}; kept of the scores: {shares}",
    )
