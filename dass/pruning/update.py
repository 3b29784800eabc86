"""The OBS solver: what the surviving weights become when others are pruned (SparseGPT, arXiv 2301.00774)."""

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[slice, Tensor], Tensor]
"""`choose(columns, weight)`: which of these columns' weights `(out_features, len)` to keep, as they stand by now."""


def obs_sweep(
    weight: Tensor, factor: Tensor, choose: Choose, choose_every: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Prune column by column; each column's error is made good by the columns behind it.

    For each column i: e = w_i where pruned, else 0; then W_:j -= e * U_ij / U_ii for all j > i. Columns behind the
    current block get the sum of the block's corrections in one product, which is the same up to rounding.

    Args:
        weight: `(out_features, in_features)`, fp32 or fp64; not changed.
        factor: U, upper triangular, `(in_features, in_features)`; see `DampedInverse`.
        choose: called with the next columns before they are swept.
        choose_every: how many columns are chosen at once; divides `block_size`.
        block_size: columns per block.

    Returns:
        The new weight, with exact zeros where it is pruned, and the mask (True = keep).
    """
    columns = weight.T.clone(
        memory_format=torch.contiguous_format
    )  # (in_features, out_features): a column of W is one contiguous row here
    keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    ratios = factor / factor.diagonal()[:, None]
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            if (i - start) % choose_every == 0:
                chosen = slice(i, min(i + choose_every, stop))
                keep[chosen] = choose(chosen, columns[chosen].T).T
            error = torch.where(keep[i], 0.0, columns[i])
            columns[i + 1 : stop].addr_(ratios[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        columns[stop:].addmm_(ratios[start:stop, stop:].T, errors, alpha=-1)
    columns.masked_fill_(~keep, 0)
    return columns.T.contiguous(), keep.T.contiguous()
