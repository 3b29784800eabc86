"""The diagnostics' tables and figure against the numbers they are made of."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from dass.manifests import Manifest
from report.diagnostics import diagnostics_figure, diagnostics_frame, diagnostics_grids
from report.figures import METHOD_STYLE, write_figure
from report.grid import to_latex
from report.kinds import KINDS, Material
from report.page import render_page
from report.predictors import PREDICTORS, blocks_frame, correlation
from report.reading import runs_of
from report.rows import read_published
from tests.report.records import PATTERNS, identify, make_record, plan

ROLES = ("gate", "up", "down")


def measured(factor: float = 1.0) -> dict:
    """Two methods on three blocks; wanda leaves `up` dense, dass has no number for the last block's `gate`."""
    return {
        "errors": {
            "wanda": {"gate": [0.1 * factor, 0.2, 0.3], "down": [0.1, 0.1, 0.1], "mlp": [0.1 * factor, 0.2, 0.4]},
            "dass": {
                "gate": [0.2, 0.4, None],
                "up": [0.1, 0.1, 0.4],
                "down": [0.1, 0.1, 0.1],
                "mlp": [0.2, 0.2, 0.1],
            },
        },
        "kept": {
            "wanda": {"gate": [0.75, 0.8, 0.85], "down": [0.7, 0.7, 0.7]},
            "dass": {"gate": [0.7, 0.8, 0.9], "up": [0.7, 0.8, 0.9], "down": [0.7, 0.7, 0.7]},
        },
        "jaccard": {"wanda|dass": {"gate": [0.5, 0.6, None], "down": [1.0, 1.0, 1.0]}},
        "norms": {
            "cv": [0.5, 1.0, 1.5],
            "p90_p10": [2.0, None, 4.0],
            "reordered": [0.05, 0.1, 0.0],
            "input_cv": [1.0, 1.0, 1.0],
            "input_p90_p10": [4.0, 2.0, 1.0],
        },
    }


def many(n: int = 12) -> dict:
    """Wanda, DaSS and another DaSS on blocks whose numbers go up and down; DaSS wins where the spread of n is large."""
    x = np.random.default_rng(0).random((8, n))
    mlp = {"wanda": x[0], "dass": x[0] * (1.5 - x[1]), "dass alpha=1.0": x[0] * (1.5 - x[1]) * (0.8 + 0.2 * x[2])}
    norms = {"cv": x[1] ** 2, "p90_p10": x[3], "reordered": x[4], "input_cv": x[5], "input_p90_p10": x[6]}
    by_role = {name: {"gate": x[2].tolist(), "up": x[3].tolist(), "down": x[4].tolist()} for name in mlp}
    return {
        "errors": {name: by_role[name] | {"mlp": values.tolist()} for name, values in mlp.items()},
        "kept": by_role | {"dass": {"gate": x[7].tolist(), "up": x[7].tolist()}},
        "jaccard": {},
        "norms": {name: values.tolist() for name, values in norms.items()},
    }


def test_tables_hold_the_means_over_the_blocks_that_have_a_number() -> None:
    grids = diagnostics_grids({"one": measured(), "two": measured(4.0)}, {"pattern": "2:4"})
    wins, _, errors, kept, overlaps, norms = grids
    assert wins.frame.values.tolist() == [
        ["one", "dass", "1 of 3 blocks", "1.000", "0.250", "2.000"],
        ["two", "dass", "2 of 3 blocks", "0.500", "0.250", "1.000"],
    ]
    assert list(errors.frame) == ["Model", "Method", *ROLES, "mlp"]
    assert errors.frame.values.tolist() == [
        ["one", "wanda", "0.200", "—", "0.100", "0.233"],
        ["one", "dass", "0.300", "0.200", "0.100", "0.167"],
        ["two", "wanda", "0.300", "—", "0.100", "0.333"],
        ["two", "dass", "0.300", "0.200", "0.100", "0.167"],
    ]
    assert list(kept.frame) == ["Model", "Method", *ROLES]
    assert kept.frame.values.tolist()[1] == ["one", "dass", "0.800", "0.800", "0.700"]
    assert list(overlaps.frame) == ["Model", "Methods", "gate", "down"]
    assert overlaps.frame.values.tolist()[0] == ["one", "wanda, dass", "0.550", "1.000"]
    assert [row[1:] for row in norms.frame.values.tolist()[:3]] == [
        ["median", "1.000", "3.000", "1.000", "2.000", "0.050"],
        ["lowest", "0.500", "2.000", "1.000", "1.000", "0.000"],
        ["highest", "1.500", "4.000", "1.000", "4.000", "0.100"],
    ]
    assert all(grid.facts["pattern"] == "2:4" for grid in grids)


def test_what_is_known_of_a_block_stands_beside_what_came_of_it() -> None:
    blocks = blocks_frame({"one": measured(), "two": measured(4.0)})
    assert blocks[["model", "method", "block"]].values.tolist() == [
        [m, "dass", b] for m in ("one", "two") for b in range(3)
    ]
    first, _, last = blocks[blocks.model == "one"].itertuples()
    assert (first.log_ratio, last.log_ratio) == (pytest.approx(math.log(2)), pytest.approx(math.log(0.25)))
    assert (first.cv_ratio, first.p90_p10_ratio, first.input_cv) == (0.5, 0.5, 1.0)
    assert (first.kept_gain, last.kept_gain) == (pytest.approx(-0.05), pytest.approx(0.05))  # wanda has no `up`
    assert first.own_errors == pytest.approx(math.log(2)) and np.isnan(last.own_errors)
    assert np.isnan(blocks.p90_p10_ratio[1])


def test_correlations_are_those_of_ranks_over_all_blocks_and_within_each_model() -> None:
    models = {"one": many(), "two": many(20)}
    grid = diagnostics_grids(models, {})[1]
    assert list(grid.frame) == ["Method", "Predictor", "All blocks", "one", "two"]
    assert len(grid.frame) == 2 * len(PREDICTORS) and set(grid.frame.Method) == {"dass", "dass alpha=1.0"}
    spread = [value for model in models.values() for value in model["norms"]["cv"]]
    errors = [model["errors"] for model in models.values()]
    ratios = [a / b for e in errors for a, b in zip(e["dass"]["mlp"], e["wanda"]["mlp"], strict=True)]
    expected = spearmanr(spread, ratios).statistic
    assert -1 <= expected < -0.9
    assert correlation(blocks_frame(models).query("method == 'dass'"), "cv") == pytest.approx(expected)
    assert grid.frame["All blocks"][0] == f"{expected:+.2f}".replace("-", "−")
    assert [grid.frame[name][0] for name in models] == ["−1.00", "−1.00"]
    said = grid.facts["in short"]
    wins = sum(ratio < 1 for ratio in ratios)
    assert f"in {wins} of 32 blocks of 2 models" in said and "the strongest is that of n: std / mean: " in said


def test_what_is_the_same_everywhere_has_no_rank() -> None:
    model = many()
    model["norms"]["cv"] = [1.0] * 12
    assert np.isnan(correlation(blocks_frame({"one": model}), "cv"))
    short = diagnostics_grids({"one": measured() | {"errors": {"dass": measured()["errors"]["dass"]}}}, {})
    assert len(short[0].frame) == len(short[1].frame) == 0  # nothing to compare with


def record(name: str, model: dict) -> dict:
    """A record of a comparison, as a run leaves it."""
    made = make_record(name, "compare", [3.0], model=name, methods=["wanda", "dass"])
    made |= {"diagnostics": model, "metrics": [], "windows": []}
    made["config"]["evaluation"] |= {"name": "none", "n_windows": None}
    made["sparsity"] |= {"targeted": 0.0, "linear": 0.0}
    return identify(made)


def test_the_kind_gives_tables_with_the_runs_behind_them() -> None:
    runs = runs_of([record("one", many()), record("two", many(20))])
    report = KINDS["diagnostics"](Material(runs, read_published(Path("nowhere"))))
    assert [len(grid.runs) for grid in report.grids] == [len(grid.frame) for grid in report.grids]
    assert [[run.model for run in behind] for behind in report.grids[0].runs] == [["one"]] * 2 + [["two"]] * 2
    assert [run.model for run in report.grids[1].runs[0]] == ["one", "two"]
    assert to_latex(report.grids).isascii() and report.draw is not None


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        ({"calibration": {"n_sequences": 16}}, "c4_sample, 16 sequences × 128 tokens (bos: none)"),
        ({"sparsity": PATTERNS["50%"]}, "50%"),
        ({"seed": 1}, "1"),
        ({"method": {"methods": ["wanda"]}}, "wanda"),
    ],
    ids=["sequences", "pattern", "seed", "methods"],
)
def test_each_setting_of_a_sweep_has_its_tables_with_its_facts(swept: dict[str, Any], said: str) -> None:
    """Of two models, of which one wants a BOS token."""
    numbers = [many(), many(20)]
    if "method" in swept:
        numbers[1] |= {part: {"wanda": numbers[1][part]["wanda"]} for part in ("errors", "kept")}
    records = []
    for model in ("one", "two"):
        for index, found in enumerate(numbers):
            made = record(f"{model}{index}", found)
            made["config"]["model"] |= {"name": model}
            made["config"]["calibration"] |= {"bos": "per_sequence" if model == "two" else "none"}
            for name, value in swept.items() if index else ():
                made["config"][name] = made["config"][name] | value if isinstance(value, dict) else value
            records.append(identify(made))
    report = KINDS["diagnostics"](Material(runs_of(records), read_published(Path("nowhere"))))
    assert len(report.grids) == 12
    for index, found in enumerate(numbers):
        errors = report.grids[6 * index + 2]
        assert {run.id for runs in errors.runs for run in runs} == {f"one{index}", f"two{index}"}
        mean = np.mean(found["errors"]["wanda"]["gate"])
        assert set(errors.frame[errors.frame.Method == "wanda"].gate) == {f"{mean:.3f}"}
        assert (said in errors.facts.values()) == bool(index)
    assert {f"one (float32), {said}", f"two (float32), {said}"} <= set(report.frame.model)
    assert report.draw is not None
    titles = [axes.get_title().replace("\n", " ") for axes in report.draw().axes]
    assert {f"one (float32), {said}", f"two (float32), {said}"} <= set(titles)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda one: one["kept"]["dass"]["gate"].pop(), "different numbers of blocks"),
        (lambda one: one["norms"]["input_cv"].pop(), "different numbers of blocks"),
        (lambda one: one["kept"]["dass"]["gate"].insert(0, 1.5), "kept.dass.gate.0"),
        (lambda one: one.pop("kept"), "kept"),
    ],
)
def test_contradictory_diagnostics_are_left_out(damage, sentence, capsys) -> None:
    model = many()
    damage(model)
    assert runs_of([record("one", model)]) == []
    assert sentence in capsys.readouterr().err


def test_a_page_tells_the_correlation_and_the_wins(tmp_path: Path) -> None:
    records = [record("one", many()), record("two", many(20))]
    manifest: Manifest = plan("diagnostics-small", records, "diagnostics")
    template = tmp_path / "x.template.md"
    template.write_text(
        '{{ blocks() | correlation("cv") | f("+.2f") }} {{ blocks("dass", "one") | correlation("cv") | f("+.2f") }} '
        '{{ (blocks("dass alpha=1.0", "two").log_ratio < 0).sum() }} {{ blocks() | length }}'
    )
    blocks = blocks_frame({"one": many(), "two": many(20)})
    both = correlation(blocks[blocks.method == "dass"], "cv")
    wins = (blocks[(blocks.method == "dass alpha=1.0") & (blocks.model == "two")].log_ratio < 0).sum()
    page = render_page(template, runs_of(records), [manifest]).split("\n\n")[1].split()
    assert page == [f"{both:+.2f}".replace("-", "−"), "−1.00", str(wins), "32"]


def test_no_run_yet_gives_empty_tables() -> None:
    assert [len(grid.frame) for grid in diagnostics_grids({}, {"missing": "2 runs"})] == [0] * 6
    assert diagnostics_frame({}).empty


def test_the_frame_has_one_row_for_each_number() -> None:
    frame = diagnostics_frame({"one": measured(), "two": measured()})
    assert len(frame) == 2 * (7 * 3 + 5 * 3 + 2 * 3 + 5 * 3)
    chosen = frame.query("model == 'two' and measure == 'errors' and methods == 'dass' and role == 'gate'")
    assert chosen.value.tolist()[:2] == [0.2, 0.4] and np.isnan(chosen.value.tolist()[2])
    assert chosen.block.tolist() == [0, 1, 2]


def test_the_figure_shows_the_numbers_of_each_model_and_block() -> None:
    figure = diagnostics_figure({"one": measured(), "two": measured(4.0)})
    panels = np.asarray(figure.axes).reshape(5, 2)
    assert [panel.get_title() for panel in panels[0]] == ["one", "two"]

    def values(row: int, label: str, column: int = 0) -> list[float]:
        [line] = [line for line in panels[row, column].lines if line.get_label() == label]
        return list(np.asarray(line.get_ydata()))

    assert values(0, "wanda") == [0.1, 0.2, 0.4] and values(0, "wanda", 1) == [0.4, 0.2, 0.4]
    assert values(1, "dass") == pytest.approx([math.log(2), 0, math.log(0.25)])
    assert values(2, "dass") == pytest.approx([0.7, 0.8, 0.9])
    assert values(3, "x (inputs)") == [4.0, 2.0, 1.0] and np.isnan(values(3, "n (neurons)")[1])
    assert values(4, "n (neurons)") == [0.5, 1.0, 1.5]
    colors = {line.get_label(): line.get_color() for line in panels[0, 0].lines}
    assert colors == {name: METHOD_STYLE[name].color for name in ("wanda", "dass")}
    [legend] = figure.legends
    assert [text.get_text() for text in legend.texts] == ["wanda", "dass", "n (neurons)", "x (inputs)"]


def test_a_variant_keeps_the_colour_of_its_method() -> None:
    lines = {line.get_label(): line for line in diagnostics_figure({"one": many()}).axes[0].lines}
    dass, other = lines["dass"], lines["dass alpha=1.0"]
    assert dass.get_color() == other.get_color() and dass.get_linestyle() != other.get_linestyle()


def test_errors_that_span_a_decade_are_logarithmic() -> None:
    for factor, scale in ((1.0, "linear"), (0.1, "log")):
        assert diagnostics_figure({"one": measured(factor)}).axes[0].get_yscale() == scale


def test_as_wide_as_a_page_with_embedded_fonts(tmp_path: Path) -> None:
    figure = diagnostics_figure({"one": measured()})
    assert figure.get_size_inches()[0] == 6.9
    pdf = write_figure(lambda: figure, tmp_path, "diagnostics")[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
