"""How many items tell a difference, by hand and by drawing that many."""

import math

import numpy as np
import pytest

from report.items import items_needed
from report.kinds import KINDS
from tests.report.test_kinds import material, zero_shot_record


@pytest.mark.parametrize(
    ("variances", "whole", "needed"),
    [
        ([2000.0] * 5, [math.inf] * 5, 400),  # 5 * 2000 / n = (5 * 1 point)^2
        ([2000.0], [math.inf], 2000),  # a single task
        ([0.0, 0.0], [10, 10], 2),  # methods that never differ
        ([2000.0] * 5, [math.inf, math.inf, math.inf, 500, 250], 471),  # 4 * 2000 / n + 2000 / 250 = 25
        ([2000.0, 2000.0], [400, math.inf], None),  # the one whole set is too noisy alone
    ],
)
def test_items_needed_by_hand(variances, whole, needed):
    assert items_needed(variances, whole) == needed


def test_the_table_says_how_many_and_by_which_formula():
    rng = np.random.default_rng(0)
    one = {task: rng.integers(0, 2, 400).tolist() for task in ("piqa", "arc_easy")}
    other = {task: [int(x if rng.random() < 0.8 else 1 - x) for x in items] for task, items in one.items()}
    records = [zero_shot_record("w", "wanda", one), zero_shot_record("d", "dass", other)]
    for record in records:
        record["config"]["evaluation"]["limit"] = 400  # there may be more
    (grid,) = KINDS["zero_shot"](material(*records)).grids
    differences = [100.0 * np.subtract(other[task], one[task]) for task in one]
    needed = math.ceil(sum(d.var(ddof=1) for d in differences) / 4)
    won, lost = (sum(int((sign * d > 0).sum()) for d in differences) for sign in (1, -1))
    assert grid.facts["items needed"].startswith(
        f"dass 2:4 {needed} ({won} won, {lost} lost); the least n of each task"
    )
    assert grid.facts["orders"] == "released" and "named orders" in grid.legend


def test_whole_sets_can_be_too_small():
    one, other = {"piqa": [0, 1] * 20}, {"piqa": [1, 0] * 20}
    (grid,) = KINDS["zero_shot"](
        material(zero_shot_record("w", "wanda", one), zero_shot_record("d", "dass", other))
    ).grids
    assert grid.facts["items needed"].startswith("dass 2:4 more than there are (20 won, 20 lost); ")
