"""Items that both methods answer, and how many of them a difference of the mean accuracy needs to be told."""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from report.runs import Run
from report.tables import WIN

TOLD = 2.0  # points of the mean accuracy
MOST = 10**6  # items of a task that anybody would ask for


@dataclass(frozen=True)
class Pairing:
    """One cell beside the reference, item by item."""

    won: int  # items that are right here and wrong there
    lost: int
    needed: int | None  # items of each task by which `TOLD` can be told; None: the whole sets are too small


def pairing_of(ours: list[Run], theirs: list[Run]) -> Pairing | None:
    """The pairs of items of two cells; None where one of them has no items.

    A mean over T tasks of n_t items each has the squared error sum_t s_t^2 / n_t / T^2, with s_t^2 the variance of the
    paired differences on a task (with b items won and c lost of n: (b + c - (b - c)^2 / n) / (n - 1), as in McNemar's
    test). A set of which fewer items ran than were asked for is whole, and has no more.
    """
    found, reference = ([run for run in runs if run.samples] for runs in (ours, theirs))
    if not found or not reference:
        return None
    pairs = zip(*(run.samples for run in found), strict=True), zip(*(run.samples for run in reference), strict=True)
    differences = [np.mean(b, axis=0) - np.mean(a, axis=0) for a, b in zip(*pairs, strict=True)]  # points, by task
    asked = found[0].config["evaluation"].get("limit") or math.inf
    whole = [len(d) if len(d) < asked else math.inf for d in differences]
    needed = items_needed([float(d.var(ddof=1)) for d in differences], whole)
    return Pairing(sum(int((d > 0).sum()) for d in differences), sum(int((d < 0).sum()) for d in differences), needed)


def items_needed(variances: list[float], whole: list[float], told: float = TOLD) -> int | None:
    """The least n with sum_t s_t^2 / min(n, N_t) <= (T * told / 2)^2, where a difference is told by two errors of it.

    Args:
        variances: s_t^2 of each task [points^2].
        whole: N_t, the items that there are of each task; infinite where that many are not known.
    """
    allowed = (len(variances) * told / WIN) ** 2

    def error(n: int) -> float:
        return sum(variance / min(n, most) for variance, most in zip(variances, whole, strict=True))

    sizes = range(2, MOST)  # one item has no variance
    index = bisect_left(sizes, True, key=lambda n: error(n) <= allowed)
    return sizes[index] if index < len(sizes) else None
