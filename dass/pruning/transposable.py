"""Transposable masks: N:M along the rows and along the columns of every M x M tile.

The best mask of a tile keeps N weights of each of its rows and columns with the largest sum of scores. For 2:4 it is
found among all 90 such masks; for other patterns by entropy-regularised transport, rounding and local search (TSENOR,
arXiv 2505.23949). In any case the tiles are independent of each other, and worked on by the chunk.
"""

import functools
import math
from itertools import combinations, product

import torch
from torch import Tensor

CHUNK = 2**20
"""Numbers of the largest tensor of a chunk of tiles on the CPU, whose caches hold it; on a GPU 64 times as many."""
LISTED = 4
"""Tiles up to this size have at most 90 masks, so that all are looked at."""
SHARPNESS, ROUNDS = 40.0, 60
"""Of the transport: 1 / temperature, for scores between 0 and 1, and how often rows, columns and capacity are met."""
GAIN = 1e-6
"""The least that an exchange must gain, of scores between 0 and 1: above the rounding of fp32."""


def keep_transposable(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep N of M along both axes of every M x M tile so that the sum of the kept scores is the largest.

    Exact for M <= 4: among equal sums, the mask that prunes the lower indices, in row-major order. For larger M within
    about a thousandth of the optimum, and no exchange of two weights for two others would gain.

    Args:
        scores: `(out_features, in_features)`, finite, any floating dtype, any strides; M divides both.

    Returns:
        The mask, bool, `(out_features, in_features)`.
    """
    if n == m:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    rows, columns = scores.shape
    tiles = scores.reshape(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m, m)
    size = CHUNK * (64 if scores.is_cuda else 1) // (len(_all_masks(n, m)) if m <= LISTED else m**3)
    choose = _best if m <= LISTED else _nearest
    # in one layout, whose sums are rounded alike, and so small that none overflows
    keep = torch.cat([choose(part.double().contiguous() / 16, n) for part in tiles.split(max(size, 1))])
    return keep.view(rows // m, columns // m, m, m).transpose(1, 2).reshape(rows, columns)


def _best(tiles: Tensor, n: int) -> Tensor:
    """The mask with the largest sum of scores, the first among equals; `(tiles, m, m)` bool.

    In fp64 the sums of scores of fp32 or less are exact but for extreme ranges, so that equals are found on any device.
    """
    masks = _all_masks(n, tiles.shape[1]).to(tiles.device)
    return masks.bool()[(tiles.flatten(1) @ masks.flatten(1).T).argmax(1)]


@functools.cache
def _all_masks(n: int, m: int) -> Tensor:
    """All masks with N in each row and column, `(count, m, m)` fp64; first come those that keep later indices."""
    lines = sorted([int(i in kept) for i in range(m)] for kept in combinations(range(m), n))
    found = [mask for mask in product(lines, repeat=m) if all(sum(column) == n for column in zip(*mask, strict=True))]
    return torch.tensor(found, dtype=torch.float64)


def _nearest(tiles: Tensor, n: int) -> Tensor:
    """A mask that no exchange of two weights in two rows for two others improves; `(tiles, m, m)` bool."""
    low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
    scores = ((tiles - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)).float()
    keep = _rounded(_transported(scores, n), n)
    _completed(keep, scores, n)
    return _improved(keep, scores)


def _transported(scores: Tensor, n: int) -> Tensor:
    """argmax <S, W> + H(S) / sharpness with rows and columns of S that sum to N, 0 <= S <= 1 (TSENOR).

    Dykstra's projections: rows, columns, capacity in turn; only that on the capacity needs its correction.
    """
    plan, correction = torch.exp(SHARPNESS * (scores - 1)), torch.ones_like(scores)
    tiny = torch.finfo(plan.dtype).tiny
    for _ in range(ROUNDS):
        plan = plan * (n / plan.sum(2, keepdim=True).clamp_min(tiny))
        plan = plan * (n / plan.sum(1, keepdim=True).clamp_min(tiny))
        wanted = plan * correction
        plan = wanted.clamp(max=1)
        correction = wanted / plan.clamp_min(tiny)
    return plan


def _rounded(plan: Tensor, n: int) -> Tensor:
    """From the largest entry down, keep each whose row and column have less than N; among equals the higher index."""
    tiles, m, _ = plan.shape
    order = plan.flatten(1).flip(1).argsort(dim=1, descending=True, stable=True)
    at, every = m * m - 1 - order, torch.arange(tiles, device=plan.device)
    in_row, in_column = (torch.zeros(tiles, m, dtype=torch.int8, device=plan.device) for _ in range(2))
    keep = torch.zeros(tiles, m * m, dtype=torch.bool, device=plan.device)
    for place in at.T:
        i, j = place // m, place % m
        free = (in_row[every, i] < n) & (in_column[every, j] < n)
        keep[every, place] = free
        in_row[every, i] += free
        in_column[every, j] += free
    return keep.view(tiles, m, m)


def _completed(keep: Tensor, scores: Tensor, n: int) -> None:
    """Where a row i and a column j lack one, keep (i, b) and (a, j) in the place of the (a, b) that costs least.

    There is one: rounding left no room at (i, j), so that a column that i does not use is full, and not with rows of j.
    """
    while len(short := (keep.sum(2) < n).any(1).nonzero().flatten()):
        own, value = keep[short], scores[short]
        every = torch.arange(len(short), device=keep.device)
        i, j = own.sum(2).argmin(1), own.sum(1).argmin(1)
        allowed = own & ~own[every, i][:, None, :] & ~own[every, :, j][:, :, None]
        gain = value[every, i][:, None, :] + value[every, :, j][:, :, None] - value
        a_b = gain.masked_fill(~allowed, -math.inf).flatten(1).argmax(1)
        a, b = a_b // keep.shape[2], a_b % keep.shape[2]
        own[every, a, b], own[every, i, b], own[every, a, j] = False, True, True
        keep[short] = own


def _improved(keep: Tensor, scores: Tensor) -> Tensor:
    """Keep (a, q), (b, p) in the place of (a, p), (b, q), the best such exchange of each tile, while it gains.

    It gains d_q - d_p, d_j = W_aj - W_bj: the largest d_q of what b keeps and a does not, less the smallest d_p of what
    a keeps and b does not. The latter is the former with a and b exchanged, but for the sign.
    """
    left = torch.arange(len(keep), device=keep.device)
    while len(left):
        own, value = keep[left], scores[left]
        difference = value[:, :, None] - value[:, None]  # (tiles, a, b, columns)
        only_b = own[:, None] & ~own[:, :, None]
        most, column = difference.masked_fill_(~only_b, -math.inf).max(3)
        gain, a_b = (most + most.transpose(1, 2)).flatten(1).max(1)
        better = gain > GAIN
        left, a_b, column = left[better], a_b[better], column[better]
        a, b = a_b // keep.shape[2], a_b % keep.shape[2]
        every = torch.arange(len(left), device=keep.device)
        q, p = column[every, a, b], column[every, b, a]
        keep[left, a, p], keep[left, b, q] = False, False
        keep[left, a, q], keep[left, b, p] = True, True
    return keep
