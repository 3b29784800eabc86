"""Whether a criterion's choice stays the right one: loss and overlap of the masks while training goes on."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from report.figures import draw
from report.grid import MISSING, Grid, marked, number, recorded
from report.tables import Difference

STABILITY_LEGEND = (
    "Loss on the held-out text, nats per token, ± one standard error over windows. Bold: the lowest of a step and "
    "every other within two standard errors of it, paired over windows. Overlap: weights kept by both the mask and the "
    "one that the method would choose now, over those kept by at least one. Exchanged: loss with that one in its "
    "place, minus the loss; negative: the choice is no longer the right one; ≈: within two standard errors. "
    f"{MISSING}: not run."
)
ABOUT = ["table", "facts", "model", "pattern", "method", "label", "rank", "run"]
POINT = ["step", "loss", "windows", "overlap", "exchanged", "exchanged_windows"]


def stability_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each model, method and evaluated step: its loss, `windows`, `overlap`, and the loss if exchanged."""
    rows = []
    for cell in cells.itertuples():
        for run in cell.runs[:1]:
            about = {"table": cell.table, "facts": cell.facts, "model": cell.model, "pattern": str(cell.pattern)}
            about |= {"method": cell.method, "label": cell.label, "rank": cell.rank, "run": run}
            points = (run.record or {}).get("training") or [{}]
            rows += [about | {"step": None} | point for point in points]
    return pd.DataFrame(rows, columns=[*ABOUT, *POINT])


def paired(one: list[float], other: list[float]) -> Difference:
    """The mean of the differences of windows, and its standard error."""
    d = np.subtract(one, other)
    return Difference(float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else 0.0)


def stability_grids(frame: pd.DataFrame) -> list[Grid]:
    """One table for each model: a row for each step and method; the facts name the best at the start and at the end."""
    grids = []
    for _, own in frame.groupby("table", sort=False):
        own = own.sort_values(["pattern", "step", "rank", "label"], kind="stable").reset_index(drop=True)
        best = {index for _, step in own.groupby(["pattern", "step"]) for index in _unbeaten(step)}
        rows = [_row(point) for point in own.itertuples()]
        seen = own[own.step.notna()]
        facts = dict(own.facts.iloc[0])
        for name, step in (("best before", seen.step.min()), ("best after", seen.step.max())):
            at = seen[seen.step == step]
            facts[name] = ", ".join(at.label[index] for index in at.index if index in best) or MISSING
        bold = frozenset((index, 3) for index in best)
        behind = recorded([run] for run in own.run)
        title = f"Training under the mask, {facts['model']}"
        grids.append(Grid(title, pd.DataFrame(rows), facts, STABILITY_LEGEND, bold, words=2, runs=behind))
    return grids


def stability_figure(frame: pd.DataFrame) -> Figure:
    """Loss over steps, the one with the mask chosen anew dotted, and overlap over steps; panels for each model."""
    points: list[dict[str, Any]] = []
    for point in frame[frame.step.notna()].itertuples():
        about = {"x": point.step, "label": point.label, "method": point.method, "rank": point.rank, "source": None}
        panel, error = f"{point.model}, {point.pattern}", _stderr(point.windows)
        loss = about | {"panel": f"{panel}: loss", "ylabel": "loss [nats]", "error": error}
        points.append(loss | {"y": point.loss, "is_open": False})
        points.append(loss | {"y": point.exchanged, "error": 0.0, "is_open": True})
        overlap = {"panel": f"{panel}: overlap", "ylabel": "overlap (Jaccard)", "error": 0.0, "is_open": False}
        points.append(about | overlap | {"y": point.overlap})
    ordered = pd.DataFrame(points).sort_values("panel", kind="stable")
    return draw(ordered, "steps of training", "dotted, open: with the mask that would be chosen now")


def _row(point: Any) -> dict[str, str]:
    known = point.step is not None and not math.isnan(point.step)
    changed = marked(paired(point.exchanged_windows, point.windows), "+.4f") if known else MISSING
    return {
        "Pattern": point.pattern,
        "Method": point.label,
        "Step": f"{point.step:.0f}" if known else MISSING,
        "Loss": number(point.loss, ".4f", _stderr(point.windows)) if known else MISSING,
        "Overlap": number(point.overlap, ".3f") if known else MISSING,
        "Exchanged": changed,
    }


def _unbeaten(step: pd.DataFrame) -> list[int]:
    """Which rows of a step are the best, or cannot be told apart from it; none where nothing can be compared."""
    if len(step) < 2:
        return []
    best = step.windows[step.loss.astype(float).idxmin()]
    return [index for index, windows in step.windows.items() if not paired(windows, best).counts]


def _stderr(windows: list[float]) -> float:
    return float(np.std(windows, ddof=1) / math.sqrt(len(windows))) if len(windows) > 1 else 0.0
