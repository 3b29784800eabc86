"""The diagnostics' tables and figure against the numbers they are made of."""

from pathlib import Path

import numpy as np

from report.diagnostics import diagnostics_figure, diagnostics_frame, diagnostics_grids
from report.figures import METHOD_STYLE, write_figure

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


def test_tables_hold_the_means_over_the_blocks_that_have_a_number() -> None:
    errors, overlaps, norms = diagnostics_grids({"one": measured(), "two": measured(4.0)}, {"pattern": "2:4"})
    assert list(errors.frame) == ["Model", "Method", *ROLES]
    assert errors.frame.values.tolist() == [
        ["one", "wanda", "0.200", "—", "0.100"],
        ["one", "dass", "0.300", "0.200", "0.100"],
        ["two", "wanda", "0.300", "—", "0.100"],
        ["two", "dass", "0.300", "0.200", "0.100"],
    ]
    assert list(overlaps.frame) == ["Model", "Methods", "gate", "down"]
    assert overlaps.frame.values.tolist()[0] == ["one", "wanda, dass", "0.550", "1.000"]
    assert [row[1:] for row in norms.frame.values.tolist()[:3]] == [
        ["mean", "1.000", "3.000", "0.050"],
        ["lowest", "0.500", "2.000", "0.000"],
        ["highest", "1.500", "4.000", "0.100"],
    ]
    assert all(grid.facts == {"pattern": "2:4"} for grid in (errors, overlaps, norms))


def test_no_run_yet_gives_empty_tables() -> None:
    assert [len(grid.frame) for grid in diagnostics_grids({}, {"missing": "2 runs"})] == [0, 0, 0]
    assert diagnostics_frame({}).empty


def test_the_frame_has_one_row_for_each_number() -> None:
    frame = diagnostics_frame({"one": measured(), "two": measured()})
    assert len(frame) == 2 * (5 * 3 + 2 * 3 + 3 * 3)
    chosen = frame.query("model == 'two' and measure == 'errors' and methods == 'dass' and role == 'gate'")
    assert chosen.value.tolist()[:2] == [0.2, 0.4] and np.isnan(chosen.value.tolist()[2])
    assert chosen.block.tolist() == [0, 1, 2]


def test_the_figure_shows_the_numbers_of_each_method_and_block() -> None:
    figure = diagnostics_figure({"one": measured(), "two": measured(4.0)})
    panels = figure.axes  # five rows of three
    lines = {line.get_label(): line for line in panels[0].lines}
    assert np.asarray(lines["wanda"].get_ydata()).tolist() == [0.1, 0.2, 0.3]
    assert np.isnan(np.asarray(lines["dass"].get_ydata())[2])
    assert {name: line.get_color() for name, line in lines.items()} == {
        name: METHOD_STYLE[name].color for name in ("wanda", "dass")
    }
    assert [line.get_label() for line in panels[1].lines] == ["dass"]
    assert [line.get_label() for line in panels[3].lines] == ["wanda, dass"]
    assert [panel.get_title() for panel in panels[:3]] == ["one, gate", "one, up", "one, down"]
    cv, spread, _ = panels[12:]
    assert [list(np.asarray(line.get_ydata())) for line in cv.lines] == [[0.5, 1.0, 1.5]] * 2
    assert np.isnan(np.asarray(spread.lines[0].get_ydata())[1])
    assert len({line.get_linestyle() for line in cv.lines}) == 2


def test_errors_that_span_a_decade_are_logarithmic() -> None:
    for factor, scale in ((1.0, "linear"), (0.1, "log")):
        assert diagnostics_figure({"one": measured(factor)}).axes[0].get_yscale() == scale


def test_as_wide_as_a_page_with_embedded_fonts(tmp_path: Path) -> None:
    figure = diagnostics_figure({"one": measured()})
    assert figure.get_size_inches()[0] == 6.9
    pdf = write_figure(lambda: figure, tmp_path, "diagnostics")[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
