"""Neuron order: in which order the neurons of an MLP stand when N:M groups are cut.

Rows of gate and up and columns of down, permuted together, leave the dense function as it is, but decide which weights
compete: those of down along the inputs, those of gate and up along the outputs. Add an order by decorating a function
with `@order`, and name it in `method.order`; nothing else. It returns a permutation: neuron i is to be the released
neuron `permutation[i]`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.masks import NM, Pattern
from dass.pruning.registry import Registry

ROUNDS = 12
"""Assignments of one member of each group, at most; each costs as much as any other and gains less."""

TILE = 2**18
"""Numbers that are worked on at once: so many stay in the cache of a processor."""

ORDERS = Registry("order", leading=1)
order = ORDERS.register


@dataclass(frozen=True)
class Neurons:
    """What an order may look at: the f neurons of one MLP, in the released order."""

    count: int
    """f."""
    pattern: Pattern
    generator: torch.Generator
    """Seeded by `order_seed` and the unit's name."""
    norm: Callable[[], Tensor]
    """Gives n_i = ||h_i||_2, `(f,)`; only where an order declares `intermediate_norm`."""
    scores: Callable[[], Tensor]
    """Gives the method's scores of all weights that compete with those of other neurons, `(lines, f)`: the rows of down
    where its axis is `in`, the columns of gate and up where theirs is `out`."""

    @property
    def nm(self) -> NM:
        """The pattern; DassError where no groups are cut."""
        if not isinstance(self.pattern, NM):
            raise DassError(
                f"This order fits groups of N:M, and {self.pattern} has none: use order=released.", "method.order"
            )
        return self.pattern


@order()
def released(neurons: Neurons) -> Tensor:
    """As the model was released."""
    return torch.arange(neurons.count)


@order()
def random(neurons: Neurons) -> Tensor:
    """One of the f! orders at random."""
    return torch.randperm(neurons.count, generator=neurons.generator)


@order("intermediate_norm")
def spread(neurons: Neurons) -> Tensor:
    """Sorted by n and dealt out, so that each group of M holds one of each M-th part."""
    by_norm = neurons.norm().argsort(descending=True, stable=True).cpu()
    return by_norm.view(neurons.nm.m, -1).T.reshape(-1)


@order("intermediate_norm")
def matched(neurons: Neurons) -> Tensor:
    """The order that keeps most of the scores that it can find: an assignment of one member of each group at a time.

    A group without one member keeps t, its N-th largest, in each line; with x in that place it keeps max(x - t, 0)
    more. So the best places for the members that were taken out are an assignment problem, which never loses (RIA,
    ICLR 2024, does so for columns).
    """
    pattern, found = neurons.nm, spread(neurons)
    scores = neurons.scores()
    if pattern.n == pattern.m or not len(scores):
        return found
    groups = found.view(-1, pattern.m)  # (groups, M)
    by_neuron = scores.T.contiguous()  # (f, lines)
    everyone, most = torch.arange(len(groups)), kept(by_neuron.T, groups, pattern)
    gain = scores.new_empty(len(groups), len(groups))
    more = scores.new_empty(max(1, TILE // len(scores)), len(scores))
    for _ in range(ROUNDS):
        out = torch.randint(pattern.m, (len(groups),), generator=neurons.generator)
        rest = groups[torch.arange(pattern.m) != out[:, None]].view(-1, pattern.m - 1)
        t = largest(by_neuron[rest.T.to(scores.device)], pattern.n)[-1]  # (groups, lines)
        x = by_neuron[groups[everyone, out].to(scores.device)]  # (groups, lines)
        for some, gains in zip(t.split(len(more)), gain.split(len(more), 1), strict=True):
            for row, one in zip(gains, x, strict=True):  # in place: room that is freed in between is not found again
                torch.sum(torch.sub(one, some, out=more[: len(some)]).relu_(), 1, out=row)
        place = torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])
        better = groups.clone()
        better[place, out[place]] = groups[everyone, out]
        if (now := kept(by_neuron.T, better, pattern)) > most:
            groups, most = better, now
    return groups.reshape(-1)


def kept(scores: Tensor, order: Tensor, pattern: NM) -> float:
    """The sum of the scores `(lines, f)` that survive N:M in this order of the neurons."""
    members = scores.T[order.reshape(-1, pattern.m).T.to(scores.device)]  # (M, groups, lines)
    return sum(one.sum(dtype=torch.float64).item() for one in largest(members, pattern.n))


def largest(members: Tensor, n: int) -> list[Tensor]:
    """The n largest of M numbers at each place, from the largest on; they rise like bubbles, and the rest is changed.

    Args:
        members: `(M, ...)`.
    """
    rows, spare = list(members.unbind()), torch.empty_like(members[0])
    for done in range(n):
        for i in range(len(rows) - 1, done, -1):
            torch.maximum(rows[i - 1], rows[i], out=spare)
            torch.minimum(rows[i - 1], rows[i], out=rows[i])
            rows[i - 1], spare = spare, rows[i - 1]
    return rows[:n]


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each unit."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


@torch.no_grad()
def reorder(block: Block, unit: Unit, permutation: Tensor) -> None:
    """Permute the neurons of an MLP in place: rows of gate and up and their biases, columns of down.

    Args:
        permutation: `(f,)`; neuron i becomes what neuron `permutation[i]` was.

    Raises:
        DassError: the MLP has other parameters with one value for each neuron.
    """
    _require_no_others(block, unit)
    for p in unit.projections.values():
        move(p, permutation)


@torch.no_grad()
def move(p: Projection, permutation: Tensor) -> None:
    """Permute what a projection writes (gate, up, v, qkv: rows and biases) or reads (down, o: columns), in place."""
    at = permutation.to(p.weight.device)
    if p.role in ("down", "o"):
        p.weight.copy_(p.weight[:, at])
        return
    p.weight.copy_(p.weight[at])
    if p.bias is not None:
        p.bias.copy_(p.bias[at])


def _require_no_others(block: Block, unit: Unit) -> None:
    """Refuse what would not be permuted along, such as a norm between activation and down."""
    down = unit.projections["down"]
    biases = [p.bias for p in unit.projections.values()]
    known = {bias.untyped_storage().data_ptr() for bias in biases if bias is not None}
    place = unit.name.removeprefix(block.name).removeprefix(".")
    path = place if down.expert is None else place.rpartition(".")[0]
    for name, parameter in block.module.get_submodule(path).named_parameters():
        f, d = down.weight.shape[1], down.weight.shape[0]
        if parameter.shape == (f,) and f != d and parameter.untyped_storage().data_ptr() not in known:
            raise DassError(
                f"The neurons of {unit.name} cannot be put in another order: {name} holds one value for each of them; "
                f"use order=released.",
                field="method.order",
            )
