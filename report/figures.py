"""How figures look and are written, and the figure of who wins: perplexity over pattern, a panel for each table.

No pyplot: no global state and no display; PNG files are drawn by Agg.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dass.records import write_atomically
from report.cells import Table, rank


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure."""

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
LOG_ABOVE = 5.0  # ratio of the largest to the smallest perplexity
DECADES_ABOVE = 1000.0  # the same, where only powers of ten have room as ticks
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType, as publishers ask
}


def label_styles(tables: list[Table]) -> dict[str, Style]:
    """The style of each row label, in reading order; the variant of a method that was run most keeps its marker."""
    cells = [cell for table in tables for cell in table.cells]
    methods, counts = {cell.label: cell.method for cell in cells}, Counter(cell.label for cell in cells)
    others = sorted(set(methods.values()) - set(METHOD_STYLE))
    base = METHOD_STYLE | {name: Style(OTHER_COLORS[i % len(OTHER_COLORS)], "p") for i, name in enumerate(others)}
    styles: dict[str, Style] = {}
    for label in sorted(methods, key=lambda label: (-counts[label], label)):
        style = base[methods[label]]
        earlier = sum(methods[other] == methods[label] for other in styles)
        marker = VARIANT_MARKERS[(earlier - 1) % len(VARIANT_MARKERS)] if earlier else style.marker
        styles[label] = Style(style.color, marker)
    return {label: styles[label] for label in sorted(styles, key=rank)}


def perplexity_figure(tables: list[Table]) -> Figure:
    """One panel per table, a legend for all of them below. Filled markers: the best, or in a draw with it."""
    styles = label_styles(tables)
    longest = max(map(len, styles))
    columns = 3 if longest < 12 else 2 if longest < 19 else 1
    height = 2.2 * len(tables) + 0.17 * -(-len(styles) // columns) + 0.3
    figure = Figure(figsize=(COLUMN_WIDTH, height), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table, styles)
        models = {other.facts["model"] for other in tables}
        names = ("model",) if len(models) == len(tables) else ("model", "evaluation", "pruned", "calibration")
        differing = [table.facts[name] for name in names if len({other.facts[name] for other in tables}) > 1]
        axes.set_title("\n".join(textwrap.wrap(", ".join(differing) or table.facts["model"], 52)))
    panels[-1].set_xlabel("pattern")
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, markersize=3.5, linestyle="" if style.marker else "--")
        for style in styles.values()
    ]
    note = "filled: best of its pattern, or in a draw with it"
    figure.legend(handles, list(styles), loc="outside lower center", ncols=columns, frameon=False, title=note)
    return figure


def _panel(axes: Axes, table: Table, styles: dict[str, Style]) -> None:
    patterns = [pattern for pattern in table.patterns if pattern != "dense"]
    found = [cell for cell in table.cells if cell.found]
    for cell in found:
        style = styles[cell.label]
        if cell.method == "dense":
            axes.axhline(cell.perplexity, color=style.color, linestyle="--", linewidth=0.8, zorder=0)
            continue
        labels = [other.label for other in found if other.pattern == cell.pattern]
        step = min(0.16, 0.8 / len(labels))
        x = patterns.index(cell.pattern) + step * (labels.index(cell.label) - (len(labels) - 1) / 2)
        face = style.color if cell.label in table.best(cell.pattern) else "white"
        axes.errorbar(
            x,
            cell.perplexity,
            yerr=cell.mean("stderr"),
            color=style.color,
            marker=style.marker,
            markersize=3.5,
            markerfacecolor=face,
            elinewidth=0.8,
            capsize=1.5,
        )
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set_xlim(-0.6, max(len(patterns), 1) - 0.4)
    axes.set_ylabel(f"perplexity, {table.dataset}")
    set_perplexity_scale(axes, [cell.perplexity for cell in found])


def set_perplexity_scale(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis where perplexity explodes."""
    if values and max(values) > LOG_ABOVE * min(values):
        axes.set_yscale("log")
        if max(values) < DECADES_ABOVE * min(values):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


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
