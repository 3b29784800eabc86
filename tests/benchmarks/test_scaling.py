"""The fits of the scaling benchmark, on numbers whose exponents and rates are known; and one real, small point."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import AXES, MIDDLE, TERMS, exponent_grid, fit, fit_grid, planned, points, scaling_figure

RATES = dict(zip(TERMS, (1e-11, 2e-11, 4e-11, 8e-11), strict=True))


def measured():
    """All points, as fast as `RATES` and a tenth of a second say, and with twice the plan's memory."""
    rows = []
    for point in points():
        plan = planned(*(point[name] for name in ("width", "depth", "tokens", "method")))
        seconds = 0.1 + sum(rate * plan[term] for term, rate in RATES.items())
        rows.append(point | plan | {"seconds": seconds, "bytes": 2 * plan["planned"]})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table():
    return measured()


def test_every_axis_is_measured_with_every_method(table):
    assert len(table) == 3 * sum(map(len, AXES.values()))
    assert all(value in AXES[axis] for axis, value in MIDDLE.items())


def test_the_rates_are_found_again(table):
    rates, fitted = fit(table)
    np.testing.assert_allclose(rates, [*RATES.values(), 0.1], rtol=1e-4)
    np.testing.assert_allclose(fitted, table.seconds, rtol=1e-6)
    grid = fit_grid(table)
    assert grid.frame["GFLOP/s"].tolist() == ["100.0", "50.0", "25.0", "12.5"]
    assert "root mean square 0%" in grid.facts["residuals, wanda"] and grid.facts["constant"] == "0.10 s"


def test_the_exponents_stand_beside_the_plans(table):
    """A time that is a power of the width alone; the sweep's operations grow with nearly its cube."""
    grid = exponent_grid(table.assign(seconds=(table.width / 512) ** 2.5 * table.depth * table.tokens), {}).frame
    rows = grid.set_index(["Over", "Method"])
    assert rows.loc[("width", "wanda"), "Time"].startswith("2.50 ± 0.00")
    assert rows.loc[("depth", "dass"), "Time"].startswith("1.00 ± 0.00 (")
    plan = float(rows.loc[("width", "sparsegpt"), "Time"].split("(")[1].rstrip(")"))
    assert 2.2 < plan < 3.0 and plan > float(rows.loc[("width", "wanda"), "Time"].split("(")[1].rstrip(")"))
    assert len(scaling_figure(table).axes) == 2 * len(AXES)


def test_what_another_machine_measured_is_measured_anew(table, tmp_path, monkeypatch):
    """One point is missing here, all are of another machine there; the table names the machine of its points."""
    here, path = scaling.machine_description(torch.device("cpu"))["cpu"], tmp_path / "benchmark_scaling.csv"
    asked = []

    def measure(command, **keywords):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"seconds": 1.0, "bytes": 1e6}))

    monkeypatch.setattr(scaling, "OUT", tmp_path)
    monkeypatch.setattr(scaling.subprocess, "run", measure)
    monkeypatch.setattr(scaling, "git_state", lambda: {"commit": "of today"})
    table.assign(machine=here, commit="of then")[1:].to_csv(path, index=False)
    scaling.main()
    text = path.with_suffix(".md").read_text()
    assert len(asked) == 1 and here in text and "of then" in text and "of today" in text
    table.assign(machine="another", commit="of then").to_csv(path, index=False)
    scaling.main()
    assert len(asked) == 1 + len(table) and "of then" not in path.with_suffix(".md").read_text()


@pytest.mark.slow  # a process of its own imports everything
def test_one_point_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", "128", "2", "256", "wanda", str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert found["seconds"] > 0 and found["bytes"] > 0
