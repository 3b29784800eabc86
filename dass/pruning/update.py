"""The OBS solver: what the surviving weights become when others are pruned (SparseGPT, arXiv 2301.00774)."""

from collections.abc import Callable

import torch
from torch import Tensor

LAZY = 16
"""Columns per block: corrections reach the columns behind a block in one product when it is done."""

Choose = Callable[[slice, Tensor], Tensor]
"""`choose(columns, weight)`: which of these columns' weights `(out_features, len)` to keep, as they stand by now."""


def obs_sweep(weight: Tensor, factor: Tensor, choose: Choose, choose_every: int) -> tuple[Tensor, Tensor]:
    """Prune column by column; each column's error is made good by the columns behind it.

    For each column i: e = w_i where pruned, else 0; then W_:j -= e * U_ij / U_ii for all j > i.

    Args:
        weight: `(out_features, in_features)`, fp32 or fp64; not changed.
        factor: U, upper triangular, `(in_features, in_features)`; see `DampedInverse`.
        choose: called with the next columns before they are swept.
        choose_every: how many columns are chosen at once.

    Returns:
        The new weight, with exact zeros where it is pruned, and the mask (True = keep).
    """
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # (in_features, out_features)
    keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    errors, zero = torch.empty_like(columns[:LAZY]), columns.new_zeros(())
    ratios = factor / factor.diagonal()[:, None]
    column, kept, error = columns.unbind(), keep.unbind(), errors.unbind()  # views
    for start, stop in _blocks(len(columns), choose_every):
        for i in range(start, stop):
            if i % choose_every == 0:
                chosen = slice(i, i + choose_every)
                keep[chosen] = choose(chosen, columns[chosen].T).T
            torch.where(kept[i], zero, column[i], out=error[i - start])
            columns[i + 1 : stop].addr_(ratios[i, i + 1 : stop], error[i - start], alpha=-1)
        columns[stop:].addmm_(ratios[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    columns.masked_fill_(~keep, 0)
    return columns.T.contiguous(), keep.T.contiguous()


def _blocks(n_columns: int, choose_every: int) -> list[tuple[int, int]]:
    """Blocks of at most `LAZY` columns, such that all columns chosen together are up to date when they are."""
    width = max(choose_every, LAZY // choose_every * choose_every)
    chunks = [(first, min(first + width, n_columns)) for first in range(0, n_columns, width)]
    starts = [start for first, end in chunks for start in range(first, end, LAZY)]
    return list(zip(starts, [*starts[1:], n_columns], strict=True))
