"""The neurons of a block, put in a method's order before masks are chosen: of MLPs, and inside attention's heads."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.order import ORDERS, Neurons, heads_of, move, reorder, seeded
from dass.pruning.statistics import Streams

Scores = Callable[[Projection], Tensor]
"""The importance of each weight of a projection, `(out_features, in_features)`, by its method's criterion."""


@torch.no_grad()
def put_in_order(
    block: Block, method: Method, projections: list[Projection], streams: Streams, scores: Scores
) -> dict[str, Tensor]:
    """Permute the neurons of each MLP in place, with what is known of them, and heads where the order is `matched`.

    Args:
        projections: those of the block that are pruned.

    Returns:
        By the name of each projection that was permuted: what stands at place i now stood at `permutation[i]`; `(f,)`
        of an MLP, of v the rows and of o the columns.

    Raises:
        DassError: an MLP has other parameters with one value for each neuron.
    """
    orders: dict[str, Tensor] = {}
    for unit in block.units if method.order != "released" else ():
        own = [p for p in projections if block.unit_of(p) is unit]
        permutation = _neurons(block, unit, method, own, streams, scores)
        orders |= {p.name: permutation for p in unit.projections.values()}
    return orders | _heads(block, method, {p.role: p for p in projections}, streams, scores)


def _neurons(
    block: Block, unit: Unit, method: Method, own: list[Projection], streams: Streams, scores: Scores
) -> Tensor:
    """Put the neurons of an MLP in the method's order; the permutation, `(f,)`."""
    seen, count = streams.get(unit.intermediate), unit.projections["down"].weight.shape[1]

    def competing() -> Tensor:
        lines = [_lines(p, method, scores) for p in own]
        return torch.cat([torch.empty(0, count, device=own[0].weight.device), *lines]) if own else torch.empty(0)

    norm = seen.norm if seen else lambda: torch.empty(0)
    neurons = Neurons(count, method.pattern, seeded(method.order_seed, unit.name), norm, competing)
    permutation: Tensor = ORDERS.find(method.order).function(neurons)
    reorder(block, unit, permutation)
    if seen:
        seen.reorder(permutation)
    return permutation


def _heads(
    block: Block, method: Method, chosen: dict[str, Projection], streams: Streams, scores: Scores
) -> dict[str, Tensor]:
    """Put what each head of v writes, and o reads, in a matched order; the permutations by projection."""
    if method.order != "matched" or not isinstance(method.pattern, NM) or not {"v", "o"} <= set(chosen):
        return {}
    v, o, norm = chosen["v"], chosen["o"], streams[chosen["o"].reads].norm()
    lines = {role: _lines(chosen[role], method, scores) for role in "vo"}
    at = {role: torch.arange(lines[role].shape[1]) for role in "vo"}
    for rows, columns in heads_of(block, method.pattern.m):
        own = [lines["v"][:, rows], *(lines["o"][:, one] for one in columns)]
        seed = seeded(method.order_seed, f"{v.name} {rows[0]}")
        together = partial(torch.Tensor.sum, norm[columns], 0)
        neurons = Neurons(len(rows), method.pattern, seed, together, partial(torch.cat, own))
        found = ORDERS.find(method.order).function(neurons)
        at["v"][rows], at["o"][columns] = rows[found], columns[:, found]
    move(v, at["v"])
    move(o, at["o"])
    streams[o.reads].reorder(at["o"])
    return {v.name: at["v"], o.name: at["o"]}


def _lines(p: Projection, method: Method, scores: Scores) -> Tensor:
    """The scores of a projection in which weights of several neurons compete, `(lines, neurons)`; perhaps none."""
    reads_them = p.role in ("down", "o")
    axis = method.axis_for(p.role)
    if axis != "both" and (axis == "out") == reads_them:
        return p.weight.new_empty(0, p.weight.shape[1 if reads_them else 0], dtype=torch.float32)
    found = scores(p)
    return found if reads_them else found.T
