"""The figure: what it shows, how it looks to a publisher, and that it does not change by itself."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from dass.records import read_records
from report.figures import METHOD_STYLE, perplexity_figure, row_styles, write_figure
from report.reading import runs_of
from report.tables import cells_of
from tests.report.records import losses, make_record, write_example


def figure_of(*records: dict) -> Figure:
    return perplexity_figure(cells_of(runs_of(list(records))))


def heights(axes: Axes) -> list[float]:
    """Perplexities of the points, method by method, filled before open, the dense line left out."""
    return [float(y) for container in axes.containers for y in container[0].get_ydata()]


def test_every_point_stands_at_its_perplexity_and_dense_is_a_dashed_line() -> None:
    (axes,) = figure_of(
        make_record("0", "dense", losses(0)),
        make_record("w", "wanda", losses(0.2)),
        make_record("d", "dass", losses(0.1)),
        make_record("e", "dass", losses(0.05), "50%"),
    ).axes
    assert heights(axes) == pytest.approx(np.exp([losses(0.2).mean(), losses(0.1).mean(), losses(0.05).mean()]))
    places = [float(x) for container in axes.containers for x in container[0].get_xdata()]
    assert places == pytest.approx([1 - 0.08, 1 + 0.08, 0])
    (dense,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert np.asarray(dense.get_ydata())[0] == pytest.approx(np.exp(losses(0).mean()))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50%", "2:4"]
    assert axes.get_yscale() == "linear"


def test_the_axis_is_logarithmic_beyond_a_factor_of_five() -> None:
    (axes,) = figure_of(make_record("w", "wanda", losses(0)), make_record("m", "magnitude", losses(1.7))).axes
    assert axes.get_yscale() == "log"


def test_only_the_best_and_those_in_a_draw_are_filled() -> None:
    (axes,) = figure_of(
        make_record("w", "wanda", losses(0.2)),
        make_record("s", "sparsegpt", losses(0.101, 0.05)),
        make_record("d", "dass", losses(0.1, -0.05)),
    ).axes
    filled = [not same_color(container[0].get_markerfacecolor(), "white") for container in axes.containers]
    assert filled == [False, True, True]


def test_a_method_keeps_its_colour_and_its_variants_differ_in_the_marker() -> None:
    records = [make_record(f"d{alpha}", "dass", losses(0.1), alpha=alpha) for alpha in (0.25, 0.5)]
    styles = row_styles(cells_of(runs_of([*records, make_record("n", "new", losses(0.2))])))
    variants = [styles[f"dass (alpha={alpha})"] for alpha in (0.25, 0.5)]
    assert {style.color for style in variants} == {METHOD_STYLE["dass"].color}
    assert variants[0].marker != variants[1].marker
    assert styles["new"].color not in {style.color for style in METHOD_STYLE.values()}


def test_dense_alone_is_a_figure_too() -> None:
    (axes,) = figure_of(make_record("0", "dense", losses(0, n=1))).axes
    assert heights(axes) == [] and len(axes.lines) == 1


def test_one_panel_per_model() -> None:
    figure = figure_of(*(make_record(model, "wanda", losses(0.1), model=model) for model in ("one", "two")))
    assert [axes.get_title() for axes in figure.axes] == ["one (float32)", "two (float32)"]


def test_a_column_wide_vector_file_with_embedded_fonts_and_no_date(tmp_path: Path) -> None:
    write_example(tmp_path)
    cells = cells_of(runs_of(read_records(tmp_path)))
    assert perplexity_figure(cells).get_size_inches()[0] == 3.3

    def written(folder: str) -> list[bytes]:
        return [path.read_bytes() for path in write_figure(lambda: perplexity_figure(cells), tmp_path / folder, "x")]

    pdf, png = written("figures")
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert b"CreationDate" not in pdf and b"Matplotlib" not in png
    assert written("again") == [pdf, png]
