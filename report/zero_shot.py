"""Zero-shot accuracy by task and method, with paired differences over the items."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.cells import WIN, method_labels, rank, strictness
from report.curves import panels
from report.figures import METHOD_STYLE
from report.grid import MISSING, Grid, with_error
from report.runs import Run, missing_text

Scores = dict[str, dict[str, Any]]
"""The accuracies of one run by task: the metrics of its record."""
LEGEND = (
    "Accuracy in %, 0-shot, ± one standard error over items. Δ mean: difference of the mean to Wanda's, with the "
    "standard error of the paired difference over items; ≈: within two of them, no win. Bold: the highest mean of a "
    f"pattern and every other within two standard errors of it. {MISSING}: not run."
)


def scores_of(record: dict[str, Any]) -> Scores:
    """The accuracy of every task and the mean."""
    return {metric["dataset"]: metric for metric in record["metrics"] if metric["metric"] == "acc"}


def paired_mean_difference(scores: Scores, other: Scores) -> tuple[float, float]:
    """Difference of the mean accuracies over tasks, and its standard error from the items' differences."""
    tasks = [task for task in scores if task != "mean"]
    differences = [np.subtract(scores[task]["items"], other[task]["items"]) for task in tasks]
    variance = sum(d.var(ddof=1) / len(d) for d in differences) / len(tasks) ** 2
    return float(np.mean([d.mean() for d in differences])), math.sqrt(variance)


def zero_shot_grids(runs: list[Run], records: dict[str, dict[str, Any]]) -> list[Grid]:
    """One table for each model.

    Args:
        runs: found and missing ones.
        records: of the found runs, by their id.
    """
    grids = []
    labels = method_labels(runs)
    for model in dict.fromkeys(run.model for run in runs):
        own = sorted(
            (run for run in runs if run.model == model), key=lambda run: (strictness(run.pattern), rank(labels[run.id]))
        )
        scores = {run.id: scores_of(records[run.id]) for run in own if run.id in records}
        tasks = list(next(iter(scores.values()), {}))
        sizes = {task: next(iter(scores.values()))[task]["n"] for task in tasks}
        rows, bold = [], set()
        for index, run in enumerate(own):
            wanda = next((r for r in own if (r.method, r.pattern) == ("wanda", run.pattern) and r.id in scores), None)
            rows.append([run.pattern, labels[run.id], *_row(run, wanda, scores, tasks)])
            rivals = [scores[r.id] for r in own if r.pattern == run.pattern != "dense" and r.id in scores]
            if run.id in scores and len(rivals) > 1 and _unbeaten(scores[run.id], rivals):
                bold.add((index, 1 + len(tasks)))
        headers = ("Pattern", "Method", *(f"{task} (n = {sizes[task]})" for task in tasks), "Δ mean to Wanda")
        finished = [run for run in own if run.id in scores]
        facts = {"data": next((run.evaluation or "" for run in finished), "none")}
        facts["machine"] = "; ".join(sorted({run.machine for run in finished if run.machine})) or "none"
        if missing := [run for run in own if run.id not in scores]:
            facts["missing"] = missing_text(missing)
        grids.append(Grid(f"Zero-shot accuracy of {model}", headers, rows, facts, LEGEND, frozenset(bold)))
    return grids


def zero_shot_figure(runs: list[Run], records: dict[str, dict[str, Any]]) -> Figure:
    """Mean accuracy with its standard error: a panel for each model, methods from left to right, dense as a level."""
    models = list(dict.fromkeys(run.model for run in runs))
    figure, axes_list = panels(len(models), 0.1)
    for axes, model in zip(axes_list, models, strict=True):
        found = sorted((run for run in runs if run.model == model and run.id in records), key=lambda r: rank(r.method))
        for x, run in enumerate(run for run in found if run.method != "dense"):
            mean, style = scores_of(records[run.id])["mean"], METHOD_STYLE[run.method]
            value, error = 100 * mean["value"], 100 * mean["stderr"]
            axes.errorbar(x, value, error, color=style.color, marker=style.marker, markersize=4, capsize=2, lw=0.9)
        for run in found:
            if run.method == "dense":
                axes.axhline(100 * scores_of(records[run.id])["mean"]["value"], color="#000000", ls="--", lw=0.8)
        names = [run.method for run in found if run.method != "dense"]
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"{model}, {', '.join(dict.fromkeys(r.pattern for r in found if r.method != 'dense'))}")
        axes.set_ylabel("mean accuracy [%]")
        axes.margins(x=0.2)
    axes_list[-1].set_xlabel("dashed: dense; ± 1 standard error")
    return figure


def _row(run: Run, wanda: Run | None, scores: dict[str, Scores], tasks: list[str]) -> list[str]:
    if run.id not in scores:
        return [MISSING] * (len(tasks) + 1)
    own = scores[run.id]
    cells = [with_error(100 * own[task]["value"], 100 * own[task]["stderr"], ".1f") for task in tasks]
    if wanda is None or run.pattern == "dense":
        return [*cells, MISSING]
    if run is wanda:
        return [*cells, "reference"]
    mean, stderr = paired_mean_difference(own, scores[wanda.id])
    mark = "≈ " if abs(mean) <= WIN * stderr else ""
    return [*cells, mark + with_error(100 * mean, 100 * stderr, "+.1f")]


def _unbeaten(own: Scores, rivals: list[Scores]) -> bool:
    """Whether the best of the rivals cannot be told apart from it."""
    best = max(rivals, key=lambda scores: scores["mean"]["value"])
    mean, stderr = paired_mean_difference(best, own)
    return best is own or mean <= WIN * stderr
