"""Models that differ in their MLPs: DaSS's lead in each training, beside what its neurons are like; and experts."""

import copy
import math

import numpy as np
import pandas as pd
import pytest

from report.kinds import Material, find_kind
from report.reading import runs_of
from report.rows import read_published
from report.variants import expert_frame, expert_grid, lead_frame, lead_grid, training_figure
from tests.report.records import PATTERNS, identify, losses, make_record

PUBLISHED = {"axis": {"gate": "out"}, "update": "none"}


def trained(run_id, method, values, model, seed, **options):
    record = make_record(run_id, method, values, model=model, **options)
    record["config"]["model"]["trained"] = {"activation": "silu", "seed": seed}
    return identify(record)


def compared(run_id, model, seed, cv, zeros, experts=()):
    record = trained(run_id, "compare", losses(0.0), model, seed)
    record["config"]["evaluation"] |= {"name": "none"}
    record |= {"metrics": [], "windows": []}
    norms = {name: cv for name in ("cv", "p90_p10", "input_cv", "input_p90_p10")} | {"reordered": [0.1] * len(cv)}
    record["diagnostics"] = {"errors": {}, "kept": {}, "jaccard": {}, "norms": norms}
    record["diagnostics"] |= {"zeros": zeros, "experts": list(experts)} if zeros else {}
    return identify(record)


def example():
    """Two models, two trainings each; the lead of dass is -0.1 and -0.2, and 0.1 and 0.2."""
    records = []
    for index, model in enumerate(("one", "two")):
        for seed in (0, 1):
            lead, tag = (0.1 + 0.1 * seed) * (-1, 1)[index], f"{index}{seed}"
            records += [
                trained(f"d{tag}", "dense", losses(0.0), model, seed),
                trained(f"w{tag}", "wanda", losses(0.3), model, seed, axis={"gate": "in"}, update="none"),
                trained(f"a{tag}", "dass", losses(0.3 + lead, 0.01), model, seed, alpha=0.5, **PUBLISHED),
                compared(f"c{tag}", model, seed, [0.2 + index, None, 0.4 + index], [0.0, 0.5, 0.1] if index else None),
            ]
    return runs_of(records)


def test_the_lead_of_each_training_beside_its_neurons():
    leads = lead_frame(example())
    assert list(zip(leads.model, leads.seed, strict=True)) == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    noise = 0.01 * np.cos(3.7 * np.arange(16))
    np.testing.assert_allclose(leads["lead"], np.array([-0.1, -0.2, 0.1, 0.2]) + noise.mean(), atol=1e-9)
    np.testing.assert_allclose(leads.stderr, noise.std(ddof=1) / 4, rtol=1e-9)
    np.testing.assert_allclose(leads.cost, 0.3)
    np.testing.assert_allclose(leads.cv, [0.3, 0.3, 1.3, 1.3])
    assert leads.zeros.isna().tolist() == [True, True, False, False] and leads.zeros[3] == pytest.approx(0.2)
    grid = lead_grid(leads, {})
    row = grid.frame[grid.frame.Model == "two"].iloc[0]
    assert row["Trainings"] == "2" and row["Wanda's cost, 2:4"] == f"{math.exp(0.3):.2f}"
    assert row["DaSS − Wanda, 2:4"].startswith("+0.1") and row["n: std / mean"] == "1.30"
    assert "+0.89 (4 models)" in grid.facts["rank correlation with DaSS − Wanda, 2:4"]


def set_to(record, **changes):
    """A record under another id whose config has other values of calibration or evaluation, or others at its top."""
    made = copy.deepcopy(record) | {"id": record["id"] + "".join(map(str, changes.values()))}
    for name, value in changes.items():
        made["config"][name] = made["config"][name] | value if isinstance(value, dict) else value
    return identify(made)


def leads_of(shift, n=16):
    """Wanda and DaSS in one training; DaSS's lead is the shift."""
    return [
        trained(f"w{n}", "wanda", losses(0.3, n=n), "one", 0, axis={"gate": "in"}, update="none"),
        trained(f"d{n}", "dass", losses(0.3 + shift, n=n), "one", 0, alpha=0.5, **PUBLISHED),
    ]


def test_each_calibration_of_a_sweep_has_its_lead_and_its_neurons(tmp_path):
    records = []
    for n_sequences, shift, cv in ((16, -0.1, 0.2), (128, 0.2, 0.4)):
        own = [*leads_of(shift), compared("c", "one", 0, [cv], [0.0])]
        records += [set_to(record, calibration={"n_sequences": n_sequences}) for record in own]
    runs = runs_of([trained("0", "dense", losses(0.0), "one", 0), *records])
    leads = lead_frame(runs)
    np.testing.assert_allclose(leads["lead"], [-0.1, 0.2])
    np.testing.assert_allclose(leads.cost, 0.3)
    np.testing.assert_allclose(leads.cv, [0.2, 0.4])
    grid = find_kind("variants")(Material(runs, read_published(tmp_path))).grids[0]
    assert grid.frame.Model.tolist() == [f"one, c4_sample, {n} sequences × 128 tokens (bos: none)" for n in (16, 128)]
    assert "calibration" not in grid.facts and "evaluation" in grid.facts


def test_each_evaluation_of_a_sweep_has_its_lead():
    leads = lead_frame(runs_of([*leads_of(-0.1), *leads_of(-0.2, n=24)]))
    np.testing.assert_allclose(leads["lead"], [-0.1, -0.2])
    assert ["16 windows" in leads.model[0], "24 windows" in leads.model[1]] == [True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": {"n_sequences": 16}}, "16 sequences"),
        ({"sparsity": PATTERNS["50%"]}, "50%"),
        ({"seed": 1}, "seed 1"),
    ],
    ids=["calibration", "pattern", "seed"],
)
def test_experts_are_compared_setting_by_setting(tmp_path, changes, said):
    record = compared("c", "moe", 0, [0.1, 0.2], [0.0, 0.0], EXPERTS)
    runs = runs_of([record, set_to(record, **changes)])
    grid = find_kind("experts")(Material(runs, read_published(tmp_path))).grids[0]
    assert grid.frame["DaSS better in"].tolist() == ["1 of 3", "1 of 2"] * 2
    assert [said in model for model in grid.frame.Model] == [False, False, True, True]


def test_the_report_has_the_full_tables_and_a_figure(tmp_path):
    made = find_kind("variants")(Material(example(), read_published(tmp_path)))
    assert made.grids[0].title == "DaSS against Wanda, by kind of MLP" and len(made.grids) >= 3
    assert len(made.draw().axes) == 2 and list(made.frame.model) == ["one", "one", "two", "two"]
    without = [run for run in example() if run.method not in ("dass", "compare")]
    rest = find_kind("variants")(Material(without, read_published(tmp_path)))
    assert "by kind of MLP" not in rest.grids[0].title


def expert(block, index, tokens, wanda, dass):
    return {"block": block, "index": index, "tokens": tokens, "errors": {"wanda": wanda, "dass": dass}}


EXPERTS = [
    expert("layers.0", 0, 100, 0.2, 0.1),
    expert("layers.0", 1, 200, 0.2, 0.2),
    expert("layers.0", 2, 300, 0.2, 0.4),
    expert("layers.1", 0, 10, 0.5, 0.4),
    expert("layers.1", 1, 0, None, None),
]


def test_experts_one_by_one(tmp_path):
    runs = runs_of([compared("c", "moe", 0, [0.1, 0.2], [0.0, 0.0], EXPERTS)])
    frame = expert_frame(runs)
    np.testing.assert_allclose(frame.share[:3], [0.5, 1.0, 1.5])
    np.testing.assert_allclose(np.exp(frame.log_ratio), [0.5, 1, 2, 0.8, math.nan])
    grid = expert_grid(frame, {}).frame
    assert grid["Tokens of an expert"].tolist() == ["100 to 300", "0 to 10"]
    assert grid["DaSS better in"].tolist() == ["1 of 3", "1 of 2"]
    assert grid["Rank correlation"][0] == "+1.00" and grid["Error over Wanda's"][0] == "1.000 (0.500 to 2.000)"
    scored = runs_of([make_record("w", "wanda", losses(0.1), model="moe", axis={"gate": "in"})])
    made = find_kind("experts")(Material([*runs, *scored], read_published(tmp_path)))
    assert made.grids[0].title == "DaSS against Wanda, expert by expert" and len(made.draw().axes) == 1
    assert find_kind("experts")(Material(scored, read_published(tmp_path))).grids[0].title.startswith("Perplexity")


def test_an_unsound_expert_is_left_out(capsys):
    record = compared("c", "moe", 0, [0.1, 0.2], [0.0, 0.0], [EXPERTS[0] | {"tokens": -1}])
    assert runs_of([record]) == [] and "c.json is not a sound record" in capsys.readouterr().err


def test_a_training_is_drawn_by_its_kind():
    points = {"epoch": [0.5, 1.0], "held_out_loss": [3.0, 2.0]}
    kinds = [(True, 0, "silu"), (False, 0, "relu"), (True, 8, "silu")]
    curves = [pd.DataFrame(points).assign(gate=g, experts=e, activation=a, seed=0) for g, e, a in kinds]
    axes = training_figure(pd.concat(curves)).axes
    assert [one.get_title() for one in axes] == ["gate", "no gate", "experts"]
    assert all(len(one.lines) == 1 for one in axes)
