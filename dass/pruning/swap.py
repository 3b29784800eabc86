"""Exact exchanges of a pruned for a kept weight, chosen from the Gram matrix of the inputs (SparseSwaps, 2512.10922).

With R = W - W', what is pruned, the output error of a layer is E = sum over rows i of R_i H R_i^T, H = X^T X, and
G = R H. Pruning the kept W_ip changes it by a_ip = 2 W_ip G_ip + W_ip^2 H_pp, keeping the pruned W_kq by
b_kq = -2 W_kq G_kq + W_kq^2 H_qq, and both in one row (i = k) by a_ip + b_iq - 2 W_ip W_iq H_pq, exactly. The error is
a sum over rows, so that an exchange between two rows, as groups along the outputs need it, changes it by a_ip + b_kq,
and two exchanges in two rows by the sum of both: W_ip for W_iq with W_kq for W_kp, which leaves rows and columns of a
tile as many kept weights as they had, as N:M along both axes needs it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.masks import NM, Mask
from dass.pruning.statistics import Statistics
from dass.pruning.update import Rows, obs, update

CANDIDATES = 32
"""Of each row the cheapest weights to prune, and to keep, between which the best exchange is looked for where a group
is a whole row; where none of these gains anything, between all. So rows of up to twice as many are searched in full."""
PAIRS = 2**22
"""Of weights, that are looked at together."""
ISLANDS = 256
"""Rows, or groups of rows, that are worked on at a time: their numbers stay in the cache."""
ROUNDING = 32
"""An exchange must gain more than so many times the rounding of the error of its rows."""


@update("hessian", positive=("exchanges",))
def swap(group: list[Rows], statistics: Statistics, exchanges: int = 1000) -> list[tuple[Tensor, Mask]]:
    """Exchange W_ip for W_kq of its group where a_ip + b_kq (- 2 W_ip W_iq H_pq if i = k) is least, while it is < 0.

    exchanges: of each row, at most, in the mean over the rows that they join; as a rule there are far fewer.
    """
    hessian = statistics.hessian()
    result = []
    for rows in group:
        mask = exchanged(rows.weight, _fixed(rows), hessian.to(rows.weight.dtype), exchanges)
        result.append((rows.weight.masked_fill_(~mask.keep, 0), mask))
    return result


@update("hessian", positive=("exchanges", "damping"))
def swap_obs(
    group: list[Rows], statistics: Statistics, exchanges: int = 1000, damping: float = 0.01, clip: bool = False
) -> list[tuple[Tensor, Mask]]:
    """`swap`, then `obs` on the mask that it found.

    exchanges: that of swap.
    damping, clip: those of obs.
    """
    hessian = statistics.hessian()
    found = [
        replace(rows, mask=exchanged(rows.weight, _fixed(rows), hessian.to(rows.weight.dtype), exchanges))
        for rows in group
    ]
    return obs(found, statistics, damping=damping, clip=clip)


def exchanged(weight: Tensor, mask: Mask, hessian: Tensor, most: int = 1000) -> Mask:
    """The mask after exchanges in its comparison groups, none of which lowers ||X (W - W')^T||^2 any more.

    Args:
        weight: W, dense, `(out_features, in_features)`, fp32 or fp64.
        mask: which weights are kept.
        hessian: X^T X up to a factor, `(in_features, in_features)`, of the weight's dtype.
        most: exchanges of a row, in the mean over the rows that they join.

    Raises:
        DassError: its groups are blocks of columns.
    """
    if mask.column_block is not None:
        raise DassError(
            "The update swap exchanges weights along an axis, not in blocks of columns: use another criterion, or "
            "update=obs.",
            "method.update",
        )
    if mask.keep.all():  # of few inputs a small share may be none
        return mask
    size = mask.pattern.m if isinstance(mask.pattern, NM) else None
    # rows that no exchange joins are islands of their own
    joined = 1 if mask.axis == "in" else len(weight) if mask.axis == "layer" or size is None else size
    layer = Layer(hessian, mask.axis, size, most)
    keep = mask.keep.clone()
    for w, kept in zip(weight.split(joined * ISLANDS), keep.split(joined * ISLANDS), strict=True):
        kept.copy_(_descended(layer, w.unflatten(0, (-1, joined)), kept.unflatten(0, (-1, joined))).flatten(0, 1))
    return replace(mask, keep=keep)


@dataclass(frozen=True)
class Layer:
    """What all rows of a layer share."""

    hessian: Tensor
    axis: str
    size: int | None
    """M, or None where a group is a whole row, column or layer."""
    most: int
    """Exchanges of a row, in the mean over those of its island."""


class Exchanges(NamedTuple):
    """Candidates of each island, `(islands, n)`: which of its weights to prune, which to keep, and what E becomes.

    Of a single candidate, `(islands, 1)`, there may be two weights to prune and two to keep.
    """

    out: Tensor
    into: Tensor
    change: Tensor


def _fixed(rows: Rows) -> Mask:
    if rows.mask is None:
        raise DassError(f"The update swap needs a mask of {rows.name} to begin with: choose another criterion.")
    return rows.mask


def _descended(layer: Layer, weight: Tensor, keep: Tensor) -> Tensor:
    """Exchange in islands `(islands, rows, in_features)` until each is at an optimum; which weights are kept then."""
    found, hessian, n = keep.clone(), layer.hessian, weight.shape[-1]
    left, w, kept = torch.arange(len(weight), device=weight.device), weight, keep.clone()
    energy = w.square() * hessian.diagonal()
    pull = w.masked_fill(kept, 0) @ hessian  # G
    made = torch.zeros_like(left)
    least = ROUNDING * torch.finfo(w.dtype).eps * (w.masked_fill(kept, 0) * pull).sum(-1).clamp_min_(0)
    while len(left):
        force = 2 * w * pull
        cost = (energy + force).masked_fill_(~kept, torch.inf)  # a
        gain = (energy - force).masked_fill_(kept, torch.inf)  # b
        one = _proposed(layer, w, cost, gain, CANDIDATES)
        good = _apart(one, least, n)
        idle = ~good.any(1)
        if idle.any() and layer.axis != "out" and layer.size is None:
            other = _proposed(layer, w[idle], cost[idle], gain[idle], n)
            good[idle] = _apart(other, least[idle], n)
            for mine, theirs in zip(one, other, strict=True):
                mine[idle] = theirs
        good = good.expand_as(one.out)
        going = good.any(1) & (made < layer.most * w.shape[1])
        if not going.all():
            found[left[~going]] = kept[~going]
            left, w, kept, energy, pull, least, made, good, *going_on = (
                x[going] for x in (left, w, kept, energy, pull, least, made, good, *one)
            )
            one = Exchanges(*going_on)
        made += good.sum(1)
        island = good.nonzero()[:, 0]
        for at, sign in ((one.out[good], 1), (one.into[good], -1)):
            row, column = at // n, at % n
            kept[island, row, column] = sign < 0
            pull[island, row] += sign * w[island, row, column, None] * hessian[column]
    return found


def _apart(one: Exchanges, least: Tensor, n: int) -> Tensor:
    """Which candidates gain enough and are the best of all that touch one of their rows: together they gain the sum."""
    rows = one.out // n, one.into // n
    doubt = least.gather(1, rows[0]) + least.gather(1, rows[1])
    if one.change.shape[1] == 1:
        return one.change < -doubt.sum(1, keepdim=True)
    good = one.change < -doubt
    place = one.change.argsort(dim=1, stable=True).argsort(dim=1)
    first = torch.full_like(least, place.shape[1], dtype=place.dtype)
    for row in rows:
        first = first.scatter_reduce(1, row, place, "amin")
    return good & (first.gather(1, rows[0]) == place) & (first.gather(1, rows[1]) == place)


def _proposed(layer: Layer, w: Tensor, cost: Tensor, gain: Tensor, count: int) -> Exchanges:
    """The best exchange of each row or group of rows; where all rows are one island, many that may be made at once.

    Args:
        w, cost, gain: W, a and b, `(islands, rows, in_features)`; a is infinite where pruned, b where kept.
        count: how many candidates of a row are looked at, where its group is the whole of it.
    """
    n = w.shape[-1]
    if layer.axis == "out":
        (least, i), (most, k) = cost.min(1), gain.min(1)
        column = torch.arange(n, device=w.device)
        found = Exchanges(i * n + column, k * n + column, least + most)
        if layer.size is None:
            return found
        best = found.change.argmin(1, keepdim=True)
        return Exchanges(*(x.gather(1, best) for x in (found.out, found.into, found.change)))
    if layer.axis == "both":
        return _crosswise(layer, w, cost, gain)
    p, q, change = _within_rows(layer, w.flatten(0, 1), cost.flatten(0, 1), gain.flatten(0, 1), count)
    if layer.axis == "in":
        return Exchanges(p[:, None], q[:, None], change[:, None])
    # the k-th cheapest row to lose a weight with the k-th best to regain one; the best of all where both are one row
    start = torch.arange(len(p), device=w.device) * n
    least, most = cost[0].min(1), gain[0].min(1)
    i, k = least.values.argsort(), most.values.argsort()
    i, k = torch.cat([i, i[:1], i[1:2]]), torch.cat([k, k[1:2], k[:1]])
    across = (least.values[i] + most.values[k]).masked_fill_(i == k, torch.inf)
    out = torch.cat([start + p, i * n + least.indices[i]])
    into = torch.cat([start + q, k * n + most.indices[k]])
    return Exchanges(out[None], into[None], torch.cat([change, across])[None])


def _crosswise(layer: Layer, w: Tensor, cost: Tensor, gain: Tensor) -> Exchanges:
    """The best two exchanges in two rows of a tile, in opposite directions, of each M rows."""
    m, n = layer.size or 1, w.shape[-1]
    change = _within_groups(layer.hessian, m, *(x.flatten(0, 1) for x in (w, cost, gain))).unflatten(0, (-1, m))
    # each row with those behind it, in turn
    found = [(change + change.roll(-i, 1).transpose(-1, -2)).flatten(1).min(1) for i in range(1, m // 2 + 1)]
    values, index = (torch.stack(part, 1) for part in zip(*found, strict=True))
    best = values.argmin(1, keepdim=True)
    i, group, p, q = torch.unravel_index(index.gather(1, best), change.shape[1:])
    k, p, q = (i + best + 1) % m, group * m + p, group * m + q
    out, into = torch.cat([i * n + p, k * n + q], 1), torch.cat([i * n + q, k * n + p], 1)
    return Exchanges(out, into, values.gather(1, best))


def _within_groups(hessian: Tensor, m: int, w: Tensor, cost: Tensor, gain: Tensor) -> Tensor:
    """What each exchange in an N:M group of a row changes, `(rows, groups, M, M)`: that to prune, then that to keep."""
    blocks = hessian.unflatten(0, (-1, m)).unflatten(2, (-1, m)).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (g, m, m)
    a, b, v = (x.unflatten(1, (-1, m)) for x in (cost, gain, w))
    return torch.addcmul(a[..., None] + b[..., None, :], v[..., None] * blocks, v[..., None, :], value=-2)


def _within_rows(layer: Layer, w: Tensor, cost: Tensor, gain: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best exchange inside each row `(rows, in_features)`: what to prune, what to keep, and the change."""
    hessian, m = layer.hessian, layer.size
    if m is not None:
        best = _within_groups(hessian, m, w, cost, gain).flatten(1).min(1)
        group, pair = best.indices // m**2, best.indices % m**2
        return group * m + pair // m, group * m + pair % m, best.values
    # as many as the row with the most has, so that with count = in_features all pairs are there
    (a, p), (b, q) = (
        x.topk(min(count, int((x < torch.inf).sum(1).max())), 1, largest=False, sorted=False) for x in (cost, gain)
    )
    v, u, found = w.gather(1, p), w.gather(1, q), []
    step = max(1, PAIRS // max(1, p.shape[1] * q.shape[1]))
    for at in range(0, len(w), step):
        i = slice(at, at + step)
        pairs = hessian[p[i, :, None], q[i, None, :]]
        change = torch.addcmul(a[i, :, None] + b[i, None, :], pairs.mul_(v[i, :, None]), u[i, None, :], value=-2)
        found.append(change.flatten(1).min(1))
    change, index = (torch.cat(part) for part in zip(*found, strict=True))
    return p.gather(1, index[:, None] // q.shape[1])[:, 0], q.gather(1, index[:, None] % q.shape[1])[:, 0], change
