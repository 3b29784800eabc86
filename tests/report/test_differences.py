"""Paired differences over windows, seeds and trainings, against numbers computed by hand."""

import math

import numpy as np
import pytest

from report.reading import runs_of
from report.tables import Difference, cells_of, find, paired_difference
from tests.report.records import identify, losses, make_record


def difference_of(records: list[dict], method: str = "dass") -> Difference | None:
    """The paired difference of a method to Wanda, which stand in one table."""
    cells = cells_of(runs_of(records))
    assert cells.table.nunique() == 1
    return paired_difference(*(find(cells, "2:4", name, {}).runs for name in (method, "wanda")))


def test_runs_with_the_same_seeds_are_paired_by_seed():
    """What a seed does to both methods alike is no noise of their difference."""
    shifts = [0.0, 0.5, -0.4]
    wanda = [losses(0.3 + shift, 0.02) for shift in shifts]
    dass = [losses(0.2 + shift + extra, 0.03) for shift, extra in zip(shifts, (0.0, 0.01, -0.02), strict=True)]
    records = [
        make_record(f"{name}{seed}", name, values, seed=seed)
        for name, runs in (("wanda", wanda), ("dass", dass))
        for seed, values in enumerate(runs)
    ]
    difference = difference_of(records)
    d = np.array(dass) - np.array(wanda)
    assert difference.mean == pytest.approx(d.mean())
    assert difference.stderr == pytest.approx(math.sqrt(d.mean(0).var(ddof=1) / 16 + d.mean(1).var(ddof=1) / 3))


def test_two_standard_errors_of_few_seeds_are_not_enough():
    """With three seeds the 2 becomes Student's 4.3, as far as the error comes from the seeds."""
    shifts = np.array([-0.01, 0.0, 0.01])
    stderr = shifts.std(ddof=1) / math.sqrt(3)
    for factor, counts in ((3.0, False), (4.5, True)):
        records = [make_record(f"w{seed}", "wanda", losses(0.3), seed=seed) for seed in range(3)]
        records += [
            make_record(f"d{seed}", "dass", losses(0.3 - factor * stderr + shift), seed=seed)
            for seed, shift in enumerate(shifts)
        ]
        difference = difference_of(records)
        assert difference.stderr == pytest.approx(stderr) and difference.counts == counts


def test_a_method_that_lacks_seeds_is_not_compared():
    records = [make_record(f"w{seed}", "wanda", losses(0.3 + seed / 100), seed=seed) for seed in range(3)]
    records += [make_record("d", "dass", losses(0.2)), make_record("m", "magnitude", losses(1))]
    assert difference_of(records) is None
    assert difference_of(records, "magnitude") is not None


def trained(run_id: str, method: str, shift: float, seed: int, machine: str = "A", noise: float = 0.0) -> dict:
    record = make_record(run_id, method, losses(shift, noise))
    record["config"]["model"] |= {"trained": {"activation": "silu", "seed": seed}}
    return identify(record, model=machine)


def test_trainings_of_one_design_are_replicates_paired_within_the_same_model() -> None:
    """On two machines with two seeds each; the models differ far more than the methods on each of them."""
    models = [(0, "A", 0.0), (1, "A", 0.9), (0, "B", -0.5), (1, "B", 0.3)]
    gains = [0.10, 0.12, 0.09, 0.11]
    records = [trained(f"w{s}{m}", "wanda", shift, s, m) for s, m, shift in models]
    records += [
        trained(f"d{s}{m}", "dass", shift - gain, s, m) for (s, m, shift), gain in zip(models, gains, strict=True)
    ]
    table = cells_of(runs_of(records))
    assert list(table.n_draws) == [4, 4]
    difference = difference_of(records)
    assert difference and difference.mean == pytest.approx(-np.mean(gains))
    assert difference.stderr == pytest.approx(np.std(gains, ddof=1) / 2, rel=1e-6) and difference.freedom == 3
    assert table.facts.iloc[0]["seeds"] == "0 (of the models' training: 0, 1)"


def test_methods_that_ran_on_other_trainings_are_not_compared() -> None:
    assert difference_of([trained("w", "wanda", 0.2, 0, "A"), trained("d", "dass", 0.1, 0, "B")]) is None
    partly = [trained(f"w{m}", "wanda", 0.2, 0, m) for m in "AB"] + [trained("d", "dass", 0.1, 0, "A")]
    assert difference_of(partly) is None
