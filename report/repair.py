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
    """A row for each model, pattern and method, with one run for each repair in the columns `UPDATES`, or None."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells[cells.pattern != DENSE].itertuples():
        for run in cell.runs[:1]:
            key = (cell.table, cell.pattern, cell.method)
            row = rows.setdefault(key, dict.fromkeys(UPDATES) | {"facts": cell.facts, "model": cell.model})
            row[run.update or "none"] = run
    ranks = {name: rank for rank, name in enumerate(METHOD_ORDER)}
    found = [dict(zip(("table", "pattern", "method"), key, strict=True)) | row for key, row in rows.items()]
    found.sort(key=lambda row: (row["table"], row["pattern"], ranks.get(row["method"], len(ranks)), row["method"]))
    return pd.DataFrame(found, columns=["table", "pattern", "method", "facts", "model", *UPDATES])


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
            {"Pattern": str(row.pattern), "Method": row.method}
            | {update: number(run.perplexity if (run := getattr(row, update)) else None, ".2f") for update in UPDATES}
            for row in own.itertuples()
        ]
        facts = own.facts.iloc[0]
        behind = recorded([run for update in UPDATES if (run := getattr(row, update))] for row in own.itertuples())
        grids.append(Grid(f"Repairs of {facts['model']}", pd.DataFrame(rows), facts, PERPLEXITY_LEGEND, runs=behind))
    rows, behind = [], []
    for (_, pattern), own in frame.groupby(["table", "pattern"]):
        for update in UPDATES:
            pairs = [(row.none, getattr(row, update)) for row in own.itertuples()]
            rows.append({"Model": own.model.iloc[0], "Pattern": str(pattern), "Repair": update} | _spread_row(pairs))
            behind.append([run for pair in pairs for run in pair if run])
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
            "label": row.method,
            "method": row.method,
            "source": None,
            "is_open": False,
        }
        for row in frame.itertuples()
        for update in UPDATES
        if (run := getattr(row, update)) and run.losses
    ]
    return draw(pd.DataFrame(points), "repair", "± 1 standard error over windows, unpaired", joined=False)


def _spread_row(pairs: list[tuple[Run | None, Run | None]]) -> dict[str, str]:
    """What a row of the second table shows of one repair: runs without and with it, a pair for each criterion."""
    known = [(one, other) for one, other in pairs if one and other and one.losses and other.losses]
    names = ("Criteria", "Spread", "Left", "Best", "Worst", "Worst − best")
    if len(known) < 2 or len(known[0][0].losses) < 2:
        return dict.fromkeys(names, MISSING) | {"Criteria": str(len(known))}
    losses = np.array([[run.losses for run in runs] for runs in zip(*known, strict=True)])
    value, stderr = jackknife(losses[1], spread)
    share, of_share = jackknife(losses, left)
    ranked = sorted((other for _, other in known), key=lambda run: float(np.mean(run.losses)))
    shown = [str(len(known)), number(value, ".4f", stderr), number(share, ".0%", of_share)]
    difference = paired_difference([ranked[-1]], [ranked[0]])
    return dict(zip(names, [*shown, ranked[0].method, ranked[-1].method, marked(difference, "+.4f")], strict=True))
