"""Figures: points with errors over x, a panel for each model or pattern; one style for each method, one legend for all.

No pyplot: no global state and no display; PNG files are drawn by Agg.
"""

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dass.records import write_atomically
from report.runs import DENSE


class Style(NamedTuple):
    """How a row looks in every figure."""

    color: str
    marker: str


# Okabe and Ito's colours, which stay apart for colour-blind readers
METHOD_STYLE = {
    "dense": Style("#000000", ""),
    "magnitude": Style("#E69F00", "s"),
    "wanda": Style("#0072B2", "o"),
    "sparsegpt": Style("#009E73", "^"),
    "dass": Style("#D55E00", "D"),
}
OTHER_COLORS = ("#CC79A7", "#56B4E9", "#999999", "#F0E442")  # methods to come, by name
VARIANT_MARKERS = ("v", "<", ">", "h", "8", "d", "*")  # further rows of one method keep its colour
COLUMN_WIDTH = 3.3  # inches, of a two-column paper
PANEL_HEIGHT = 2.0  # inches
LEGEND_ROW = 0.17  # inches
LOG_ABOVE = 5.0  # ratio of the largest to the smallest perplexity
DECADES_ABOVE = 1000.0  # the same, where only powers of ten have room as ticks
STEP = 0.16  # between points beside each other, where one word of x is 1 wide
SAME_LINE = ["rank", "label", "is_open", "source"]
POINT: dict[str, Any] = {"markersize": 3.5, "linewidth": 0.9, "elinewidth": 0.8, "capsize": 1.5}
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType, as publishers ask
}


def perplexity_figure(cells: pd.DataFrame) -> Figure:
    """Who wins: one panel per table. Filled markers: the best, or in a draw with it."""
    points = _points(cells, cells.perplexity, cells.stderr).assign(is_open=~cells.is_best)
    return draw(points, "pattern", "filled: best of its pattern, or in a draw with it", joined=False, explodes=True)


def time_figure(cells: pd.DataFrame) -> Figure:
    """Seconds of the walk by pattern and method."""
    return draw(_points(cells, cells.pruning_seconds, 0.0, "pruning [s]"), "pattern", "one run each", joined=False)


def zero_shot_figure(cells: pd.DataFrame) -> Figure:
    """Mean accuracy with its standard error by pattern and method; dense as a level."""
    means = [runs[0].accuracies.get("mean", {}) if runs else {} for runs in cells.runs]
    points = _points(cells, cells.accuracy, [100 * mean.get("stderr", 0.0) for mean in means], "mean accuracy [%]")
    return draw(points, "pattern", "± 1 standard error", joined=False)


def alpha_figure(cells: pd.DataFrame) -> Figure:
    """Perplexity over DaSS's alpha, a panel for each model and pattern; Wanda as a level."""
    points = _points(cells, cells.perplexity, cells.stderr).assign(label=cells.method)
    points["x"] = [runs[0].options.get("alpha") if runs else None for runs in cells.runs]
    points["panel"] = cells.title + ", " + cells.pattern.map(str)
    points = points[points.x.notna() | (points.method == "wanda")]
    return draw(
        points.sort_values(["table", "pattern"], kind="stable"), "alpha", "± 1 standard error, unpaired: see the table"
    )


def curve_figure(cells: pd.DataFrame) -> Figure:
    """Perplexity over sparsity: unstructured as full lines, N:M as dotted ones with open markers."""
    points = _points(cells, cells.perplexity, cells.stderr)
    points["x"] = cells.pattern.map(lambda pattern: math.nan if pattern == DENSE else 100 * pattern.sparsity)
    points["is_open"] = cells.pattern.map(lambda pattern: math.isfinite(pattern.smallness))
    note = "full: unstructured; dotted, open: N:8; ± 1 standard error"
    return draw(points, "share of pruned weights [%]", note, explodes=True)


def calibration_figure(cells: pd.DataFrame) -> Figure:
    """Perplexity over the number of sequences, mean and standard deviation over the seeds; a panel for each model.

    The first text is drawn as lines, the others as open markers.
    """
    cells = cells[cells.pattern != DENSE]
    first, *others = cells.source.unique()
    beside = cells["rank"].rank(method="dense") - cells["rank"].nunique() / 2 - 1
    points = _points(cells, cells.perplexity, cells.spread).assign(x=cells.sequences * 1.03**beside)
    points = points.assign(panel=[facts["model"] for facts in cells.facts], is_open=cells.source != first)
    note = f"± 1 sd over seeds; full: {first}" + (f", open: {', '.join(others)}" if others else "")
    figure = draw(points, "calibration sequences", note)
    ticks = sorted(cells.sequences.unique())
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)))
    return figure


def difference_figure(cells: pd.DataFrame) -> Figure:
    """Difference of each method's loss to Wanda's, a group for each model and a panel for each pattern."""
    points = cells[(cells.method != "wanda") & (cells.pattern != DENSE) & cells.delta.notna()]
    points = points.sort_values(["pattern", "table"], kind="stable")
    points = points.assign(
        panel=points.pattern.map(str),
        ylabel="Δ loss to Wanda [nats]",
        x=points.model.str.replace("_", "\n"),
        y=[delta.mean for delta in points.delta],
        error=[delta.stderr for delta in points.delta],
        is_open=[not delta.counts for delta in points.delta],
    )
    figure = draw(points, "", "± 1 standard error; open: cannot be told apart from Wanda", joined=False)
    for axes in figure.axes:
        axes.axhline(0, color=METHOD_STYLE["wanda"].color, linestyle="--", linewidth=0.8, zorder=0)
        axes.tick_params(axis="x", labelsize=6)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.margins(y=0.1)
    return figure


def scale_figure(cells: pd.DataFrame) -> Figure:
    """The same over the parameters of the model, the smallest first."""
    sizes = cells.runs.map(lambda runs: max((run.parameters or 0 for run in runs), default=0))
    sizes = sizes.groupby(cells.table).transform("max")
    words = cells.model + "\n" + (sizes / 1e9).map("{:.2f} B".format)
    return difference_figure(cells.assign(table=sizes.rank(method="dense"), model=words)[sizes > 0])


def draw(points: pd.DataFrame, xlabel: str, note: str, joined: bool = True, explodes: bool = False) -> Figure:
    """Points with errors, a panel below the other for each value of `panel`, and one legend for all.

    Args:
        points: a row each, with the columns panel, ylabel, x (a number, or a word that has a place of its own; of a
            level across the panel neither), y, error and is_open, and those of the cell.
        joined: lines from point to point; dotted ones between open markers.
        explodes: perplexities, on a logarithmic axis where they span decades.
    """
    points = points[points.y.notna()]
    if points.empty:
        return Figure(figsize=(COLUMN_WIDTH, PANEL_HEIGHT))  # nothing can be compared yet
    styles = row_styles(points)
    levels = set(points.label) - set(points[points.x.notna()].label)
    longest = max(map(len, styles))
    columns = 3 if longest < 12 else 2 if longest < 19 else 1
    panels = points.groupby("panel", sort=False)
    height = PANEL_HEIGHT * len(panels) + LEGEND_ROW * math.ceil(len(styles) / columns) + 0.3
    figure = Figure(figsize=(COLUMN_WIDTH, height), layout="constrained")
    for axes, (title, own) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        if explodes:
            _set_perplexity_scale(axes, own.y)
        if not joined:
            own = own.assign(x=_places(axes, own.x))
        for (_, label, is_open, _), line in own.groupby(SAME_LINE, dropna=False):
            color, marker = styles[label]
            for y in line[line.x.isna()].y:
                axes.axhline(y, color=color, linestyle="--", linewidth=0.8, zorder=0)
            line = line[line.x.notna()].sort_values("x")
            if len(line):
                face, dashes = ("white", ":") if is_open else (color, "-")
                axes.errorbar(
                    line.x.astype(float),
                    line.y,
                    yerr=line.error.fillna(0),
                    color=color,
                    marker=marker,
                    markerfacecolor=face,
                    linestyle=dashes if joined else "",
                    **POINT,
                )
        axes.set_title(literal("\n".join(textwrap.wrap(str(title), 52))))
        axes.set_ylabel(literal(own.ylabel.iloc[0]))
    figure.axes[-1].set_xlabel(xlabel)
    handles = [
        Line2D([], [], color=color, linestyle="--")
        if label in levels
        else Line2D([], [], color=color, marker=marker, markersize=3.5, linestyle="-" if joined else "")
        for label, (color, marker) in styles.items()
    ]
    labels = list(map(literal, styles))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=literal(note))
    return figure


def literal(text: str) -> str:
    """A text that matplotlib shows as it is: a dollar opens no formula."""
    return text.replace("$", r"\$")


def row_styles(points: pd.DataFrame) -> dict[str, Style]:
    """The style of each label, in reading order; the variant of a method that was run most keeps its marker."""
    counts = points.groupby(["rank", "label", "method"]).size().reset_index(name="count")
    others = sorted(set(counts.method) - set(METHOD_STYLE))
    base = METHOD_STYLE | {name: Style(OTHER_COLORS[i % len(OTHER_COLORS)], "p") for i, name in enumerate(others)}
    counts = counts.sort_values("count", ascending=False, kind="stable")
    counts["earlier"] = counts.groupby("method").cumcount()
    styles = {}
    for row in counts.sort_index().itertuples():
        marker = VARIANT_MARKERS[(row.earlier - 1) % len(VARIANT_MARKERS)] if row.earlier else base[row.method].marker
        styles[row.label] = Style(base[row.method].color, marker)
    return styles


def write_figure(draw: Callable[[], Figure], folder: Path, name: str) -> list[Path]:
    """Write what `draw` draws as `<name>.pdf` and `<name>.png`, the same bytes each time; returns the paths."""
    undated = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    paths = []
    with matplotlib.rc_context(RC):
        figure = draw()
        for suffix, metadata in undated.items():
            content = io.BytesIO()
            figure.savefig(content, format=suffix, dpi=300, metadata=metadata)
            paths.append(folder / f"{name}.{suffix}")
            write_atomically(paths[-1], content.getvalue())
    return paths


def _points(cells: pd.DataFrame, y: Any, error: Any, ylabel: str | None = None) -> pd.DataFrame:
    """Filled points over the pattern, dense as a level, a panel for each table; perplexities if `ylabel` is none."""
    x = [None if pattern == DENSE else str(pattern) for pattern in cells.pattern]
    label = ylabel or "perplexity, " + cells.dataset
    return cells.assign(panel=cells.title, ylabel=label, x=x, y=y, error=error, is_open=False)


def _places(axes: Axes, words: pd.Series) -> pd.Series:
    """Where each point stands, those of one word beside each other; sets the ticks."""
    names = list(words.dropna().unique())
    among = words.groupby(words)
    steps = (0.8 / among.transform("size")).clip(upper=STEP)
    axes.set_xticks(range(len(names)), list(map(literal, names)))
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    beside = among.cumcount() - (among.transform("size") - 1) / 2
    return words.map(names.index, na_action="ignore").astype(float) + steps * beside


def _set_perplexity_scale(axes: Axes, values: pd.Series) -> None:
    """A logarithmic axis where perplexity explodes."""
    if values.max() > LOG_ABOVE * values.min():
        axes.set_yscale("log")
        if values.max() < DECADES_ABOVE * values.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
