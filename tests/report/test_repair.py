"""What a repair leaves of the differences between criteria, against numbers computed by hand."""

import numpy as np
import pytest

from report.kinds import KINDS
from report.repair import jackknife, spread
from tests.report.records import losses, make_record
from tests.report.test_kinds import drawn, material, rows_of

SHIFTS = {"wanda": (0.3, 0.2), "dass": (0.5, 0.21), "magnitude": (0.9, 0.25)}


def all_records():
    for number, (method, shifts) in enumerate(SHIFTS.items()):
        for update, shift in zip(("none", "mlp"), shifts, strict=True):
            noise = 0.02 * number
            yield make_record(f"{method}-{update}", method, losses(shift, noise), update=update, epochs=number)


def test_the_spread_and_what_is_left_of_it():
    report = KINDS["repair"](material(*all_records(), make_record("d", "dense", losses(0))))
    *tables, summary = report.grids
    shown = rows_of(tables[0], "none", "swap", "mlp")
    assert list(shown) == [("2:4", method) for method in ("magnitude", "wanda", "dass")]
    wanted = [f"{np.exp(losses(shift, 0.02).mean()):.2f}" for shift in SHIFTS["dass"]]
    assert shown["2:4", "dass"] == [wanted[0], "—", wanted[1]]
    values = [
        np.array([losses(shifts[i], 0.02 * number) for number, shifts in enumerate(SHIFTS.values())]) for i in (0, 1)
    ]
    spreads = [value.mean(axis=1).std(ddof=1) for value in values]
    rows = {row["Repair"]: row for _, row in summary.frame.iterrows()}
    assert rows["mlp"]["Spread"].startswith(f"{spreads[1]:.4f} ± ")
    assert rows["mlp"]["Left"].startswith(f"{spreads[1] / spreads[0]:.0%} ± ")
    assert (rows["mlp"]["Best"], rows["mlp"]["Worst"]) == ("wanda", "magnitude")
    difference = values[1][2] - values[1][0]
    assert rows["mlp"]["Worst − best"].endswith(f"{difference.mean():.4f} ± {difference.std(ddof=1) / 4:.4f}")
    assert rows["none"]["Left"].startswith("100%") and rows["obs"]["Spread"] == "—"
    assert len(drawn(report).axes) == 1


def test_each_variant_of_a_method_is_a_criterion_of_its_own():
    """Two alphas, each with and without a repair; and the same method by other code."""
    records = [make_record(f"w-{update}", "wanda", losses(0.3), update=update) for update in ("none", "obs")]
    for alpha, shift in ((0.25, 0.9), (0.5, 0.1)):
        for update, gain in (("none", 0.0), ("obs", 0.05)):
            records.append(make_record(f"{alpha}-{update}", "dass", losses(shift - gain), update=update, alpha=alpha))
    table, summary = KINDS["repair"](material(*records)).grids
    shown = rows_of(table, "none", "obs")
    assert list(shown) == [("2:4", label) for label in ("wanda", "dass (alpha=0.25)", "dass (alpha=0.5)")]
    assert shown["2:4", "dass (alpha=0.25)"] == [f"{np.exp(losses(shift).mean()):.2f}" for shift in (0.9, 0.85)]
    rows = {row["Repair"]: row for _, row in summary.frame.iterrows()}
    assert [rows["obs"][name] for name in ("Criteria", "Best", "Worst")] == [
        "3",
        "dass (alpha=0.5)",
        "dass (alpha=0.25)",
    ]
    edited = make_record("e", "wanda", losses(0.6), update="none")
    edited["identity"]["method"] = "edited"
    assert len(KINDS["repair"](material(*records, edited)).grids[0].frame) == 4


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=(1, 12))
    value, stderr = jackknife(values, lambda losses: float(losses.mean()))
    assert (value, stderr) == pytest.approx((values.mean(), values.std(ddof=1) / np.sqrt(12)))
    assert spread(np.array([[1.0, 3.0], [4.0, 6.0]])) == pytest.approx(np.std([2, 5], ddof=1))
