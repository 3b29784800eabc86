"""The kinds of report against numbers computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from dass.errors import DassError
from report.figures import difference_figure
from report.grid import MISSING, to_latex, to_markdown
from report.kinds import KINDS, Material, find_kind
from report.reading import missing_run, runs_of
from report.rows import read_published
from report.tables import cells_of
from tests.report.records import identify, losses, make_record


def material(*records, missing=(), published="nowhere"):
    return Material([*runs_of(list(records)), *missing], read_published(Path(published)))


def rows_of(grid, *headers):
    """The named columns of a grid, by the words at the left of each row."""
    words = grid.frame.iloc[:, : grid.words].itertuples(index=False, name=None)
    return dict(zip(words, grid.frame[list(headers)].values.tolist(), strict=True))


def drawn(report):
    figure = report.draw()
    figure.draw_without_rendering()
    return figure


def test_alpha_is_compared_with_wanda_and_with_alpha_0():
    values = {"w": losses(0.3, 0.02), "a": losses(0.5, 0.01), "b": losses(0.2, 0.03)}
    report = KINDS["alpha"](
        material(
            make_record("w", "wanda", values["w"]),
            make_record("a", "dass", values["a"], alpha=0),
            make_record("b", "dass", values["b"], alpha=0.5),
        )
    )
    rows = rows_of(report.grids[0], "Δ loss to Wanda", "Δ loss to alpha=0")
    for column, other in ((0, "w"), (1, "a")):
        difference = values["b"] - values[other]
        text = f"−{abs(difference.mean()):.4f} ± {difference.std(ddof=1) / 4:.4f}"
        assert rows["2:4", "dass (alpha=0.5)"][column] == text
    assert rows["2:4", "dass (alpha=0)"][1] == "reference" and rows["2:4", "wanda"][1] == MISSING
    (axes,) = drawn(report).axes
    line = axes.containers[0].lines[0]
    assert list(line.get_xdata()) == [0, 0.5]
    assert line.get_ydata() == pytest.approx([np.exp(values[key].mean()) for key in "ab"])


def test_what_alpha_is_compared_with_may_be_missing():
    half, config = (
        make_record("b", "dass", losses(0.2), alpha=0.5),
        make_record("a", "dass", losses(0), alpha=0)["config"],
    )
    zero = missing_run("a", config, True, "out of memory", runs_of([half]))
    (grid,) = KINDS["alpha"](material(half, missing=[zero])).grids
    assert [row[1:] for row in grid.frame[["Method", "Perplexity", "Δ loss to alpha=0"]].values.tolist()] == [
        [MISSING, MISSING],
        [grid.frame.iat[1, 2], MISSING],
    ]


def test_an_update_is_compared_with_its_own_mask_without_it():
    without, repaired = losses(0.5, 0.02), losses(0.3, 0.05)
    report = KINDS["update"](
        material(
            make_record("w", "wanda", losses(0.4), update="none"),
            make_record("m", "magnitude", without, update="none"),
            make_record("n", "magnitude", repaired, update="obs"),
        )
    )
    rows = rows_of(report.grids[0], "Δ loss by the update")
    difference = repaired - without
    text = f"−{abs(difference.mean()):.4f} ± {difference.std(ddof=1) / 4:.4f}"
    assert rows["2:4", "magnitude (update=obs)"] == [text]
    assert rows["2:4", "magnitude (update=none)"] == [MISSING]


def calibration_records():
    for size in (8, 32):
        for seed in (0, 1, 2):
            for name, shift in (("wanda", 0.4), ("dass", 0.3)):
                values = losses(shift + 0.01 * seed - size / 1000, 0.02)
                record = make_record(f"{name}{size}{seed}", name, values, seed=seed)
                record["config"]["calibration"] |= {"n_sequences": size}
                yield identify(record)


def test_calibration_has_a_row_for_each_set_and_method():
    report = KINDS["calibration"](material(make_record("d", "dense", losses(0)), *calibration_records()))
    (grid,) = report.grids
    assert grid.frame.iloc[:, :4].values.tolist() == [
        ["c4_sample", method, size, "3"] for size in ("8", "32") for method in ("wanda", "dass")
    ]
    perplexities = [np.exp((losses(0.3 + 0.01 * seed - 0.008, 0.02)).mean()) for seed in (0, 1, 2)]
    assert grid.frame.iat[1, 4].startswith(f"{np.mean(perplexities):.2f} ± ")
    assert grid.frame.iat[1, 5] == f"{np.std(perplexities, ddof=1):.2f}"
    assert grid.facts["dense"] == f"{np.exp(losses(0).mean()):.2f}"
    assert len(drawn(report).axes) == 1


def zero_shot_record(run_id, method, items, pattern="2:4"):
    record = make_record(run_id, method, losses(0), pattern)
    record["config"]["evaluation"] = {"name": "zero_shot", "seq_len": None, "limit": None, "bos": "tokenizer"}
    record["config"]["evaluation"] |= {"n_windows": None, "path": None}
    scores = {
        task: (np.mean(right), math.sqrt(np.mean(right) * (1 - np.mean(right)) / (len(right) - 1)), right)
        for task, right in items.items()
    }
    record["metrics"] = [
        {"dataset": t, "metric": "acc", "value": v, "stderr": e, "n": len(r), "seq_len": None, "items": r}
        for t, (v, e, r) in scores.items()
    ]
    mean = {"dataset": "mean", "metric": "acc", "value": np.mean([v for v, _, _ in scores.values()])}
    mean |= {"stderr": math.hypot(*(e for _, e, _ in scores.values())) / len(scores), "n": 0, "seq_len": None}
    record["metrics"].append(mean)
    record["windows"] = []
    return identify(record)


def test_zero_shot_differences_are_paired_over_items():
    one = {"piqa": [1, 0, 1, 1, 0, 1, 0, 1] * 4, "arc_easy": [0, 0, 1, 0] * 6}
    other = {"piqa": [1, 1, 1, 1, 0, 1, 0, 1] * 4, "arc_easy": [0, 1, 1, 0] * 6}
    worse = {"piqa": [0, 0, 0, 1, 0, 0, 0, 0] * 4, "arc_easy": [0, 0, 0, 0] * 6}
    report = KINDS["zero_shot"](
        material(
            zero_shot_record("w", "wanda", one),
            zero_shot_record("d", "dass", other),
            zero_shot_record("m", "magnitude", worse),
        )
    )
    (grid,) = report.grids
    assert tuple(grid.frame.columns[2:]) == ("piqa (n = 32)", "arc_easy (n = 24)", "mean (n = 0)", "Δ mean to Wanda")
    rows = rows_of(grid, "piqa (n = 32)", "Δ mean to Wanda")
    d = [np.subtract(other[task], one[task]) for task in one]
    stderr = math.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / 2
    assert rows["2:4", "dass"] == [
        f"75.0 ± {100 * math.sqrt(0.75 * 0.25 / 31):.1f}",
        f"+{100 * np.mean([x.mean() for x in d]):.1f} ± {100 * stderr:.1f}",
    ]
    assert {grid.frame.iat[i, 1] for i, _ in grid.bold} == {"dass"}
    (axes,) = drawn(report).axes
    heights = [container.lines[0].get_ydata()[0] for container in axes.containers]
    assert heights == pytest.approx(
        [100 * np.mean([np.mean(x) for x in tasks.values()]) for tasks in (worse, one, other)]
    )
    assert len(report.frame) == 9 and set(report.frame["dataset"]) == {"piqa", "arc_easy", "mean"}


def test_a_draw_of_accuracies_is_marked():
    one, other = {"piqa": [1, 0] * 8, "arc_easy": [1, 0] * 8}, {"piqa": [1, 0] * 7 + [1, 1], "arc_easy": [1, 0] * 8}
    report = KINDS["zero_shot"](material(zero_shot_record("w", "wanda", one), zero_shot_record("d", "dass", other)))
    assert rows_of(report.grids[0], "Δ mean to Wanda")["2:4", "dass"][0].startswith("≈ ")
    assert len(report.grids[0].bold) == 2


def test_time_is_told_stage_by_stage():
    slow = make_record("s", "sparsegpt", losses(0))
    slow["stages"]["pruning"] = {"seconds": 24.68, "peak_memory_gb": 2.5, "peak_gpu_memory_gb": 1.25}
    report = KINDS["pruning_time"](material(make_record("w", "wanda", losses(0)), slow))
    rows = rows_of(report.grids[0], "pruning [s]", "Ratio to Wanda", "Memory [GB]", "GPU [GB]")
    assert rows == {
        ("2:4", "wanda"): ["12.3", "1.00", "1.00", "—"],
        ("2:4", "sparsegpt"): ["24.7", "2.00", "2.50", "1.25"],
    }
    heights = [container.lines[0].get_ydata()[0] for container in drawn(report).axes[0].containers]
    assert heights == pytest.approx([12.34, 24.68])


def test_a_curve_keeps_ratios_and_patterns_apart():
    records = [make_record(f"{p}", "wanda", losses(0.1 * i), p) for i, p in enumerate(("50%", "4:8", "2:4"))]
    (axes,) = drawn(KINDS["curve"](material(*records))).axes
    lines = [container.lines[0] for container in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[50.0], [50.0, 50.0]]
    assert [line.get_linestyle() for line in lines] == ["-", ":"]


def test_a_difference_within_two_standard_errors_is_drawn_open():
    records = [make_record("w", "wanda", losses(0.3)), make_record("s", "sparsegpt", losses(0.1, 0.02))]
    records.append(make_record("d", "dass", losses(0.3, 0.05)))
    figure = difference_figure(cells_of(runs_of(records)))
    faces = {line.get_color(): line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() in "^D"}
    assert faces == {"#009E73": "#009E73", "#D55E00": "white"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_experiment_without_any_record_is_a_table_of_missing_cells(kind):
    config = make_record("x", "wanda", losses(0))["config"]
    if kind == "zero_shot":
        config["evaluation"] |= {"name": "zero_shot"}
    run = missing_run("x", config, True, "the model is gated", [])
    report = KINDS[kind](material(missing=[run]))
    text = to_markdown(report.grids)
    assert "the model is gated" in text and "nan" not in text.lower()
    assert to_latex(report.grids).isascii()
    assert report.draw is None


def test_a_published_file_without_a_column_is_one_sentence(tmp_path):
    (tmp_path / "x.csv").write_text("model,value\nllama2_7b,5\n")
    with pytest.raises(DassError, match=r"x\.csv has no column metric"):
        read_published(tmp_path)


def test_models_have_calibration_tables_of_their_own():
    records = [make_record("d", "dense", losses(0)), *calibration_records()]
    others = [record | {"id": record["id"] + "x"} for record in calibration_records()]
    for record in others:
        record["config"] = record["config"] | {"model": {"name": "other", "dtype": "auto"}}
        identify(record)
    report = KINDS["calibration"](material(*records, *others))
    assert [grid.facts["model"] for grid in report.grids] == ["other (float32)", "toy (float32)"]
    assert [grid.facts["dense"] for grid in report.grids] == [MISSING, f"{np.exp(losses(0).mean()):.2f}"]


@pytest.mark.parametrize("damage", ["items", "stages", "diagnostics"])
def test_a_damaged_record_is_named_and_left_out(damage, capsys):
    record = zero_shot_record("z" * 16, "wanda", {"piqa": [1, 0, 1, 1], "arc_easy": [1, 1, 0, 0]})
    if damage == "items":
        record["metrics"][0]["items"] = [0, 0, 0, 0]
    elif damage == "stages":
        del record["stages"]["load"]["seconds"]
    else:
        record["config"]["method"] = {"name": "compare", "methods": ["wanda", "dass"]}
    assert runs_of([record]) == []
    assert "z" * 16 in capsys.readouterr().err


COLUMNS = "metric,dataset,model,method,pattern,value,seq_len,targets,source"


def test_published_numbers_stand_beside_ours_with_what_differs(tmp_path):
    rows = ["wikitext2-test,toy,wanda,2:4,11.02,256,mlp,one", "wikitext2-test,toy,dass,2:4,9,4096,all,another"]
    rows += ["wikitext2-test,other,dass,2:4,9,4096,all,of another model"]
    (tmp_path / "x.csv").write_text("\n".join([COLUMNS, *(f"perplexity,{row}" for row in rows)]) + "\n")
    records = [make_record(name, name, losses(0.2)) for name in ("wanda", "dass")]
    for record in records:
        record["config"]["evaluation"] |= {"name": "wikitext2", "n_windows": None}
        record["metrics"][0]["dataset"] = "wikitext2"
    grid = KINDS["perplexity"](material(*records, published=tmp_path)).grids[-1]
    ours = f"{np.exp(losses(0.2).mean()):.2f}"
    assert rows_of(grid, "Our perplexity", "Published perplexity", "Comparable") == {
        ("toy", "wanda", "2:4"): [ours, "11.02", "yes"],
        ("toy", "dass", "2:4"): [ours, "9", "no: sequence length, targets"],
    }


def test_competition_within_columns_is_compared_with_that_within_rows():
    inside, outside = losses(0.4, 0.02), losses(0.2, 0.03)
    axes = {"in": {"gate": "in", "down": "in"}, "out": {"gate": "out", "down": "in"}}
    records = [make_record("w", "wanda", losses(0.3), axis=axes["in"], update="none")]
    records += [make_record(name, "dass", x, axis=axes[name]) for name, x in (("in", inside), ("out", outside))]
    rows = rows_of(KINDS["granularity"](material(*records)).grids[0], "Δ loss, out − in")
    d = outside - inside
    text = f"−{abs(d.mean()):.4f} ± {d.std(ddof=1) / 4:.4f}"
    assert rows["2:4", "dass (axis.gate=out)"] == [text] and rows["2:4", "dass (axis.gate=in)"] == [MISSING]


def test_the_price_of_compliance_has_status_and_bounds_beside_perplexity():
    """One record is older than the audit."""
    audits = {
        "dense": ("dense", "none", 1.0, 1.0, 1.0),
        "wanda": ("gate, up, down: accelerated", "forward", 1.5, 1.3, 1.3),
        "dass": ("gate, up: not K-aligned; down: accelerated", "backward (dX = dY W), forward", 1.25, 1.1, 1.3),
    }
    made = []
    for index, (method, shift) in enumerate({"dense": 0.0, "wanda": 1.0, "dass": 0.5, "magnitude": 2.0}.items()):
        record = make_record(f"{index}", method, np.linspace(2, 3, 8) + shift, update="none")
        if method in audits:
            status, helps, prefill, packed, bitmask = audits[method]
            record["audit"] = {"status": status, "helps": helps, "prefill": prefill}
            record["audit"]["decode"] = {"packed": packed, "bitmask": bitmask}
        made.append(record)
    made.append(make_record("4", "wanda", np.linspace(2, 3, 8), pattern="4:8", update="none"))
    report = find_kind("hardware")(material(*made))
    (grid,) = report.grids
    assert len(grid.frame) == len(made)  # a method that a pattern was not meant for has no row there
    rows = grid.frame[grid.frame["Pattern"] != "4:8"].set_index("Method")
    assert rows["Status"]["dass"] == audits["dass"][0] and rows["Helps"]["wanda"] == "forward"
    bounds = ["Prefill, at most", "Decode, at most", "Decode, bitmask"]
    assert list(rows.loc["wanda"][bounds]) == ["1.50", "1.30", "1.30"]
    assert list(rows.loc["magnitude"][["Status", "Prefill, at most"]]) == ["—", "—"]
    assert report.frame.set_index("method").prefill["dass"] == 1.25
    (panel,) = drawn(report).axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1.50x", "1.25x"]


def test_an_unknown_kind_is_one_sentence_that_names_the_nearest():
    with pytest.raises(DassError, match="kind of report alhpa is unknown: did you mean alpha"):
        find_kind("alhpa")
