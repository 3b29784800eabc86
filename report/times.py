"""Seconds and peak memory of each method, stage by stage."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.cells import method_labels, rank, strictness
from report.curves import panels
from report.figures import METHOD_STYLE
from report.grid import MISSING, Grid
from report.runs import Run, missing_text

STAGES = ("load", "calibration", "pruning")
LEGEND = (
    "Seconds by stage: reading the model, drawing the calibration tokens, and the walk over the blocks; peak memory of "
    "the walk: resident on the host, and allocated on the GPU where there is one. One run each, so that a few per cent "
    f"are noise. Ratio: where Wanda ran on the same machine. {MISSING}: there is no such stage, or the run is missing."
)


def time_grids(runs: list[Run], records: dict[str, dict[str, Any]]) -> list[Grid]:
    """One table for each model."""
    grids = []
    labels = method_labels(runs)
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        own.sort(key=lambda run: (strictness(run.pattern), rank(labels[run.id])))
        rows = []
        for run in own:
            same = ("wanda", run.pattern, run.machine)
            wanda = next((r for r in own if (r.method, r.pattern, r.machine) == same), None)
            rows.append(
                [run.pattern, labels[run.id], *_row(records.get(run.id), records.get(wanda.id) if wanda else None)]
            )
        headers = (
            "Pattern",
            "Method",
            *(f"{stage} [s]" for stage in STAGES),
            "Ratio to Wanda",
            "Memory [GB]",
            "GPU [GB]",
        )
        facts = {"calibration": next((run.calibration for run in own if run.calibration), "none")}
        facts["machine"] = "; ".join(sorted({run.machine for run in own if run.machine})) or "none"
        if missing := [run for run in own if run.id not in records]:
            facts["missing"] = missing_text(missing)
        grids.append(Grid(f"Pruning time of {model}", headers, rows, facts, LEGEND))
    return grids


def time_figure(runs: list[Run], records: dict[str, dict[str, Any]]) -> Figure:
    """Seconds of the walk: a panel for each model, a bar for each method and pattern."""
    models = list(dict.fromkeys(run.model for run in runs))
    figure, axes_list = panels(len(models), 0.1)
    for axes, model in zip(axes_list, models, strict=True):
        found = [run for run in runs if run.model == model and run.id in records]
        patterns = sorted({run.pattern for run in found}, key=strictness)
        methods = sorted({run.method for run in found}, key=rank)
        for run in found:
            x = patterns.index(run.pattern) + 0.2 * (methods.index(run.method) - (len(methods) - 1) / 2)
            axes.bar(x, run.pruning_seconds or np.nan, 0.18, color=METHOD_STYLE[run.method].color)
            axes.text(x, run.pruning_seconds or 0, run.method, rotation=90, ha="center", va="bottom", fontsize=6)
        axes.set_xticks(range(len(patterns)), patterns)
        axes.set_ylabel("pruning [s]")
        axes.set_title(model)
        axes.margins(y=0.45)
    return figure


def _row(record: dict[str, Any] | None, wanda: dict[str, Any] | None) -> list[str]:
    if record is None:
        return [MISSING] * (len(STAGES) + 3)
    stages = record["stages"]
    seconds = [f"{stages[stage]['seconds']:.1f}" if stage in stages else MISSING for stage in STAGES]
    pruning = stages["pruning"]
    ratio = f"{pruning['seconds'] / wanda['stages']['pruning']['seconds']:.2f}" if wanda else MISSING
    gpu = pruning.get("peak_gpu_memory_gb")
    return [*seconds, ratio, f"{pruning['peak_memory_gb']:.2f}", MISSING if gpu is None else f"{gpu:.2f}"]
