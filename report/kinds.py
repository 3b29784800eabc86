"""The kinds of report: what `report:` in an experiment's file makes of its runs, as tables, a figure and numbers.

Adding one is a function from `Material` to `Report` under `@kind`, in this file or in any that is imported before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dass.names import unknown
from report.calibration import calibration_grid, size, source
from report.curves import alpha_figure, calibration_figure, curve_figure, difference_figure, perplexity_figure
from report.diagnostics import diagnostics_figure, diagnostics_frame, diagnostics_grids
from report.grid import Grid
from report.perplexity import Counterpart, perplexity_grid, side_by_side
from report.published import beside_published
from report.runs import Run, frame_of
from report.single import entries_of, time_figure, time_grids, zero_shot_figure, zero_shot_grids
from report.tables import Table, build_tables
from report.words import calibration_words, facts_of, model_words


@dataclass(frozen=True)
class Material:
    """What a report is made of."""

    runs: list[Run]
    """All runs of the experiment, those without a record too."""
    published: pd.DataFrame
    """As `read_published` gives them."""


@dataclass(frozen=True)
class Report:
    """What is written: tables, a figure (a function that draws it; None where there is nothing to draw), numbers."""

    grids: list[Grid]
    draw: Callable[[], Figure] | None
    frame: pd.DataFrame


Kind = Callable[[Material], Report]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    """Register a kind of report; its name is what `report:` in `conf/experiment` says."""
    KINDS[function.__name__] = function
    return function


def find_kind(name: str) -> Kind:
    """A kind by its name; DassError if there is none."""
    if name not in KINDS:
        raise unknown("The kind of report", name, KINDS, "report")
    return KINDS[name]


@kind
def perplexity(material: Material) -> Report:
    """Perplexity by method and pattern, model by model, compared with Wanda."""
    return _compared(material, perplexity_figure)


@kind
def update(material: Material) -> Report:
    """A method's mask with the repair of the weights, compared with the same mask without it."""

    def mask_alone(options: dict[str, Any]) -> dict[str, Any] | None:
        return None if options["update"] in (None, "none") else options | {"update": "none"}

    return _compared(material, perplexity_figure, "Δ loss by the update", mask_alone)


@kind
def granularity(material: Material) -> Report:
    """Competition within an input column, compared with that within an output row."""

    def within_rows(options: dict[str, Any]) -> dict[str, Any] | None:
        across = {name: "in" for name, value in options.items() if name.startswith("axis.") and value == "out"}
        return options | across if across else None

    return _compared(material, perplexity_figure, "Δ loss, out − in", within_rows)


@kind
def alpha(material: Material) -> Report:
    """DaSS by its exponent, compared with alpha = 0."""

    def without_norm(options: dict[str, Any]) -> dict[str, Any] | None:
        return options | {"alpha": 0} if "alpha" in options else None

    return _compared(material, alpha_figure, "Δ loss to alpha=0", without_norm)


@kind
def curve(material: Material) -> Report:
    """Perplexity over sparsity."""
    return _compared(material, curve_figure)


@kind
def glu_variants(material: Material) -> Report:
    """The methods' differences to Wanda, from one gate to the next."""
    return _compared(material, difference_figure)


@kind
def calibration(material: Material) -> Report:
    """Perplexity by the number of calibration sequences, their draw and their source, model by model."""
    tables = [table for table in build_tables(material.runs) if any(run.calibrates for run in table.runs)]
    first = source(tables[0]) if tables else ""
    tables.sort(key=lambda table: (table.facts["model"], source(table) != first, size(table)))
    grids = [
        calibration_grid([table for table in tables if table.facts["model"] == model])
        for model in dict.fromkeys(table.facts["model"] for table in tables)
    ]
    usual = [table for table in tables if (source(table), size(table)) == (first, 128)]  # sequences, as published
    grids += beside_published(usual, material.published)
    return Report(grids, (lambda: calibration_figure(tables)) if _drawn(tables) else None, frame_of(material.runs))


@kind
def zero_shot(material: Material) -> Report:
    """Accuracy by task and method."""
    frame, runs = entries_of(material.runs, "metrics"), material.runs
    return Report(zero_shot_grids(runs), None if frame.empty else lambda: zero_shot_figure(runs), frame)


@kind
def pruning_time(material: Material) -> Report:
    """Seconds and memory by stage."""
    frame, runs = entries_of(material.runs, "stages"), material.runs
    return Report(time_grids(runs), None if frame.empty else lambda: time_figure(runs), frame)


@kind
def diagnostics(material: Material) -> Report:
    """Errors, overlaps and norms, block by block."""
    found = [run for run in material.runs if run.record]
    measured = {model_words(run): run.record["diagnostics"] for run in found if run.record}
    facts = {"calibration": calibration_words(found[0]), "pattern": str(found[0].pattern)} if found else {}
    grids = diagnostics_grids(measured, facts | facts_of(material.runs))
    return Report(grids, (lambda: diagnostics_figure(measured)) if measured else None, diagnostics_frame(measured))


def _compared(
    material: Material,
    draw: Callable[[list[Table]], Figure],
    header: str = "",
    counterpart: Counterpart | None = None,
) -> Report:
    """Full tables, one for each model; all models side by side; and published numbers, where there are any."""
    tables = build_tables(material.runs)
    grids = [side_by_side(tables)] if len(tables) > 1 else []
    grids += [perplexity_grid(table, header, counterpart) for table in tables]
    grids += beside_published(tables, material.published)
    drawn = _drawn(tables)
    return Report(grids, (lambda: draw(drawn)) if drawn else None, frame_of(material.runs))


def _drawn(tables: list[Table]) -> list[Table]:
    """Those with a result of a pruned model."""
    return [table for table in tables if any(cell.found and cell.variant.method != "dense" for cell in table.cells)]
