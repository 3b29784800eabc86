"""The kinds of report: what `report:` in an experiment's file makes of its runs, as tables, a figure and numbers.

Adding one is a function from `Material` to `Report` under `@kind`, in this file or in any that is imported before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dass.names import unknown
from report import figures, rows
from report.diagnostics import (
    comparison_facts,
    comparison_sets,
    diagnostics_figure,
    diagnostics_frame,
    diagnostics_grids,
)
from report.grid import MISSING, Grid
from report.hardware import hardware_figure, hardware_frame, hardware_grid
from report.orders import order_figure, order_frame, order_grid, variance_grid
from report.predictors import Measured
from report.repair import UPDATES, repair_figure, repair_frame, repair_grids
from report.runs import Run, frame_of
from report.stability import stability_figure, stability_frame, stability_grids
from report.tables import cells_of
from report.variants import (
    expert_figure,
    expert_frame,
    expert_grid,
    expert_runs,
    lead_figure,
    lead_frame,
    lead_grid,
    lead_settings,
    split,
)
from report.words import entries_of, facts_of

USUAL = 128  # calibration sequences, as published


@dataclass(frozen=True)
class Material:
    """What a report is made of."""

    runs: list[Run]  # all of the experiment, those without a record too
    published: pd.DataFrame  # as `read_published` gives them


@dataclass(frozen=True)
class Report:
    """What is written: tables, a figure (a function that draws it; None where there is nothing to draw), numbers."""

    grids: list[Grid]
    draw: Callable[[], Figure] | None
    frame: pd.DataFrame


Kind = Callable[[Material], Report]
Draw = Callable[[pd.DataFrame], Figure]
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
    return _compared(material, figures.perplexity_figure)


@kind
def update(material: Material) -> Report:
    """A method's mask with the repair of the weights, compared with the same mask without it."""
    return _compared(material, figures.perplexity_figure, "Δ loss by the update", lambda options: {"update": "none"})


@kind
def repair(material: Material) -> Report:
    """What each repair of mask or weights leaves of the differences between criteria."""
    frame = repair_frame(cells_of(material.runs))
    has_result = any(run.losses for update in UPDATES for run in frame[update] if run)
    return Report(repair_grids(frame), (lambda: repair_figure(frame)) if has_result else None, frame_of(material.runs))


@kind
def stability(material: Material) -> Report:
    """Loss and overlap of the masks while training goes on under them."""
    frame = stability_frame(cells_of(material.runs))
    has_result = frame.step.notna().any()
    return Report(
        stability_grids(frame), (lambda: stability_figure(frame)) if has_result else None, frame_of(material.runs)
    )


@kind
def granularity(material: Material) -> Report:
    """Competition within an input column, compared with that within an output row."""

    def within_rows(options: dict[str, Any]) -> dict[str, Any]:
        return {name: "in" for name, value in options.items() if name.startswith("axis.") and value == "out"}

    return _compared(material, figures.perplexity_figure, "Δ loss, out − in", within_rows)


@kind
def alpha(material: Material) -> Report:
    """DaSS by its exponent, compared with alpha = 0."""

    def without_norm(options: dict[str, Any]) -> dict[str, Any]:
        return {"alpha": 0} if "alpha" in options else {}

    return _compared(material, figures.alpha_figure, "Δ loss to alpha=0", without_norm, "reference")


@kind
def curve(material: Material) -> Report:
    """Perplexity over sparsity."""
    return _compared(material, figures.curve_figure)


@kind
def glu_variants(material: Material) -> Report:
    """The methods' differences to Wanda, from one gate to the next."""
    return _compared(material, figures.difference_figure)


@kind
def variants(material: Material) -> Report:
    """Models that differ in their MLPs alone, and what of these goes with DaSS's lead on Wanda."""
    scored, compared = split(material.runs)
    full = _compared(replace(material, runs=scored), figures.difference_figure)
    leads = lead_frame(material.runs)
    told = {name for *_, words in lead_settings(material.runs) for name in words}
    facts = facts_of([*scored, *compared], "evaluation", "pruned", "calibration", "seeds")
    grid = lead_grid(leads, {name: text for name, text in facts.items() if name not in told})
    draw = (lambda: lead_figure(leads)) if len(leads) else None
    return Report([grid, *full.grids] if len(leads) else full.grids, draw, leads if len(leads) else full.frame)


@kind
def experts(material: Material) -> Report:
    """Expert by expert, and the perplexity of the whole."""
    scored, compared = split(material.runs)
    full, found = _compared(replace(material, runs=scored), figures.perplexity_figure), expert_frame(compared)
    if found.empty:
        return full
    told = {name for _, words in expert_runs(compared) for name in words}
    facts = facts_of(compared, "model", "calibration", "seeds")
    grid = expert_grid(found, {name: text for name, text in facts.items() if name not in told})
    return Report([grid, *full.grids], lambda: expert_figure(found), found)


@kind
def order(material: Material) -> Report:
    """The orders of the neurons: what random ones do to a result, and what is gained by choosing one."""
    cells = cells_of(material.runs)
    frame = order_frame(cells)
    models = [own for _, own in frame.groupby("table")]
    grids = [make(own) for own in models for make in (order_grid, variance_grid)]
    grids = [grid for grid in grids if len(grid.frame)]
    return Report(grids, (lambda: order_figure(frame)) if any(frame.random) else None, frame_of(material.runs))


@kind
def hardware(material: Material) -> Report:
    """What it costs to comply with sparse tensor cores: perplexity beside the status and the bounds on speed-up."""
    cells = cells_of(material.runs)
    cells = cells[cells.runs.astype(bool)]  # 4:8 is for the axes alone, without most methods
    grids = [hardware_grid(table) for _, table in cells.groupby("table")]
    return Report(grids, _drawn(hardware_figure, cells), hardware_frame(material.runs))


@kind
def scale(material: Material) -> Report:
    """The methods' differences to Wanda over the size of the model."""
    return _compared(material, figures.scale_figure)


@kind
def calibration(material: Material) -> Report:
    """Perplexity by the number of calibration sequences, their draw and their source, model by model."""
    cells = cells_of(material.runs)
    cells = cells[cells.source.notna()]
    models = [facts["model"] for facts in cells.facts]
    cells = cells.assign(in_words=models, is_other=cells.source != next(iter(cells.source), None))
    cells = cells.sort_values(["in_words", "is_other", "sequences", "table", "rank", "label", "pattern"])
    grids = [rows.calibration_grid(own) for _, own in cells.groupby("in_words", sort=False)]
    grids += rows.beside_published(cells[~cells.is_other & (cells.sequences == USUAL)], material.published)
    return Report(grids, _drawn(figures.calibration_figure, cells), frame_of(material.runs))


@kind
def zero_shot(material: Material) -> Report:
    """Accuracy by task and method."""
    cells = cells_of(material.runs)
    grids = [rows.zero_shot_grid(table) for _, table in cells.groupby("table")]
    return Report(grids, _drawn(figures.zero_shot_figure, cells, "accuracy"), entries_of(material.runs, "metrics"))


@kind
def pruning_time(material: Material) -> Report:
    """Seconds and memory by stage."""
    cells = cells_of(material.runs)
    grids = [rows.time_grid(table) for _, table in cells.groupby("table")]
    return Report(grids, _drawn(figures.time_figure, cells, "pruning_seconds"), entries_of(material.runs, "stages"))


@kind
def diagnostics(material: Material) -> Report:
    """What methods do to each block, and what tells in advance which does best."""
    sets = comparison_sets(material.runs) or [{}]
    facts, missing = list(map(comparison_facts, sets)), facts_of(material.runs)
    differing = [name for name in facts[0] if len({one[name] for one in facts}) > 1]
    grids: list[Grid] = []
    measured: Measured = {}
    for behind, said in zip(sets, facts, strict=True):
        own = {model: run.record["diagnostics"] for model, run in behind.items() if run.record}
        known = {name: said[name] for name in said if name in ("calibration", "pattern", *differing)}
        for grid in diagnostics_grids(own, known | missing):
            models = [[row["Model"]] if "Model" in row else list(behind) for _, row in grid.frame.iterrows()]
            grids.append(replace(grid, runs=[[behind[model] for model in of_row] for of_row in models]))
        for model, found in own.items():
            title = ", ".join([model, *(said[name] for name in differing)])
            measured[f"{title}, {behind[model].id}" if title in measured else title] = found
    return Report(grids, (lambda: diagnostics_figure(measured)) if measured else None, diagnostics_frame(measured))


def _compared(
    material: Material, draw: Draw, header: str = "", changed: rows.Changed | None = None, same: str = MISSING
) -> Report:
    """Full tables, one for each model; all models side by side; and published numbers, where there are any."""
    cells = cells_of(material.runs)
    tables = [table for _, table in cells.groupby("table")]
    grids = [rows.side_by_side(cells)] if len(tables) > 1 else []
    grids += [rows.perplexity_grid(table, header, changed, same) for table in tables]
    grids += rows.beside_published(cells, material.published)
    return Report(grids, _drawn(draw, cells), frame_of(material.runs))


def _drawn(draw: Draw, cells: pd.DataFrame, measure: str = "perplexity") -> Callable[[], Figure] | None:
    """The figure of the tables in which a pruned model has a result; None where there is none."""
    found = cells[(cells.method != "dense") & cells[measure].notna()].table
    chosen = cells[cells.table.isin(found)]
    return (lambda: draw(chosen)) if len(chosen) else None
