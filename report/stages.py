"""Reports of single runs, a row each: seconds and memory by stage, and zero-shot accuracy by task."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from report.figures import level, line, panels, style_of
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


def of_each(runs: list[Run], name: str) -> pd.DataFrame:
    """One tidy row for each entry that the record of a run has under a name, `stages` or `metrics`."""
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

    return _grids(runs, "Pruning time of", row, lambda runs: facts_of(runs, "calibration", "machine"), TIME_LEGEND)


def zero_shot_grids(runs: list[Run]) -> list[Grid]:
    """Accuracies, one table for each model on the same items."""
    sizes = {task: metric["n"] for run in runs for task, metric in run.accuracies.items()}

    def row(run: Run, rivals: list[Run]) -> dict[str, str]:
        shown = {}
        for task, n in sizes.items():
            metric = run.accuracies.get(task)
            text = with_error(100 * metric["value"], 100 * metric["stderr"], ".1f") if metric else MISSING
            best = max(rivals, key=lambda r: r.accuracies["mean"]["value"], default=run)
            unbeaten = best is run or (metric and not accuracy_difference(best, run).counts)
            shown[f"{task} (n = {n})"] = f"**{text}**" if task == "mean" and len(rivals) > 1 and unbeaten else text
        wanda = next((other for other in rivals if other.method == "wanda"), None)
        difference = accuracy_difference(run, wanda) if wanda and wanda is not run and run.accuracies else None
        text = "reference" if wanda is run else MISSING
        if difference:
            mark = "" if difference.counts else "≈ "
            text = mark + with_error(100 * difference.mean, 100 * difference.stderr, "+.1f")
        return shown | {"Δ mean to Wanda": text}

    return _grids(
        runs, "Zero-shot accuracy of", row, lambda runs: facts_of(runs, "evaluation", "machine"), ACCURACY_LEGEND
    )
