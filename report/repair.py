"""What a repair of mask or weights leaves of the differences between criteria."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from report.figures import draw
from report.grid import MISSING, Grid, marked, number, recorded
from report.runs import DENSE, Run
from report.tables import METHOD_ORDER, paired_difference

UPDATES = ("none", "obs", "swap", "swap_obs", "mlp")
PERPLEXITY_LEGEND = f"Perplexity after each repair of the same method's mask. {MISSING}: not run."
SPREAD_LEGEND = (
    "Spread: standard deviation over the criteria of their mean loss, nats per token; ± its standard error over the "
    "windows (jackknife, the same windows left out of all). Left: spread over that of the same criteria without "
    "repair, ± alike. Worst − best: difference of the mean loss, paired over windows; ≈: within two standard errors. "
    f"{MISSING}: fewer than two criteria have a result."
)


def repair_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each model, pattern and method with its options, with one run for each repair in the columns `UPDATES`.

    Returns:
        The columns table, pattern, method, label (the method, and what tells its rows apart), facts, model and
        `UPDATES`, of which each is a run or None.
    """
    found = cells[(cells.pattern != DENSE) & cells.runs.astype(bool)]
    found = found.assign(run=[runs[0] for runs in found.runs])
    found = found.assign(update=[run.update or "none" for run in found.run])
    varied: dict[str, set[str]] = {}  # the options in which cells of a method differ that have the same repair
    for (_, _, method, _), own in found.groupby(["table", "pattern", "method", "update"]):
        names = {name for run in own.run for name in run.options}
        several = {name for name in names if len({str(run.options.get(name)) for run in own.run}) > 1}
        varied[method] = varied.get(method, set()) | several
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in found.itertuples():
        options = [
            f"{name}={cell.run.options[name]}" for name in sorted(varied[cell.method]) if name in cell.run.options
        ]
        key = (cell.table, cell.pattern, f"{cell.method} ({', '.join(options)})" if options else cell.method)
        if rows.get(key, {}).get(cell.update):  # it differs in something else, which its label tells
            key = (cell.table, cell.pattern, cell.label)
        start = {"method": cell.method, "facts": cell.facts, "model": cell.model}
        rows.setdefault(key, dict.fromkeys(UPDATES) | start)[cell.update] = cell.run
    ranks = {name: rank for rank, name in enumerate(METHOD_ORDER)}
    shown = [dict(zip(("table", "pattern", "label"), key, strict=True)) | row for key, row in rows.items()]
    shown.sort(key=lambda row: (row["table"], row["pattern"], ranks.get(row["method"], len(ranks)), row["label"]))
    return pd.DataFrame(shown, columns=["table", "pattern", "method", "label", "facts", "model", *UPDATES])


def jackknife(losses: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A statistic of losses `(..., n_windows)`, and its standard error over the windows."""
    n = losses.shape[-1]
    without = np.array([statistic(np.delete(losses, i, axis=-1)) for i in range(n)])
    return statistic(losses), math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())


def spread(losses: np.ndarray) -> float:
    """Standard deviation over criteria of their mean loss; losses `(n_criteria, n_windows)`."""
    return float(losses.mean(axis=1).std(ddof=1))


def left(losses: np.ndarray) -> float:
    """The second's spread over the first's; losses `(2, n_criteria, n_windows)`, without and with repair."""
    return spread(losses[1]) / spread(losses[0])


def repair_grids(frame: pd.DataFrame) -> list[Grid]:
    """For each model the perplexities by method and repair; and for all what is left of the spread."""
    grids = []
    for _, own in frame.groupby("table"):
        rows = [
            {"Pattern": str(row.pattern), "Method": row.label}
            | {update: number(run.perplexity if (run := getattr(row, update)) else None, ".2f") for update in UPDATES}
            for row in own.itertuples()
        ]
        facts = own.facts.iloc[0]
        behind = recorded([run for update in UPDATES if (run := getattr(row, update))] for row in own.itertuples())
        grids.append(Grid(f"Repairs of {facts['model']}", pd.DataFrame(rows), facts, PERPLEXITY_LEGEND, runs=behind))
    rows, behind = [], []
    for (_, pattern), own in frame.groupby(["table", "pattern"]):
        for update in UPDATES:
            pairs = {row.label: (row.none, getattr(row, update)) for row in own.itertuples()}
            rows.append({"Model": own.model.iloc[0], "Pattern": str(pattern), "Repair": update} | _spread_row(pairs))
            behind.append([run for pair in pairs.values() for run in pair if run])
    title = "What a repair leaves of the difference between criteria"
    facts = frame.facts.iloc[0] if len(frame) else {}
    about = {name: facts[name] for name in ("evaluation", "missing") if name in facts}
    return [*grids, Grid(title, pd.DataFrame(rows), about, SPREAD_LEGEND, words=3, runs=recorded(behind))]


def repair_figure(frame: pd.DataFrame) -> Figure:
    """Mean loss by repair, a point for each method; a panel for each model and pattern."""
    points = [
        {
            "panel": f"{row.model}, {row.pattern}",
            "ylabel": "loss [nats]",
            "x": update,
            "y": float(np.mean(run.losses)),
            "error": float(np.std(run.losses, ddof=1) / math.sqrt(len(run.losses))) if len(run.losses) > 1 else 0.0,
            "rank": METHOD_ORDER.index(row.method) if row.method in METHOD_ORDER else len(METHOD_ORDER),
            "label": row.label,
            "method": row.method,
            "source": None,
            "is_open": False,
        }
        for row in frame.itertuples()
        for update in UPDATES
        if (run := getattr(row, update)) and run.losses
    ]
    return draw(pd.DataFrame(points), "repair", "± 1 standard error over windows, unpaired", joined=False)


def _spread_row(pairs: dict[str, tuple[Run | None, Run | None]]) -> dict[str, str]:
    """What a row of the second table shows of one repair: runs without and with it, a pair for each criterion."""
    known = [(one, other) for one, other in pairs.values() if one and other and one.losses and other.losses]
    names = ("Criteria", "Spread", "Left", "Best", "Worst", "Worst − best")
    if len(known) < 2 or len(known[0][0].losses) < 2:
        return dict.fromkeys(names, MISSING) | {"Criteria": str(len(known))}
    losses = np.array([[run.losses for run in runs] for runs in zip(*known, strict=True)])
    value, stderr = jackknife(losses[1], spread)
    share, of_share = jackknife(losses, left)
    ranked = sorted((other for _, other in known), key=lambda run: float(np.mean(run.losses)))
    shown = [str(len(known)), number(value, ".4f", stderr), number(share, ".0%", of_share)]
    difference = paired_difference([ranked[-1]], [ranked[0]])
    labels = {other.id: label for label, (_, other) in pairs.items() if other}
    extremes = [labels[ranked[0].id], labels[ranked[-1].id], marked(difference, "+.4f")]
    return dict(zip(names, [*shown, *extremes], strict=True))
