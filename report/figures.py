"""How figures look and are written: one style for each method, panels below each other, one legend for all of them.

No pyplot: no global state and no display; PNG files are drawn by Agg.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dass.records import write_atomically
from report.tables import Table, Variant


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
PANEL_HEIGHT = 1.9  # inches
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


def style_of(method: str) -> Style:
    """The style of a method as such, whichever others there are."""
    return METHOD_STYLE.get(method, Style(OTHER_COLORS[0], "p"))


def variant_styles(tables: list[Table]) -> dict[Variant, Style]:
    """The style of each row, in reading order; the variant of a method that was run most keeps its marker."""
    counts = Counter(cell.variant for table in tables for cell in table.cells)
    others = sorted({variant.method for variant in counts} - set(METHOD_STYLE))
    base = METHOD_STYLE | {name: Style(OTHER_COLORS[i % len(OTHER_COLORS)], "p") for i, name in enumerate(others)}
    styles: dict[Variant, Style] = {}
    for variant in sorted(counts, key=lambda variant: (-counts[variant], variant)):
        style = base[variant.method]
        earlier = sum(variant.method == other.method for other in styles)
        marker = VARIANT_MARKERS[(earlier - 1) % len(VARIANT_MARKERS)] if earlier else style.marker
        styles[variant] = Style(style.color, marker)
    return {variant: styles[variant] for variant in sorted(styles)}


def panels(count: int, extra: float = 0.5, height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure of one column's width with panels below each other; `extra` inches for the legend."""
    figure = Figure(figsize=(COLUMN_WIDTH, height * count + extra), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


def line(
    axes: Axes, x: Iterable[float], y: Iterable[float], error: Iterable[float | None], style: Style, is_open: bool
) -> None:
    """One method's line with error bars; dotted with open markers for the second of two kinds."""
    axes.errorbar(
        list(x),
        list(y),
        yerr=[value or 0.0 for value in error],
        color=style.color,
        marker=style.marker,
        markersize=3.5,
        markerfacecolor="white" if is_open else style.color,
        linestyle=":" if is_open else "-",
        linewidth=0.9,
        elinewidth=0.8,
        capsize=1.5,
    )


def level(axes: Axes, y: float, style: Style) -> None:
    """A dashed line across the panel."""
    axes.axhline(y, color=style.color, linestyle="--", linewidth=0.8, zorder=0)


def legend(figure: Figure, styles: dict[str, Style], note: str, columns: int = 3, joined: bool = True) -> None:
    """One legend for all panels, below them."""
    handles = [
        Line2D([], [], color=s.color, marker=s.marker, markersize=3.5, ls=("-" if joined else "") if s.marker else "--")
        for s in styles.values()
    ]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=columns, frameon=False, title=note)


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
