"""Patterns, group axes, mask selection and mask verification.

A mask is boolean, `(out_features, in_features)`, True = keep. Weights compete inside comparison groups, which run
along one axis of the matrix, or, in N:M, along both at once. Among equal scores the lower index is pruned first, on
every device and dtype.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dass.errors import Answers, DassError, require_finite
from dass.pruning.transposable import keep_transposable

Axis = Literal["in", "out", "layer", "both"]
AXES: tuple[str, ...] = get_args(Axis)
LARGEST_RANKED_M = 16  # comparing all pairs of M is fastest up to about here; above, selecting the threshold is
LARGEST_TOLD_M = 128  # the fullest of larger groups is near the mean by chance, too


@dataclass(frozen=True)
class Unstructured:
    """A comparison group of length L loses its floor(ratio * L) least important weights; 0 < ratio < 1."""

    ratio: float

    def __post_init__(self) -> None:
        """Refuse a ratio that prunes nothing, everything, or makes no sense."""
        if not 0 < self.ratio < 1:
            raise DassError(f"sparsity.ratio={self.ratio} is not between 0 and 1: give the share of weights to prune.")

    def __str__(self) -> str:
        """The name in tables, such as '50%'."""
        return f"{100 * self.ratio:g}%"


@dataclass(frozen=True)
class NM:
    """Of every M consecutive weights of a comparison group the N most important are kept; 1 <= N <= M."""

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse N and M that no group can satisfy."""
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise DassError(
                f"sparsity.n={self.n} of sparsity.m={self.m} is not possible: n of m are kept, so 1 <= n <= m."
            )

    def __str__(self) -> str:
        """The name in tables, such as '2:4'."""
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class Mask:
    """Which weights are kept, `(out_features, in_features)` bool, with the pattern and the axis that it obeys.

    Hardware for N:M sparsity needs it along the inputs, over which a product is summed; a mask along the outputs does
    not speed the forward product up, but dX = dY W of the backward pass. Along `both` (transposable) N of M are kept in
    the rows and in the columns of each M x M tile. The axis `layer` under N:M is `in`: M consecutive weights of the
    row-major matrix are inputs of one row.
    """

    keep: Tensor
    pattern: Pattern
    axis: Axis
    column_block: int | None = None
    """If set, comparison groups end at multiples of this many columns (SparseGPT's unstructured groups)."""
    order: Tensor | None = None
    """The order of its MLP's neurons under which it holds: neuron i is the released neuron `order[i]`, `(f,)` int64."""


def select_mask(
    scores: Tensor, pattern: Pattern, axis: Axis, name: str = "a layer", later: Answers | None = None
) -> Mask:
    """Keep the most important weights of every comparison group.

    Args:
        scores: importance, `(out_features, in_features)`, any floating dtype, any strides.
        pattern: how many survive.
        axis: `in`: a group is one row; `out`: one column; `layer`: the whole matrix; `both`: a tile (see `Mask`).
        name: the layer's name, for errors.
        later: see `require_finite`.

    Raises:
        DassError: a score is NaN or infinite, M does not divide the group, or `both` is asked for without N:M.
    """
    if axis not in AXES:
        raise DassError(f"The group axis of {name} is '{axis}': choose one of {', '.join(AXES)}.")
    require_finite(scores, f"The importance scores of {name}", later)
    if isinstance(pattern, NM) and axis == "layer":
        axis = "in"
    require_divisible(scores, pattern, axis, name)
    return Mask(keep_most_important(scores, pattern, axis), pattern, axis)


def keep_most_important(scores: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """The selection itself, bool `(out_features, in_features)`, without the checks of `select_mask`."""
    if isinstance(pattern, NM) and axis == "both":
        return keep_transposable(scores, pattern.n, pattern.m)
    if isinstance(pattern, NM):
        dim = 0 if axis == "out" else 1
        split = scores.unflatten(dim, (-1, pattern.m))
        return _kept_of_m(split, pattern.m - pattern.n, dim + 1).reshape(scores.shape).contiguous()
    (groups,) = _groups(scores, axis)
    keep = _kept(groups, math.floor(pattern.ratio * groups.shape[1]))
    return keep.T.contiguous() if axis == "out" else keep.reshape(scores.shape)


def verify_mask(mask: Mask, name: str = "a layer") -> None:
    """Check that every comparison group keeps exactly what the pattern says; for masks that come from a file.

    Raises:
        DassError: a group keeps more or fewer weights; hardware would drop weights silently.
    """
    require_divisible(mask.keep, mask.pattern, mask.axis, name)
    wrong = groups_seen = 0
    for part in mask.keep.split(mask.column_block or mask.keep.shape[1], dim=1):
        for groups in _groups(part, mask.axis):
            if isinstance(mask.pattern, NM):
                kept, expected = groups.reshape(-1, mask.pattern.m).sum(1), mask.pattern.n
            else:
                kept, expected = groups.sum(1), groups.shape[1] - math.floor(mask.pattern.ratio * groups.shape[1])
            wrong += int((kept != expected).sum())
            groups_seen += len(kept)
    if wrong:
        raise DassError(
            f"The mask of {name} breaks its pattern {mask.pattern} along '{mask.axis}' in {wrong} of {groups_seen} "
            f"comparison groups: select it again along this axis."
        )


def nm_along(lines: Tensor) -> NM | None:
    """The strictest N:M that weights obey, M <= 128; None where they obey none that is meant.

    None, too, where the fullest group is far from the mean, as some N of 32 holds in any small matrix with zeros; but
    2:4 is always told, since hardware asks for nothing more. Dead neurons and inputs are not part of the mean: lines
    that keep nothing, and groups that keep nothing in any line.

    Args:
        lines: which weights are kept, `(lines, length)` bool; groups of M are consecutive in a line.
    """
    length = lines.shape[1]
    look = lines[:: max(1, len(lines) // 64)].contiguous()  # a few lines show that most M do not hold
    # above 32, two groups in a line at least: all lines of an unstructured mask keep as many
    sizes = (m for m in range(2, LARGEST_TOLD_M + 1) if length % m == 0 and (m <= 32 or m < length))
    seen = {m: n for m, n in ((m, _fullest(look, m)) for m in sizes) if n < m}
    if not seen:
        return None
    kept, living, places = int(lines.count_nonzero()), int(lines.amax(1).sum()), lines.amax(0)
    best, share = None, 1.0
    for m, least in seen.items():
        mean = kept / max(1, living * int(places.view(-1, m).any(1).sum()))
        if least / m < share and _is_meant(least, m, mean):
            n = _fullest(lines, m)
            if n / m < share and _is_meant(n, m, mean):
                best, share = NM(n, m), n / m
    return best


def _fullest(lines: Tensor, m: int) -> int:
    """How many the fullest group of M keeps, at least 1; M < 256."""
    return max(1, int(lines.reshape(-1, m).sum(1, dtype=torch.uint8).max()))


def _is_meant(n: int, m: int, mean: float) -> bool:
    """Whether groups of M that keep N at most, and so many on average, do so on purpose; if N is not, no larger one."""
    return n < mean + min(max(1, n / 8), 2) or (m == 4 and n <= 2)


def require_fitting(pattern: Pattern, axis: Axis, where: str = "") -> None:
    """Raise DassError where an axis means nothing under a pattern."""
    if axis == "both" and not isinstance(pattern, NM):
        raise DassError(
            f"The group axis both{where} is that of N:M in rows and columns of a tile, and {pattern} has no tiles: "
            f"choose in, out or layer, or an N:M pattern.",
            field="method.axis",
        )


def _groups(matrix: Tensor, axis: Axis) -> list[Tensor]:
    """Views (or reshaped copies) of a matrix with one comparison group in each row."""
    lines = {"in": [matrix], "out": [matrix.T], "both": [matrix, matrix.T]}
    return lines[axis] if axis in lines else [matrix.reshape(1, -1)]


def require_divisible(matrix: Tensor, pattern: Pattern, axis: Axis, name: str) -> None:
    """Raise DassError where M does not divide what is cut into groups of a matrix `(out_features, in_features)`."""
    require_fitting(pattern, axis, f" of {name}")
    outputs, inputs = zip(matrix.shape, ("out", "in"), strict=True)
    for width, side in {"out": [outputs], "both": [inputs, outputs]}.get(axis, [inputs]):
        if isinstance(pattern, NM) and width % pattern.m:
            raise DassError(
                f"{name} has {width} {side}put features, which M={pattern.m} does not divide: "
                f"choose another pattern or leave this layer out with `exclude`.",
                field="sparsity",
            )


def _kept_of_m(split: Tensor, count: int, dim: int) -> Tensor:
    """False for the `count` smallest along a short dimension, lower index first among equals.

    Counts for each element those that are pruned before it, by comparing the M slices with those 1, 2, ... behind.
    """
    m = split.shape[dim]
    if m > LARGEST_RANKED_M or split.is_cuda:
        return _kept(split.movedim(dim, -1), count).movedim(-1, dim)
    slots = split.movedim(dim, 0).contiguous()
    before = torch.zeros(slots.shape, dtype=torch.int8, device=slots.device)
    for apart in range(1, m):
        is_first = (slots[:-apart] <= slots[apart:]).view(torch.int8)
        before[apart:].add_(is_first)
        before[:-apart].sub_(is_first)
    # slot i has m - 1 - i behind it, of which those go before it that it does not go before
    behind = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=slots.device)
    return (before >= (count - behind).view(m, *[1] * (slots.ndim - 1))).movedim(0, dim)


def _kept(groups: Tensor, count: int) -> Tensor:
    """False for the `count` smallest of each group along the last dimension, lower index first among equals."""
    if count == 0 or groups.is_cuda:  # kthvalue would leave each group to one multiprocessor
        return _kept_by_sorting(groups, count)
    groups = groups.contiguous()
    threshold = torch.kthvalue(groups, count, dim=-1, keepdim=True).values
    at = groups == threshold
    missing = count - (groups < threshold).sum(-1, keepdim=True)
    return (groups > threshold) | (at & (at.cumsum(-1, dtype=torch.int32) > missing))


def _kept_by_sorting(groups: Tensor, count: int) -> Tensor:
    """The same in three launches whatever the lengths; a stable sort leaves equals in the order of their index."""
    first = groups.sort(dim=-1, stable=True).indices[..., :count]
    return torch.ones(groups.shape, dtype=torch.bool, device=groups.device).scatter_(-1, first, False)
