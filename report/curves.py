"""Figures with lines: perplexity over alpha, over the calibration set, over sparsity; and bars of time and accuracy."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.cells import Cell, Table, paired_difference, strictness
from report.figures import COLUMN_WIDTH, METHOD_STYLE, Style, label_styles, set_perplexity_scale

PANEL_HEIGHT = 1.9  # inches


def option(cell: Cell, name: str) -> str | None:
    """The value of an option of the cell's method, such as alpha; None where the method has none."""
    found = [text.partition("=")[2] for text in cell.runs[0].options if text.startswith(f"{name}=")]
    return found[0] if found else None


def panels(count: int, extra: float = 0.5) -> tuple[Figure, list[Axes]]:
    """A figure of one column's width with panels below each other; `extra` inches for the legend."""
    figure = Figure(figsize=(COLUMN_WIDTH, PANEL_HEIGHT * count + extra), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


def line(
    axes: Axes, x: Iterable[float], y: Iterable[float], error: Iterable[float], style: Style, dashed: bool
) -> None:
    """One method's line with error bars; dashed with open markers for the second of two kinds."""
    axes.errorbar(
        list(x),
        list(y),
        yerr=list(error),
        color=style.color,
        marker=style.marker,
        markersize=3.5,
        markerfacecolor="white" if dashed else style.color,
        linestyle=":" if dashed else "-",
        linewidth=0.9,
        elinewidth=0.8,
        capsize=1.5,
    )


def legend(figure: Figure, styles: dict[str, Style], note: str, columns: int = 3) -> None:
    """One legend for all panels, below them."""
    handles = [
        Line2D([], [], color=s.color, marker=s.marker, markersize=3.5, linestyle="-" if s.marker else "--")
        for s in styles.values()
    ]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=columns, frameon=False, title=note)


def alpha_figure(tables: list[Table]) -> Figure:
    """Perplexity over DaSS's alpha, a panel for each model and pattern; Wanda as a level."""
    places = [(table, pattern) for table in tables for pattern in table.patterns if pattern != "dense"]
    figure, axes_list = panels(len(places))
    for axes, (table, pattern) in zip(axes_list, places, strict=True):
        cells = [cell for cell in table.cells if cell.found and cell.pattern == pattern]
        swept = [(float(option(cell, "alpha") or 0), cell) for cell in cells if cell.method == "dass"]
        swept.sort(key=lambda pair: pair[0])
        line(axes, [a for a, _ in swept], *_points([c for _, c in swept]), METHOD_STYLE["dass"], False)
        for cell in cells:
            if cell.method == "wanda":
                axes.axhline(cell.perplexity, color=METHOD_STYLE["wanda"].color, linestyle="--", linewidth=0.8)
        axes.set_xlim(-0.05, 1.05)
        axes.set_title(f"{table.facts['model']}, {pattern}")
        axes.set_ylabel(f"perplexity, {table.dataset}")
    axes_list[-1].set_xlabel("alpha")
    shown = {"dass": METHOD_STYLE["dass"], "wanda": Style(METHOD_STYLE["wanda"].color, "")}
    legend(figure, shown, "± 1 standard error")
    return figure


def curve_figure(tables: list[Table]) -> Figure:
    """Perplexity over sparsity: unstructured as full lines, N:M as dotted ones with open markers."""
    figure, axes_list = panels(len(tables), 0.8)
    styles = label_styles(tables)
    for axes, table in zip(axes_list, tables, strict=True):
        found = [cell for cell in table.cells if cell.found]
        for label, style in styles.items():
            own = [cell for cell in found if cell.label == label]
            if label == "dense":
                axes.axhline(own[0].perplexity if own else np.nan, color=style.color, linestyle="--", linewidth=0.8)
                continue
            for structured in (False, True):
                cells = sorted(
                    (c for c in own if (":" in c.pattern) == structured), key=lambda cell: strictness(cell.pattern)
                )
                sparsity = [100 * strictness(cell.pattern)[0] for cell in cells]
                if cells:
                    line(axes, sparsity, *_points(cells), style, structured)
        set_perplexity_scale(axes, [cell.perplexity for cell in found])
        axes.set_title(table.facts["model"])
        axes.set_ylabel(f"perplexity, {table.dataset}")
    axes_list[-1].set_xlabel("share of pruned weights [%]")
    legend(figure, styles, "full: unstructured; dotted, open: N:8; ± 1 standard error")
    return figure


def difference_figure(tables: list[Table], names: list[str]) -> Figure:
    """Difference of each method's loss to Wanda's, a group for each model and a panel for each pattern."""
    patterns = [p for p in dict.fromkeys(p for table in tables for p in table.patterns) if p != "dense"]
    figure, axes_list = panels(len(patterns), 0.8)
    styles = {k: v for k, v in label_styles(tables).items() if k not in ("dense", "wanda")}
    for axes, pattern in zip(axes_list, patterns, strict=True):
        axes.axhline(0, color=METHOD_STYLE["wanda"].color, linestyle="--", linewidth=0.8)
        for number, (label, style) in enumerate(styles.items()):
            for index, table in enumerate(tables):
                cell, wanda = table.cell(pattern, label), table.cell(pattern, table.reference)
                difference = paired_difference(cell, wanda) if cell and wanda else None
                if difference:
                    x = index + 0.18 * (number - (len(styles) - 1) / 2)
                    line(axes, [x], [difference.mean], [difference.stderr], style, not difference.counts)
        axes.set_xticks(range(len(tables)), names)
        axes.tick_params(axis="x", labelsize=6)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.margins(y=0.1)
        axes.set_title(pattern)
        axes.set_ylabel("Δ loss to Wanda [nats]")
    legend(figure, styles, "± 1 standard error; open: cannot be told apart from Wanda")
    return figure


def _points(cells: list[Cell]) -> tuple[list[float], list[float]]:
    """Perplexities and their standard errors."""
    return [cell.perplexity for cell in cells], [cell.mean("stderr") or 0.0 for cell in cells]
