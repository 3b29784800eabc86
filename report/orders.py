"""What the order of the neurons is worth: the released one, random ones, and those that are chosen.

Another order leaves the dense model as it is and cuts other groups of N:M, so that random orders are the noise of every
N:M result, and the gain of a chosen order is its difference to their mean.
"""

import math
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from report.figures import draw
from report.grid import MISSING, Grid, marked, number, recorded
from report.runs import RANDOM, RELEASED, Run
from report.tables import Difference
from report.words import facts_of

DRAWN = (RANDOM, RELEASED)
CHOSEN = ("spread", "matched")
ORDER_LEGEND = (
    "Random: mean ± standard deviation (number of orders). Δ: difference of the mean loss to that of the random "
    "orders, nats per token, paired over windows; its error is that over windows and of one more random order, so that "
    "a gain counts where a random order would hardly give it; ≈: within two errors, or Student's quantile of them. "
    f"{MISSING}: not run."
)
VARIANCE_LEGEND = (
    "Δ loss: nats per token, mean over the random orders. Its variance, were it measured once: between random orders, "
    "between draws of the calibration set (of the released order), and of the mean over the windows; the standard "
    "deviation of each, and its share of their sum. Where orders or draws are few, so are the digits that mean "
    f"something. {MISSING}: not run."
)


def order_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each method under an N:M pattern, with its runs by order.

    Args:
        cells: of `cells_of`, in which a chosen order is an option of the method, and random ones are draws of it.

    Returns:
        The cells of the drawn orders, with the columns `released`, `random`, `spread`, `matched`: lists of runs, of one
        draw of the calibration set, that of the released run; and `draws`, the released runs of all of them.
    """
    rows = []
    for _, table in cells.groupby("table"):
        for cell in table[[bool(runs) and "order" not in runs[0].options for runs in table.runs]].itertuples():
            if not cell.runs[0].depends_on_order:
                continue
            found = [run for run in cell.runs if run.losses]
            draws = [run for run in found if run.order == RELEASED]
            seed = min((run.seed for run in draws or found), default=0)
            placed: dict[str, list[Run]] = {name: _placed(table, cell, name) for name in CHOSEN}
            placed |= {name: [run for run in found if run.order == name] for name in (RELEASED, RANDOM)}
            own = {name: [run for run in runs if run.seed == seed] for name, runs in placed.items()}
            rows.append(cell._asdict() | own | {"draws": draws})
    return pd.DataFrame(rows, columns=[*cells.columns, RELEASED, RANDOM, *CHOSEN, "draws"])


def gain(row: Any, order: str) -> Difference | None:
    """The loss of a chosen order minus the mean over the random ones; None where it is missing, or they are one.

    It counts where it lies beyond what one more random order could be: the variance is that over the windows, and
    s^2 (1 + 1 / k) of k random orders whose variance is s^2.
    """
    chosen, random = getattr(row, order), np.array([run.losses for run in row.random])
    if not chosen or len(random) < 2:
        return None
    differences = np.array(chosen[0].losses) - random.mean(axis=0)
    k, of_order = len(random), random.mean(axis=1).var(ddof=1)
    variance = differences.var(ddof=1) / len(differences) + of_order * (1 + 1 / k)
    freedom = variance**2 * (k - 1) / (of_order * (1 + 1 / k)) ** 2 if of_order else math.inf
    return Difference(float(differences.mean()), math.sqrt(variance), float(freedom))


def order_grid(frame: pd.DataFrame) -> Grid:
    """One model: perplexity by order, and what the chosen ones gain over the mean of the random ones."""

    def row(cell: Any) -> dict[str, str]:
        values = [run.perplexity for run in cell.random]
        mean = number(float(np.mean(values)), ".2f", float(np.std(values, ddof=1))) if len(values) > 1 else MISSING
        texts = {name: number(one[0].perplexity if (one := getattr(cell, name)) else None, ".2f") for name in CHOSEN}
        return {
            "Pattern": str(cell.pattern),
            "Method": cell.label,
            "Released": number(cell.released[0].perplexity if cell.released else None, ".2f"),
            "Random": f"{mean} ({len(values)})" if values else MISSING,
            **{name.capitalize(): text for name, text in texts.items()},
            **{f"Δ {name}": marked(gain(cell, name), "+.4f") for name in CHOSEN},
        }

    facts = {name: text for name, text in frame.facts.iloc[0].items() if name not in ("orders", "seeds")}
    behind = [list(chain(*(getattr(cell, name) for name in DRAWN + CHOSEN))) for cell in frame.itertuples()]
    title = f"Neuron order, {facts['model']}, {frame.dataset.iloc[0]}"
    return Grid(title, pd.DataFrame(map(row, frame.itertuples())), facts, ORDER_LEGEND, runs=recorded(behind))


def variances(by_order: np.ndarray, by_draw: np.ndarray) -> dict[str, tuple[float, int]]:
    """The variance of a difference of mean losses by its source, and over how many it was taken.

    Args:
        by_order, by_draw: differences of the windows' losses (n_orders or n_draws, n_windows), between random orders
            and between draws of the calibration set; fewer than two tell nothing (NaN).

    Returns:
        `order` and `calibration` of one run each, `windows` of the mean over the windows.
    """
    means = {"order": by_order.mean(axis=1), "calibration": by_draw.mean(axis=1)}
    found = {name: (float(own.var(ddof=1)) if len(own) > 1 else math.nan, len(own)) for name, own in means.items()}
    windows = by_order.mean(axis=0)
    return found | {"windows": (float(windows.var(ddof=1)) / len(windows), len(windows))}


def sources(cell: Any, wanda: Any) -> dict[str, tuple[float, int]]:
    """The `variances` of the difference of two rows of `order_frame`; none where they share no random order."""
    by_order, by_draw = (_paired(getattr(cell, name), getattr(wanda, name)) for name in (RANDOM, "draws"))
    return variances(by_order, by_draw) if len(by_order) else {}


def shares(parts: dict[str, tuple[float, int]]) -> dict[str, float]:
    """What each source gives to the sum of the variances that are known; NaN where it is not."""
    total = sum(value for value, _ in parts.values() if not math.isnan(value))
    return {name: value / total for name, (value, _) in parts.items()}


def variance_grid(frame: pd.DataFrame) -> Grid:
    """One model: where the variance of a method's difference to Wanda comes from."""
    rows, behind = [], []
    for pattern, own in frame.groupby("pattern"):
        wanda: Any = next((cell for cell in own.itertuples() if cell.is_reference), None)
        for cell in own.itertuples():
            if wanda is None or cell.is_reference or not (parts := sources(cell, wanda)):
                continue
            row = {"Pattern": str(pattern), "Method": cell.label}
            row["Δ loss to Wanda"] = number(float(_paired(cell.random, wanda.random).mean()), "+.4f")
            for name, (value, n) in parts.items():
                row[f"sd, {name}"] = f"{number(math.sqrt(value), '.4f')} ({n})" if not math.isnan(value) else MISSING
            row |= {f"Share, {name}": number(share, ".0%") for name, share in shares(parts).items()}
            rows.append(row)
            behind.append([*chain(*(getattr(one, name) for one in (cell, wanda) for name in (RANDOM, "draws")))])
    title = f"Where the variance of a difference to Wanda comes from, {frame.facts.iloc[0]['model']}"
    facts = facts_of([*chain(*frame.random, *frame.draws)], "orders", "seeds")
    return Grid(title, pd.DataFrame(rows), facts, VARIANCE_LEGEND, runs=recorded(behind))


def order_figure(frame: pd.DataFrame) -> Figure:
    """Loss of each order minus the mean over the random ones, by method; a panel for each model and pattern."""
    points = []
    for cell in frame.itertuples():
        usual = np.mean([np.mean(run.losses) for run in cell.random]) if cell.random else math.nan
        for rank, order in enumerate(DRAWN + CHOSEN):
            for run in getattr(cell, order):
                point = {"rank": rank, "label": order, "method": order, "source": None, "is_open": False}
                point |= {"x": cell.label.replace(" (", "\n("), "y": float(np.mean(run.losses) - usual), "error": 0.0}
                panel = f"{cell.model}, {cell.pattern}"
                points.append(point | {"panel": panel, "ylabel": "Δ loss to the random orders [nats]"})
    figure = draw(pd.DataFrame(points), "", "one point for each order", joined=False)
    for axes in figure.axes:
        axes.tick_params(axis="x", labelsize=6)
    return figure


def _placed(table: pd.DataFrame, cell: Any, order: str) -> list[Run]:
    """The runs of a cell's method in a chosen order."""
    wanted = cell.runs[0].options | {"order": order}
    own = table[(table.pattern == cell.pattern) & (table.method == cell.method)]
    return [run for runs in own.runs for run in runs if run.options == wanted and run.losses]


def _paired(ours: list[Run], theirs: list[Run]) -> np.ndarray:
    """Differences of the windows' losses between runs of the same draw, (n_draws, n_windows); maybe of none, (0, 0)."""
    others = {run.replicate: run for run in theirs}
    pairs = [(run, others[run.replicate]) for run in ours if run.replicate in others]
    return np.array([np.subtract(one.losses, other.losses) for one, other in pairs] or np.empty((0, 0)))
