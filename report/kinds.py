"""The kinds of report: what `report:` in an experiment's file makes of its runs, as tables, a figure and numbers.

Adding one is a function from `Material` to `Report` and an entry in `KINDS`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from report.calibration import CalibrationSet, calibration_figure, calibration_grid
from report.cells import Table, build_tables
from report.curves import alpha_figure, curve_figure, difference_figure
from report.diagnostics import diagnostics_figure, diagnostics_frame, diagnostics_grids
from report.figures import perplexity_figure
from report.grid import Grid
from report.published import Published, beside_published
from report.runs import Run, missing_text
from report.tables import Contrast, frame, perplexity_grid, side_by_side
from report.times import time_figure, time_grids
from report.zero_shot import zero_shot_figure, zero_shot_grids


@dataclass(frozen=True)
class Material:
    """What a report is made of."""

    runs: list[Run]
    """All runs of the experiment, those without a record too."""
    records: dict[str, dict[str, Any]]
    """By the identity of the run."""
    published: list[Published]


@dataclass(frozen=True)
class Report:
    """What is written: tables, a figure (a function that draws it; None where there is nothing to draw), numbers."""

    grids: list[Grid]
    draw: Callable[[], Figure] | None
    frame: pd.DataFrame


def perplexity(material: Material) -> Report:
    """Perplexity by method and pattern, model by model, compared with Wanda."""
    return _compared(material, perplexity_figure)


def update(material: Material) -> Report:
    """A method's mask with the repair of the weights, compared with the same mask without it."""
    return _compared(material, perplexity_figure, "Δ loss by the update", "update=obs", "update=none")


def granularity(material: Material) -> Report:
    """Competition within an input column, compared with that within an output row."""
    return _compared(material, perplexity_figure, "Δ loss, out − in", "=out", "=in")


def alpha(material: Material) -> Report:
    """DaSS by its exponent, compared with alpha = 0."""
    return _compared(material, alpha_figure, "Δ loss to alpha=0", r"alpha=[\d.]+", "alpha=0")


def curve(material: Material) -> Report:
    """Perplexity over sparsity."""
    return _compared(material, curve_figure)


def glu_variants(material: Material) -> Report:
    """The methods' differences to Wanda, from one gate to the next."""

    def draw(tables: list[Table]) -> Figure:
        return difference_figure(tables, [table.facts["model"].split(" (")[0].replace("_", "\n") for table in tables])

    return _compared(material, draw)


def calibration(material: Material) -> Report:
    """Perplexity by the number of calibration sequences, their draw and their source, model by model."""
    sets = []
    for table in build_tables(material.runs):
        run = next((cell.runs[0] for cell in table.cells if cell.runs[0].calibration), None)
        if run is not None:
            sets.append(CalibrationSet(table, run.calibration_source, run.calibration_size))
    first = sets[0].source if sets else ""
    sets.sort(key=lambda one: (one.table.facts["model"], one.source != first, one.size))
    grids = [
        calibration_grid([one for one in sets if one.table.facts["model"] == model])
        for model in dict.fromkeys(one.table.facts["model"] for one in sets)
    ]
    found = any(cell.found and cell.method != "dense" for one in sets for cell in one.table.cells)
    usual = [one.table for one in sets if (one.source, one.size) == (first, 128)]  # sequences, as published
    grids += beside_published(usual, material.published)
    return Report(grids, (lambda: calibration_figure(sets)) if found else None, frame(material.runs))


def zero_shot(material: Material) -> Report:
    """Accuracy by task and method."""
    metrics = [
        {"id": run.id, "model": run.model, "method": run.method, "pattern": run.pattern, "evaluation": run.evaluation}
        | {key: metric[key] for key in ("dataset", "metric", "value", "stderr", "n")}
        for run in material.runs
        if run.id in material.records
        for metric in material.records[run.id]["metrics"]
    ]
    draw = (lambda: zero_shot_figure(material.runs, material.records)) if metrics else None
    return Report(zero_shot_grids(material.runs, material.records), draw, pd.DataFrame(metrics))


def pruning_time(material: Material) -> Report:
    """Seconds and memory by stage."""
    stages = [
        {"id": run.id, "model": run.model, "method": run.method, "pattern": run.pattern, "machine": run.machine}
        | {"stage": name, **stage}
        for run in material.runs
        if run.id in material.records
        for name, stage in material.records[run.id]["stages"].items()
    ]
    draw = (lambda: time_figure(material.runs, material.records)) if stages else None
    return Report(time_grids(material.runs, material.records), draw, pd.DataFrame(stages))


def diagnostics(material: Material) -> Report:
    """Errors, overlaps and norms, block by block."""
    found = [(run, material.records[run.id]["diagnostics"]) for run in material.runs if run.id in material.records]
    measured = {run.model: one for run, one in found}
    facts = {}
    if found:
        facts = {"calibration": found[0][0].calibration or "none", "pattern": found[0][0].pattern}
    if missing := [run for run in material.runs if run.id not in material.records]:
        facts["missing"] = missing_text(missing)
    grids = diagnostics_grids(measured, facts)
    return Report(grids, (lambda: diagnostics_figure(measured)) if measured else None, diagnostics_frame(measured))


KINDS: dict[str, Callable[[Material], Report]] = {
    kind.__name__: kind
    for kind in (
        perplexity,
        update,
        granularity,
        alpha,
        curve,
        glu_variants,
        calibration,
        zero_shot,
        pruning_time,
        diagnostics,
    )
}


def _compared(
    material: Material, draw: Callable[[list[Table]], Figure], header: str = "", option: str = "", instead: str = ""
) -> Report:
    """Full tables, one for each model; all models side by side; and published numbers, where there are any.

    With a `header`, each label that has an `option` (a regular expression) is also compared with the label that has
    another one `instead`.
    """
    tables = build_tables(material.runs)
    grids = [side_by_side(tables)] if len(tables) > 1 else []
    for table in tables:
        labels = {cell.label for cell in table.cells}
        others = {label: re.sub(option, instead, label) for label in labels if header and re.search(option, label)}
        contrast = Contrast(header, {label: other for label, other in others.items() if other in labels})
        grids.append(perplexity_grid(table, contrast if header else None))
    grids += beside_published(tables, material.published)
    drawn = [table for table in tables if any(cell.found and cell.method != "dense" for cell in table.cells)]
    return Report(grids, (lambda: draw(drawn)) if drawn else None, frame(material.runs))
