"""The tables against numbers computed by hand with numpy."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dass.records import read_records, write_record
from report import grid
from report.reading import missing_run, runs_of
from report.rows import beyond_noise, comparison, perplexity_grid, side_by_side
from report.runs import DENSE, Pattern, Run, frame_of
from report.tables import cells_of
from tests.report.records import identify, losses, make_record, write_example

STRICT, HALF = Pattern.of(None, 2, 4), Pattern.of(0.5, None, None)


def to_markdown(cells: pd.DataFrame) -> str:
    return grid.to_markdown([perplexity_grid(table) for _, table in cells.groupby("table")])


def to_latex(cells: pd.DataFrame) -> str:
    return grid.to_latex([perplexity_grid(table) for _, table in cells.groupby("table")])


def best(cells: pd.DataFrame, pattern: Pattern) -> set[str]:
    return set(cells[cells.is_best & (cells.pattern == pattern)].label)


def rows_of(cells: pd.DataFrame) -> list[tuple[str, str]]:
    return [(str(cell.pattern), cell.label) for cell in cells.itertuples()]


def table_of(*records: dict) -> pd.DataFrame:
    cells = cells_of(runs_of(list(records)))
    assert cells.table.nunique() == 1
    return cells


def members(cells: pd.DataFrame) -> list[list[str]]:
    """The runs of each table."""
    return sorted(sorted(run.id for runs in table.runs for run in runs) for _, table in cells.groupby("table"))


def markdown_rows(markdown: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each row behind (pattern, method)."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if line[:1] == "|"
    ]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def example_runs(folder: Path) -> list[Run]:
    write_example(folder)
    return runs_of(read_records(folder))


def test_numbers_of_a_row() -> None:
    wanda, dass = losses(0.4, 0.02), losses(0.25, 0.03)
    markdown = to_markdown(table_of(make_record("w", "wanda", wanda), make_record("d", "dass", dass)))

    difference = dass - wanda
    perplexity = np.exp(dass.mean())
    stderr = perplexity * dass.std(ddof=1) / 4
    paired = difference.std(ddof=1) / 4
    assert markdown_rows(markdown)["2:4", "dass"] == [
        f"**{perplexity:.2f} ± {stderr:.2f}**",
        f"−{abs(difference.mean()):.4f} ± {paired:.4f}",
        f"{perplexity / np.exp(wanda.mean()):.3f}",
        "50.0%",
        "37.5%",
    ]
    assert "wiki, 16 windows × 256 tokens (bos: tokenizer), 4096 tokens counted" in markdown
    assert "c4_sample, 8 sequences × 128 tokens (bos: none)" in markdown
    assert "toy (float32)" in markdown and "Some CPU, 2 threads" in markdown and "seeds: 0" in markdown


def test_a_clear_win_is_bold_alone_and_a_draw_is_not_called_a_win(tmp_path: Path) -> None:
    table = cells_of(example_runs(tmp_path))
    assert best(table, STRICT) == {"dass"}
    assert best(table, HALF) == {"dass", "sparsegpt"}
    bold = {key for key, row in markdown_rows(to_markdown(table)).items() if "**" in row[0]}
    assert bold == {("2:4", "dass"), ("50%", "dass"), ("50%", "sparsegpt")}
    assert to_latex(table).count(r"\textbf{") == 3


@pytest.mark.parametrize(("ratio", "draw"), [(1.9, True), (2.1, False)])
def test_two_standard_errors_are_the_border(ratio: float, draw: bool) -> None:
    noise = np.cos(3.7 * np.arange(16))
    noise -= noise.mean()
    stderr = noise.std(ddof=1) / 4
    wanda, dass = losses(0.0), losses(0.0) + noise - ratio * stderr
    table = table_of(make_record("w", "wanda", wanda), make_record("d", "dass", dass))
    assert best(table, STRICT) == ({"wanda", "dass"} if draw else {"dass"})
    assert markdown_rows(to_markdown(table))["2:4", "dass"][1].startswith("≈") == draw


def test_single_windows_are_not_compared_and_nothing_is_bold() -> None:
    records = [make_record(name, name, losses(shift, n=1)) for name, shift in (("wanda", 0.9), ("dass", 0.1))]
    table = table_of(*records)
    assert markdown_rows(to_markdown(table))["2:4", "dass"][:2] == [f"{np.exp(3.1):.2f}", "—"]
    assert "**" not in to_markdown(table)


def test_what_lacks_draws_is_compared_with_nothing_and_not_bold() -> None:
    wanda = [make_record(f"w{seed}", "wanda", losses(0.3 + seed / 100), seed=seed) for seed in range(3)]
    assert best(table_of(*wanda, make_record("d", "dass", losses(0.2))), STRICT) == set()


def test_one_method_alone_has_beaten_nothing() -> None:
    alone = table_of(make_record("d", "dass", losses(0.1)), make_record("0", "dense", losses(0)))
    assert not alone.is_best.any()


def test_a_cell_that_was_not_run_is_missing_and_not_zero(tmp_path: Path) -> None:
    markdown = to_markdown(cells_of(example_runs(tmp_path)))
    assert markdown_rows(markdown)["50%", "magnitude"] == ["—"] * 5
    assert markdown_rows(markdown)["dense", "dense"][1:] == ["—"] * 4


def test_a_variant_is_not_missed_where_another_of_its_method_was_run() -> None:
    main = [make_record(f"m{pattern}", "dass", losses(0.1), pattern, alpha=0.5) for pattern in ("2:4", "50%")]
    rows = table_of(*main, make_record("a", "dass", losses(0.2), alpha=1.0))
    assert rows_of(rows) == [("50%", "dass (alpha=0.5)"), ("2:4", "dass (alpha=0.5)"), ("2:4", "dass (alpha=1.0)")]


def test_order_of_patterns_and_methods() -> None:
    runs = [
        make_record(f"{method}{i}", method, losses(0.1 + 0.01 * i), pattern)
        for i, pattern in enumerate(("2:4", "50%", "4:8"))
        for method in ("zeta", "dass", "alps", "wanda", "magnitude", "sparsegpt")
    ]
    rows = table_of(*runs, make_record("0", "dense", losses(0)))
    methods = ["magnitude", "wanda", "sparsegpt", "dass", "alps", "zeta"]
    expected = [(pattern, method) for pattern in ("50%", "4:8", "2:4") for method in methods]
    assert rows_of(rows) == [("dense", "dense"), *expected]


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    seeds = [losses(0.1), losses(0.2), losses(0.3)]
    wanda = losses(0.19, 0.01)
    records = [make_record(f"d{seed}", "dass", each, seed=seed) for seed, each in enumerate(seeds)]
    records += [make_record(f"w{seed}", "wanda", wanda, seed=seed) for seed in (5, 6)]
    table = table_of(*records)
    perplexities = np.exp([each.mean() for each in seeds])
    perplexity, delta, *_ = markdown_rows(to_markdown(table))["2:4", "dass"]
    assert f"{perplexities.mean():.2f} ±" in perplexity
    assert f"(3 draws, sd {perplexities.std(ddof=1):.2f})" in perplexity
    difference = np.mean(seeds, axis=0) - wanda
    stderr = np.sqrt(difference.var(ddof=1) / 16 + 0.1**2 / 3)  # windows and seeds
    assert delta == f"≈ +{difference.mean():.4f} ± {stderr:.4f}"
    assert table.facts.iloc[0]["seeds"] == "0, 1, 2, 5, 6"


def test_overrides_get_rows_of_their_own() -> None:
    axes = ({"gate": "out", "down": "in"}, {"gate": "in", "down": "in"})
    records = [
        make_record(f"d{alpha}{i}", "dass", losses(0.1), alpha=alpha, axis=axis)
        for alpha in (0.25, 0.5)
        for i, axis in enumerate(axes)
    ]
    expected = {f"dass (alpha={alpha}, axis.gate={gate})" for alpha in (0.25, 0.5) for gate in ("in", "out")}
    assert set(table_of(*records).label) == expected


def test_runs_that_differ_in_something_unknown_are_not_averaged() -> None:
    table = table_of(make_record("a", "dass", losses(0.1)), make_record("b", "dass", losses(0.9)))
    assert list(table.label) == ["dass [a]", "dass [b]"]


def test_the_reference_is_the_published_wanda_among_its_variants() -> None:
    options = [{"axis": {"gate": gate}, "update": "none"} for gate in ("in", "out")]
    inside, outside = (make_record(str(i), "wanda", losses(0.1), **given) for i, given in enumerate(options))
    both, alone = table_of(inside, outside), table_of(outside)
    assert list(both[both.is_reference].label) == ["wanda (axis.gate=in)"]
    assert list(alone[alone.is_reference].label) == ["wanda"]
    records = [inside, make_record("h", "wanda", losses(0.2), "50%", **options[1])]
    mixed = table_of(*records, make_record("d", "dass", losses(0.1), "50%"))
    assert list(mixed[mixed.is_reference].pattern) == [STRICT] and mixed[mixed.pattern == HALF].delta.isna().all()


def test_dense_and_magnitude_stand_in_every_table_whose_calibration_they_do_not_use() -> None:
    dense, magnitude = make_record("0", "dense", losses(0)), make_record("m", "magnitude", losses(2))
    repaired = make_record("r", "magnitude", losses(1), update="obs")
    short, long = make_record("a", "wanda", losses(0.2)), make_record("b", "wanda", losses(0.1))
    long["config"]["calibration"]["n_sequences"] = 128
    cells = cells_of(runs_of([dense, magnitude, repaired, short, identify(long)]))
    assert members(cells) == [["0", "a", "m", "r"], ["0", "b", "m"]]
    headers = list(side_by_side(cells).frame)[2:]
    assert len(set(headers)) == 2 and all("sequences" in header for header in headers)
    assert grid.to_latex([side_by_side(cells)]).count(r"\begin{tabular}{llrr}") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"targets": "all"},
        {"exclude": "down_proj"},
        {"resolved": {"dtype": "float16"}},
        {"model": {"name": "toy", "dtype": "auto", "path": "elsewhere"}},
        {"evaluation": {"name": "wiki", "path": "other.txt", "seq_len": 256, "n_windows": 16, "bos": "tokenizer"}},
        {
            "calibration": {
                "name": "c4_sample",
                "path": None,
                "n_sequences": 8,
                "seq_len": 128,
                "bos": "none",
                "join": True,
            }
        },
    ],
)
def test_another_setting_makes_another_table(change: dict) -> None:
    one, other = make_record("a", "wanda", losses(0.2)), make_record("b", "dass", losses(0.1))
    assert members(cells_of(runs_of([one, other]))) == [["a", "b"]]
    other["config"] |= change
    assert members(cells_of(runs_of([one, identify(other)]))) == [["a"], ["b"]]


def test_broken_and_foreign_files_are_named_and_change_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = to_markdown(cells_of(example_runs(tmp_path)))
    (tmp_path / "cut.json").write_text('{"id": "cut", "config"')
    (tmp_path / "foreign.json").write_text('{"name": "package"}')
    (tmp_path / "copy.json").write_text((tmp_path / "4d.json").read_text())
    for run_id, change in (("hollow", {"config": {}}), ("edited", {"windows": [1.0] * 16})):
        write_record(tmp_path, make_record(run_id, "dass", losses(0)) | change)
    assert to_markdown(cells_of(runs_of(read_records(tmp_path)))) == before
    named = capsys.readouterr().err
    assert all(name in named for name in ("cut.json", "foreign.json", "copy.json", "hollow", "edited"))
    assert len(named.splitlines()) == 5


def test_csv_has_one_line_per_run_in_full_precision(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(frame_of(example_runs(tmp_path)).to_csv(index=False))))
    assert [row["id"] for row in rows] == ["0d", "1m", "2w", "3s", "4d", "5w", "6s", "7d"]
    values = [json.loads((tmp_path / f"{row['id']}.json").read_text())["metrics"][0]["value"] for row in rows]
    assert [float(row["perplexity"]) for row in rows] == values
    assert rows[4]["alpha"] == "0.5" and rows[4]["seq_len"] == "256" and rows[0]["calibration.n_sequences"] == ""


def test_columns_have_one_type_each(tmp_path: Path) -> None:
    types = frame_of(example_runs(tmp_path)).dtypes.astype(str)
    assert types[["alpha", "perplexity", "sparsity.ratio", "machine.memory_gb"]].eq("float64").all()
    assert types[["seed", "tokens", "sparsity.n", "calibration.n_sequences", "machine.threads"]].eq("Int64").all()
    assert types[["method", "update", "axis.gate", "model", "setting.evaluation"]].eq("string").all()


def test_a_parameter_named_like_a_field_of_a_run_has_a_column_of_its_own() -> None:
    plain, named = make_record("a", "noise", losses(0.2)), make_record("b", "noise", losses(0.3), seed=1)
    named["config"]["method"] |= {"seed": 7, "model": "uniform", "perplexity": 3.5, "n_windows": 2, "a": 0.5}
    frame = frame_of(runs_of([plain, identify(named)])).set_index("id")
    assert frame.loc["b", ["seed", "model", "n_windows"]].tolist() == [1, "toy", 16]
    assert frame.loc["b", "perplexity"] == pytest.approx(float(np.exp(losses(0.3).mean())))
    options = [f"method.{name}" for name in ("seed", "model", "perplexity", "n_windows")]
    assert frame.loc["b", [*options, "a"]].tolist() == [7, "uniform", 3.5, 2, 0.5]
    assert frame.loc["a", options].isna().all()


def test_latex_escapes_what_latex_would_read() -> None:
    name = "a_b&c#$~^"
    records = [make_record(method, method, losses(0.1), "50%", model=name) for method in ("wanda", "da_ss")]
    latex = to_latex(table_of(*records))
    assert r"a\_b\&c\#\$\textasciitilde{}\textasciicircum{} (float32)" in latex
    assert r"50\% & da\_ss &" in latex
    assert latex.isascii()
    assert not re.search(r"(?<!\\)[%#_~^]", latex)
    rows = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 3 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {6}
    assert latex.count("{") == latex.count("}") and (latex.count("$") - latex.count(r"\$")) % 2 == 0


def test_comparison_with_committed_records(tmp_path: Path) -> None:
    here = [make_record("a", "wanda", losses(0.1)), make_record("b", "dass", losses(0.2))]
    committed = [make_record("a", "wanda", losses(0.1) - 1e-5)]
    rows = {row[0]: row[2:] for row in comparison(runs_of(here), runs_of(committed)).frame.values.tolist()}
    assert rows["a"] == [
        "wanda",
        "2:4",
        f"{np.exp(losses(0.1).mean()):.4f}",
        f"{np.exp(losses(0.1).mean() - 1e-5):.4f}",
        "+0.001 %",
        "0.5%",
    ]
    assert rows["b"][-3:-1] == ["—", "no committed record"]
    assert beyond_noise(runs_of(here), runs_of(committed)) == []
    far = [make_record("a", "wanda", losses(0.1) - 0.006), make_record("b", "sparsegpt", losses(0.2), update="obs")]
    assert beyond_noise(runs_of(here), runs_of(far)) == ["a"]


@pytest.mark.parametrize("part", ["model", "evaluation"])
def test_other_contents_under_the_same_name_are_never_averaged_nor_compared(part: str) -> None:
    """A text edited between two runs, a checkpoint overwritten between two seeds."""
    wanda, dass = make_record("w", "wanda", losses(0.2)), make_record("d", "dass", losses(0.1))
    again = identify(make_record("e", "dass", losses(0.3), seed=1), **{part: "edited"})
    cells = cells_of(runs_of([wanda, dass, again]))
    assert members(cells) == [["d", "w"], ["e"]]
    facts = [table.facts.iloc[0][part] for _, table in cells.groupby("table")]
    assert len(set(facts)) == 2 and all("identity " in text for text in facts)


def test_the_same_contents_at_another_place_are_compared() -> None:
    one, other = make_record("a", "wanda", losses(0.2)), make_record("b", "dass", losses(0.1))
    other["config"]["model"] |= {"path": "/elsewhere"}
    table = table_of(one, other)
    assert best(table, STRICT) == {"dass"}


def test_an_edited_equation_is_another_row() -> None:
    records = [make_record(f"d{seed}", "dass", losses(0.1 + seed), seed=seed) for seed in (0, 1)]
    records[1]["identity"]["method"] = "edited"
    assert list(table_of(*records).label) == [
        f"dass [{records[0]['identity']['method']}, numerics 1]",
        "dass [edited, numerics 1]",
    ]


def test_a_missing_run_stands_where_it_would_and_says_why() -> None:
    found = runs_of([make_record("w", "wanda", losses(0.2)), make_record("0", "dense", losses(0))])
    config = make_record("d", "dass", losses(0.1), alpha=0.5)["config"]
    table = cells_of([*found, missing_run("d", config, True, "out of memory", found)])
    facts = table.facts.iloc[0]
    assert table.table.nunique() == 1
    assert facts["missing"] == "1 runs: out of memory" and facts["model"] == "toy (float32)"
    assert markdown_rows(to_markdown(table))["2:4", "dass"] == ["—"] * 5


def test_a_missing_run_stands_beside_records_from_before_a_setting_came() -> None:
    """A setting at its baseline is what the runs were that did not have it yet; another value is another text."""
    for value, tables in (("text", 1), ("body", 2)):
        found = runs_of([make_record("w", "wanda", losses(0.2)), make_record("0", "dense", losses(0))])
        config = make_record("d", "dass", losses(0.1), alpha=0.5)["config"]
        for part in ("calibration", "evaluation"):
            config[part]["field"] = value
        table = cells_of([*found, missing_run("d", config, True, "out of memory", found)])
        assert table.table.nunique() == tables


def test_a_failed_evaluation_is_a_missing_cell() -> None:
    failed = make_record("d", "dass", losses(0.1)) | {"metrics": [], "windows": []}
    failed["failed"] = {"evaluation": "the text is gone"}
    table = table_of(make_record("w", "wanda", losses(0.2)), failed)
    assert table.facts.iloc[0]["missing"] == "1 runs: the text is gone"
    assert markdown_rows(to_markdown(table))["2:4", "dass"][0] == "—"


def test_patterns_are_values_in_order_from_the_freest_to_the_strictest() -> None:
    patterns = [Pattern.of(None, 2, 4), Pattern.of(None, 4, 8), Pattern.of(0.7, None, None), HALF, DENSE]
    assert [str(pattern) for pattern in sorted(patterns)] == ["dense", "50%", "4:8", "2:4", "70%"]
    assert str(Pattern.of(0.125, None, None)) == "12.5%" and str(Pattern.of(None, 6, 8)) == "6:8"
