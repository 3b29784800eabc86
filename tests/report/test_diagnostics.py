"""The diagnostics' tables and figure against the numbers they are made of."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm

from report.diagnostics import diagnostics_figure, diagnostics_frame, diagnostics_grids
from report.figures import write_figure

ROLES = ("gate", "up", "down")


def measured(factor: float = 1.0) -> dict:
    """Two methods on three blocks; wanda leaves `up` dense, dass has no number for the last block's `gate`."""
    return {
        "errors": {
            "wanda": {"gate": [0.1 * factor, 0.2, 0.3], "down": [0.1, 0.1, 0.1]},
            "dass": {"gate": [0.2, 0.4, None], "up": [0.1, 0.1, 0.4], "down": [0.1, 0.1, 0.1]},
        },
        "jaccard": {"wanda|dass": {"gate": [0.5, 0.6, None], "down": [1.0, 1.0, 1.0]}},
        "norms": {"cv": [0.5, 1.0, 1.5], "p90_p10": [2.0, None, 4.0], "reordered": [0.05, 0.1, 0.0]},
    }


def maps(axes: Axes) -> QuadMesh:
    (mesh,) = [child for child in axes.get_children() if isinstance(child, QuadMesh)]
    return mesh


def test_tables_hold_the_means_over_the_blocks_that_have_a_number() -> None:
    errors, overlaps, norms = diagnostics_grids({"one": measured(), "two": measured(4.0)}, {"pattern": "2:4"})
    assert errors.headers == ("Model", "Method", *ROLES)
    assert errors.rows == [
        ["one", "wanda", "0.200", "—", "0.100"],
        ["one", "dass", "0.300", "0.200", "0.100"],
        ["two", "wanda", "0.300", "—", "0.100"],
        ["two", "dass", "0.300", "0.200", "0.100"],
    ]
    assert overlaps.headers == ("Model", "Methods", "gate", "down")
    assert overlaps.rows[0] == ["one", "wanda, dass", "0.550", "1.000"]
    assert [row[1:] for row in norms.rows[:3]] == [
        ["mean", "1.000", "3.000", "0.050"],
        ["lowest", "0.500", "2.000", "0.000"],
        ["highest", "1.500", "4.000", "0.100"],
    ]
    assert all(grid.facts == {"pattern": "2:4"} for grid in (errors, overlaps, norms))


def test_no_run_yet_gives_empty_tables() -> None:
    assert [grid.rows for grid in diagnostics_grids({}, {"missing": "2 runs"})] == [[], [], []]
    assert diagnostics_frame({}).empty


def test_the_frame_has_one_row_for_each_number() -> None:
    frame = diagnostics_frame({"one": measured(), "two": measured()})
    assert len(frame) == 2 * (5 * 3 + 2 * 3 + 3 * 3)
    chosen = frame.query("model == 'two' and measure == 'errors' and methods == 'dass' and role == 'gate'")
    assert chosen.value.tolist()[:2] == [0.2, 0.4] and np.isnan(chosen.value.tolist()[2])
    assert chosen.block.tolist() == [0, 1, 2]


def test_the_maps_show_the_numbers_of_each_method_and_block() -> None:
    figure = diagnostics_figure({"one": measured(), "two": measured(4.0)})
    panels = figure.axes[:15]  # five rows of three; colour bars follow
    gate = maps(panels[0]).get_array()
    assert gate is not None and gate.tolist() == [[0.1, 0.2, 0.3], [0.2, 0.4, None]]
    up = maps(panels[1]).get_array()
    assert up is not None and up.tolist() == [[None] * 3, [0.1, 0.1, 0.4]]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["wanda", "dass"]
    assert [tick.get_text() for tick in panels[3].get_yticklabels()] == ["wanda, dass"]
    assert [panel.get_title() for panel in panels[:3]] == ["gate", "one\nup", "down"]
    cv, spread, _ = panels[12:]
    assert [list(line.get_ydata()) for line in cv.lines] == [[0.5, 1.0, 1.5]] * 2
    assert np.isnan(np.asarray(spread.lines[0].get_ydata())[1])
    assert len({line.get_linestyle() for line in cv.lines}) == 2


def test_one_colour_is_one_number_in_all_models() -> None:
    figure = diagnostics_figure({"one": measured(), "two": measured(4.0)})
    limits = {(maps(axes).norm.vmin, maps(axes).norm.vmax) for axes in (*figure.axes[:3], *figure.axes[6:9])}
    assert limits == {(0.1, 0.4)}
    assert not isinstance(maps(figure.axes[0]).norm, LogNorm)


def test_colours_are_logarithmic_where_errors_span_decades_and_tell_two_of_them_apart() -> None:
    for factor, low in ((0.1, 0.01), (0.0001, 0.004)):
        norm = maps(diagnostics_figure({"one": measured(factor)}).axes[0]).norm
        assert isinstance(norm, LogNorm)
        assert (norm.vmin, norm.vmax) == pytest.approx((low, 0.4))


def test_as_wide_as_a_page_with_embedded_fonts(tmp_path: Path) -> None:
    figure = diagnostics_figure({"one": measured()})
    assert figure.get_size_inches()[0] == 6.9
    pdf = write_figure(lambda: figure, tmp_path, "diagnostics")[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
