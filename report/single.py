"""Reports of single runs, a row each: seconds and memory by stage, and zero-shot accuracy by task."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from report.figures import legend, level, line, panels, style_of
from report.grid import MISSING, Grid, with_error
from report.runs import DENSE, Run
from report.tables import Difference, variants
from report.words import evaluation_words, facts_of, machine_words, model_words

STAGES = ("load", "calibration", "pruning")
TIME_LEGEND = (
    "Seconds by stage: reading the model, drawing the calibration tokens, and the walk over the blocks; peak memory of "
    "the walk: resident on the host, and allocated on the GPU where there is one. One run each, so that a few per cent "
    f"are noise. Ratio: where Wanda ran on the same machine. {MISSING}: there is no such stage, or the run is missing."
)
ACCURACY_LEGEND = (
    "Accuracy in %, 0-shot, ± one standard error over items. Δ mean: difference of the mean to Wanda's, with the "
    "standard error of the paired difference over items; ≈: within two of them, no win. Bold: the highest mean of a "
    f"pattern and every other within two standard errors of it. {MISSING}: not run."
)


def entries_of(runs: list[Run], name: str) -> pd.DataFrame:
    """One tidy row for each entry that the record of a run has under a name: `stages` or `metrics`."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        known = {"id": run.id, "model": model_words(run), "method": run.method, "pattern": str(run.pattern)}
        known |= {"evaluation": evaluation_words(run), "machine": machine_words(run)}
        found = run.record[name] if run.record else []
        entries = [{"stage": key, **stage} for key, stage in found.items()] if isinstance(found, dict) else found
        rows += [known | {key: value for key, value in entry.items() if key != "items"} for entry in entries]
    return pd.DataFrame(rows)


def time_grids(runs: list[Run]) -> list[Grid]:
    """Seconds and memory, one table for each model."""

    def row(run: Run, rivals: list[Run]) -> dict[str, str]:
        stages = run.record["stages"] if run.record else {}
        wanda = [r for r in rivals if r.method == "wanda" and machine_words(r) == machine_words(run)]
        ratio = run.pruning_seconds / wanda[0].pruning_seconds if run.pruning_seconds and wanda else None  # type: ignore[operator]
        walk = stages.get("pruning", {})
        return {
            **{f"{name} [s]": _number(stages.get(name, {}).get("seconds"), ".1f") for name in STAGES},
            "Ratio to Wanda": _number(ratio, ".2f"),
            "Memory [GB]": _number(walk.get("peak_memory_gb"), ".2f"),
            "GPU [GB]": _number(walk.get("peak_gpu_memory_gb"), ".2f"),
        }

    return _grids(runs, "Pruning time of", row, "calibration", TIME_LEGEND)


def zero_shot_grids(runs: list[Run]) -> list[Grid]:
    """Accuracies, one table for each model on the same items."""
    sizes = {task: metric["n"] for run in runs for task, metric in run.accuracies.items()}

    def row(run: Run, rivals: list[Run]) -> dict[str, str]:
        shown = {f"{task} (n = {n})": MISSING for task, n in sizes.items()}
        for task, metric in run.accuracies.items():
            shown[f"{task} (n = {sizes[task]})"] = with_error(100 * metric["value"], 100 * metric["stderr"], ".1f")
        wanda = next((other for other in rivals if other.method == "wanda"), None)
        text = "reference" if wanda is run else MISSING
        if wanda and wanda is not run and run.accuracies:
            difference = accuracy_difference(run, wanda)
            text = "" if difference.counts else "≈ "
            text += with_error(100 * difference.mean, 100 * difference.stderr, "+.1f")
        return shown | {"Δ mean to Wanda": text}

    def unbeaten(run: Run, rivals: list[Run]) -> bool:
        best = max(rivals, key=lambda other: other.accuracies["mean"]["value"], default=run)
        return (
            len(rivals) > 1 and bool(run.accuracies) and not (best is not run and accuracy_difference(best, run).counts)
        )

    return _grids(runs, "Zero-shot accuracy of", row, "evaluation", ACCURACY_LEGEND, unbeaten)


def accuracy_difference(run: Run, other: Run) -> Difference:
    """Mean accuracy over the tasks minus the other's, with the standard error of the items' differences."""
    tasks = [task for task in run.accuracies if task != "mean"]
    differences = [np.subtract(run.accuracies[task]["items"], other.accuracies[task]["items"]) for task in tasks]
    variance = sum(d.var(ddof=1) / len(d) for d in differences) / len(tasks) ** 2
    return Difference(float(np.mean([d.mean() for d in differences])), math.sqrt(variance))


def time_figure(runs: list[Run]) -> Figure:
    """Seconds of the walk by pattern and method."""
    return _figure(runs, "pruning [s]", lambda run: (run.pruning_seconds, 0.0))


def zero_shot_figure(runs: list[Run]) -> Figure:
    """Mean accuracy with its standard error by pattern and method; dense as a level."""

    def mean(run: Run) -> tuple[float | None, float]:
        metric = run.accuracies.get("mean")
        return (100 * metric["value"], 100 * metric["stderr"]) if metric else (None, 0.0)

    return _figure(runs, "mean accuracy [%]", mean)


def _by_model(runs: list[Run]) -> list[list[Run]]:
    """The runs of each model on the same evaluation, in reading order."""
    labels = variants(runs)
    settings = dict.fromkeys((run.setting.model, run.setting.dtype, run.setting.evaluation) for run in runs)
    ordered = sorted(runs, key=lambda run: (run.pattern, labels[run.id]))
    return [[run for run in ordered if (*run.setting[:3],) == setting] for setting in settings]


def _grids(
    runs: list[Run],
    title: str,
    row: Callable[[Run, list[Run]], dict[str, str]],
    fact: str,
    legend: str,
    is_bold: Callable[[Run, list[Run]], bool] = lambda run, rivals: False,
) -> list[Grid]:
    """One table for each model: `row` gets a run and those of its pattern that have a result, itself among them."""
    labels = variants(runs)
    grids = []
    for own in _by_model(runs):
        rows, bold = [], set()
        for index, run in enumerate(own):
            rivals = [other for other in own if other.pattern == run.pattern != DENSE and not other.why]
            shown = {"Pattern": str(run.pattern), "Method": labels[run.id].label, **row(run, rivals)}
            if is_bold(run, rivals):
                bold.add((index, len(shown) - 2))
            rows.append(shown)
        facts = facts_of(own, fact, "machine")
        grids.append(Grid(f"{title} {model_words(own[0])}", pd.DataFrame(rows), facts, legend, frozenset(bold)))
    return grids


def _figure(runs: list[Run], ylabel: str, value_of: Callable[[Run], tuple[float | None, float]]) -> Figure:
    """A panel for each model, a point for each run at its pattern; dense as a level."""
    models = _by_model(runs)
    figure, axes_list = panels(len(models))
    styles = {run.method: style_of(run.method) for own in models for run in own}
    for axes, own in zip(axes_list, models, strict=True):
        patterns = sorted({run.pattern for run in own} - {DENSE})
        for run in own:
            value, error = value_of(run)
            if value is None:
                continue
            if run.pattern == DENSE:
                level(axes, value, styles[run.method])
                continue
            rivals = [other for other in own if other.pattern == run.pattern]
            x = patterns.index(run.pattern) + 0.15 * (rivals.index(run) - (len(rivals) - 1) / 2)
            line(axes, [x], [value], [error], styles[run.method], False)
        axes.set_xticks(range(len(patterns)), list(map(str, patterns)))
        axes.set_xlim(-0.6, max(len(patterns), 1) - 0.4)
        axes.set_ylabel(ylabel)
        axes.set_title(model_words(own[0]))
    legend(figure, styles, "± 1 standard error where there is one", joined=False)
    return figure


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else f"{value:{form}}"
