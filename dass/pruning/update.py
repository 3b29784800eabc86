"""Updates: what the surviving weights become when others are pruned.

An update is a function of `(group, statistics)`: the projections that read one input, and what is known of that input.
It returns the new weights and the mask of each. Add one by decorating a function with `@update`, and name it in a file
in `conf/method`; nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass.errors import Answers, DassError
from dass.pruning.masks import NM, Axis, Mask, Pattern, verify_mask
from dass.pruning.registry import Entry, Registry
from dass.pruning.statistics import Statistics

LAZY = 16
"""Columns per block: corrections reach the columns behind a block in one product when it is done."""

Choose = Callable[[slice, Tensor], Tensor]
"""`choose(columns, weight)`: which of these columns' weights `(out_features, len)` to keep, as they stand by now."""
UPDATES = Registry("update", leading=2)
update = UPDATES.register


@dataclass(frozen=True)
class Rows:
    """One projection on its way through an update."""

    name: str
    weight: Tensor
    """The dense weights, `(out_features, in_features)`, fp32 or fp64; perhaps the model's own, may be written into."""
    largest: float
    """The largest number that the model's dtype holds."""
    pattern: Pattern
    axis: Axis
    mask: Mask | None
    """Which weights are kept; None where the update is to choose, from the weights that it has updated by then."""
    choose: Choose
    """How to choose then."""


@update()
def none(group: list[Rows], statistics: Statistics) -> list[tuple[Tensor, Mask]]:
    """W'_ij = W_ij where kept, else 0."""
    return [(rows.weight.masked_fill_(~rows.mask.keep, 0), rows.mask) for rows in group if rows.mask is not None]


@update("hessian", positive=("damping", "block_size"))
def obs(
    group: list[Rows], statistics: Statistics, damping: float = 0.01, block_size: int = 128, clip: bool = False
) -> list[tuple[Tensor, Mask]]:
    """W'_:j = W_:j - e U_ij / U_ii for each pruned column i < j, e its error (SparseGPT, arXiv 2301.00774).

    One sweep over the stacked rows of all projections that read the input.

    damping: the share of the Hessian's mean diagonal that is added to it.
    block_size: columns of an unstructured comparison group that is chosen while sweeping.
    clip: whether new weights that the model's dtype cannot hold become the largest that it can; else they are an error.
    """
    inverse = statistics.inverse(damping)
    pattern, sizes = group[0].pattern, [len(rows.weight) for rows in group]
    stacked = torch.cat([rows.weight for rows in group]).masked_fill_(inverse.dead, 0)
    # N:M along the inputs looks at one row at a time, so all rows of the stack can be looked at together
    row_by_row = isinstance(pattern, NM) and all(rows.mask is None and rows.axis != "out" for rows in group)

    def choose(columns: slice, weight: Tensor) -> Tensor:
        if row_by_row:
            return group[0].choose(columns, weight)
        return torch.cat(
            [
                rows.mask.keep[:, columns] if rows.mask else rows.choose(columns, part)
                for rows, part in zip(group, weight.split(sizes), strict=True)
            ]
        )

    choose_every = pattern.m if isinstance(pattern, NM) else block_size
    new, keep = obs_sweep(stacked, inverse.factor, choose, choose_every)
    result = []
    for rows, weight, kept in zip(group, new.split(sizes), keep.split(sizes), strict=True):
        if isinstance(pattern, NM):
            swept = Mask(kept, pattern, "in" if rows.axis == "layer" else rows.axis)
        else:
            swept = Mask(kept, pattern, rows.axis, column_block=choose_every)
        result.append((weight.clamp(-rows.largest, rows.largest) if clip else weight, rows.mask or swept))
    return result


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
    n = len(columns)
    # blocks of `LAZY` columns do not reach over the ends of chunks, so that columns chosen together are up to date
    chunk = max(choose_every, LAZY // choose_every * choose_every)
    pruned, errors = torch.empty_like(columns[:chunk]), torch.empty_like(columns[:LAZY])  # 1 where pruned, else 0
    ratios = factor / factor.diagonal()[:, None]
    column, is_pruned, error = columns.unbind(), pruned.unbind(), errors.unbind()  # views
    for first in range(0, n, chunk):
        end = min(first + chunk, n)
        for start in range(first, end, LAZY):
            stop = min(start + LAZY, end)
            for i in range(start, stop):
                if i % choose_every == 0:
                    chosen = slice(i, min(i + choose_every, n))
                    kept = choose(chosen, columns[chosen].T).T
                    torch.logical_not(kept, out=pruned[i - first : chosen.stop - first])
                torch.mul(column[i], is_pruned[i - first], out=error[i - start])
                if i + 1 < stop:
                    columns[i + 1 : stop].addr_(ratios[i, i + 1 : stop], error[i - start], alpha=-1)
            columns[stop:].addmm_(ratios[start:stop, stop:].T, errors[: stop - start], alpha=-1)
        torch.eq(pruned[: end - first], 0, out=keep[first:end])
    columns.masked_fill_(~keep, 0)
    return columns.T.contiguous(), keep.T.contiguous()


def require_pairs(entry: Entry, result: Any, group: list[Rows]) -> None:
    """Raise DassError unless an update gave new weights and a mask for each projection.

    A stranger's mask must keep to the pattern, too; the tests show that ours do, and looking waits for the device.
    """
    name = entry.function.__name__
    pairs = list(result) if isinstance(result, list | tuple) else []
    fits = all(
        isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], Tensor) and isinstance(one[1], Mask)
        for one in pairs
    )
    if len(pairs) != len(group) or not fits:
        raise DassError(f"The update {name} must return a list of (weight, mask), one for each of {len(group)} layers.")
    for (_, mask), rows in zip(pairs, group, strict=True):
        if entry.function.__module__.partition(".")[0] == "dass" or mask is rows.mask:
            continue
        if (mask.pattern, mask.axis) != (rows.pattern, rows.axis):
            raise DassError(
                f"The update {name} gives a mask of {mask.pattern} along {mask.axis} for {rows.name}, which is to be "
                f"{rows.pattern} along {rows.axis}."
            )
        verify_mask(mask, f"{rows.name} by the update {name}")


def require_obeyed(name: str, layer: str, before: Tensor, weight: Tensor, mask: Mask, later: Answers) -> None:
    """Raise DassError where an update gives weights of another shape, or leaves some that its own mask prunes.

    later: see `require_finite`.
    """
    if weight.shape != before.shape:
        raise DassError(
            f"The update {name} gives {tuple(weight.shape)} for the weights {tuple(before.shape)} of {layer}."
        )
    why = f"The update {name} leaves weights of {layer} that its mask prunes: multiply them by `mask.keep`."
    later.append((lambda: DassError(why), (mask.keep | (weight == 0)).all()))
