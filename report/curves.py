"""Figures of perplexity: over pattern, alpha, sparsity, calibration set; and of the difference to Wanda."""

import itertools
import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.calibration import size, source
from report.figures import METHOD_STYLE, Style, legend, level, line, panels, set_perplexity_scale, variant_styles
from report.runs import DENSE
from report.tables import Cell, Table, Variant, paired_difference, titles


def perplexity_figure(tables: list[Table]) -> Figure:
    """Who wins: one panel per table. Filled markers: the best, or in a draw with it."""
    styles = variant_styles(tables)
    longest = max(len(variant.label) for variant in styles)
    columns = 3 if longest < 12 else 2 if longest < 19 else 1
    figure, axes_list = panels(len(tables), 0.17 * -(-len(styles) // columns) + 0.3, 2.2)
    for axes, table, title in zip(axes_list, tables, titles(tables), strict=True):
        found = _framed(axes, table, styles)
        for x, pattern in enumerate(table.patterns):
            cells = [cell for cell in found if cell.pattern == pattern]
            step = min(0.16, 0.8 / max(len(cells), 1))
            for number, cell in enumerate(cells):
                place = x + step * (number - (len(cells) - 1) / 2)
                is_best = cell.variant in table.best(pattern)
                line(axes, [place], [cell.perplexity], [cell.mean("stderr")], styles[cell.variant], not is_best)
        axes.set_xticks(range(len(table.patterns)), list(map(str, table.patterns)))
        axes.set_xlim(-0.6, max(len(table.patterns), 1) - 0.4)
        axes.set_title("\n".join(textwrap.wrap(title, 52)))
    axes_list[-1].set_xlabel("pattern")
    note = "filled: best of its pattern, or in a draw with it"
    legend(figure, _labelled(styles), note, columns, joined=False)
    return figure


def alpha_figure(tables: list[Table]) -> Figure:
    """Perplexity over DaSS's alpha, a panel for each model and pattern; Wanda as a level."""
    places = [(table, pattern) for table in tables for pattern in table.patterns]
    figure, axes_list = panels(len(places))
    shown = {"dass": METHOD_STYLE["dass"], "wanda": Style(METHOD_STYLE["wanda"].color, "")}
    for axes, (table, pattern) in zip(axes_list, places, strict=True):
        cells = [cell for cell in table.cells if cell.found and cell.pattern == pattern]
        swept = [(cell.runs[0].parameters["alpha"], cell) for cell in cells if "alpha" in cell.runs[0].parameters]
        _draw(axes, sorted(swept, key=lambda point: point[0]), shown["dass"], False)
        for cell in cells:
            if cell.variant.method == "wanda":
                level(axes, cell.perplexity, shown["wanda"])
        axes.set_title(f"{table.facts['model']}, {pattern}")
        axes.set_ylabel(f"perplexity, {table.dataset}")
    axes_list[-1].set_xlabel("alpha")
    legend(figure, shown, "± 1 standard error")
    return figure


def curve_figure(tables: list[Table]) -> Figure:
    """Perplexity over sparsity: unstructured as full lines, N:M as dotted ones with open markers."""
    figure, axes_list = panels(len(tables), 0.8)
    styles = variant_styles(tables)
    for axes, table in zip(axes_list, tables, strict=True):
        pruned = _framed(axes, table, styles)
        for variant, structured in itertools.product(styles, (False, True)):
            own = [cell for cell in pruned if cell.variant == variant]
            own = [cell for cell in own if math.isfinite(cell.pattern.smallness) == structured]
            _draw(axes, [(100 * cell.pattern.sparsity, cell) for cell in own], styles[variant], structured)
        axes.set_title(table.facts["model"])
    axes_list[-1].set_xlabel("share of pruned weights [%]")
    legend(figure, _labelled(styles), "full: unstructured; dotted, open: N:8; ± 1 standard error")
    return figure


def calibration_figure(tables: list[Table]) -> Figure:
    """Perplexity over the number of sequences, mean and standard deviation over the seeds; a panel for each model.

    The first text is drawn as lines, the others as open markers.
    """
    models = list(dict.fromkeys(table.facts["model"] for table in tables))
    sources = list(dict.fromkeys(map(source, tables)))
    figure, axes_list = panels(len(models))
    styles = {variant: style for variant, style in variant_styles(tables).items() if variant.method != "dense"}
    for axes, model in zip(axes_list, models, strict=True):
        for name, (number, variant) in itertools.product(sources, enumerate(styles)):
            own = [table for table in tables if (table.facts["model"], source(table)) == (model, name)]
            points = [(size(t), cell) for t in own for cell in t.cells if cell.variant == variant and cell.found]
            x = [sequences * 1.03 ** (number - len(styles) / 2) for sequences, _ in points]
            y, spreads = [cell.perplexity for _, cell in points], [cell.spread for _, cell in points]
            line(axes, x, y, spreads, styles[variant], name != sources[0])
        axes.set_xscale("log", base=2)
        ticks = sorted(set(map(size, tables)))
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_title(model)
        axes.set_ylabel(f"perplexity, {tables[0].dataset}")
    axes_list[-1].set_xlabel("calibration sequences")
    others = f", open: {', '.join(sources[1:])}" if len(sources) > 1 else ""
    legend(figure, _labelled(styles), f"± 1 sd over seeds; full: {sources[0]}{others}")
    return figure


def difference_figure(tables: list[Table]) -> Figure:
    """Difference of each method's loss to Wanda's, a group for each model and a panel for each pattern."""
    patterns = sorted({pattern for table in tables for pattern in table.patterns})
    figure, axes_list = panels(len(patterns), 0.8)
    styles = {v: style for v, style in variant_styles(tables).items() if v.method not in ("dense", "wanda")}
    for axes, pattern in zip(axes_list, patterns, strict=True):
        level(axes, 0, METHOD_STYLE["wanda"])
        for number, (variant, style) in enumerate(styles.items()):
            for index, table in enumerate(tables):
                cell, wanda = table.cell(pattern, variant), table.reference(pattern)
                if cell and wanda and (difference := paired_difference(cell, wanda)):
                    x = index + 0.18 * (number - (len(styles) - 1) / 2)
                    line(axes, [x], [difference.mean], [difference.stderr], style, not difference.counts)
        axes.set_xticks(range(len(tables)), [table.runs[0].model.replace("_", "\n") for table in tables])
        axes.tick_params(axis="x", labelsize=6)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.margins(y=0.1)
        axes.set_title(str(pattern))
        axes.set_ylabel("Δ loss to Wanda [nats]")
    legend(figure, _labelled(styles), "± 1 standard error; open: cannot be told apart from Wanda")
    return figure


def _framed(axes: Axes, table: Table, styles: dict[Variant, Style]) -> list[Cell]:
    """Draw the axis and the dense level; returns the other cells that have a result."""
    found = [cell for cell in table.cells if cell.found]
    set_perplexity_scale(axes, [cell.perplexity for cell in found])
    axes.set_ylabel(f"perplexity, {table.dataset}")
    for cell in found:
        if cell.pattern == DENSE:
            level(axes, cell.perplexity, styles[cell.variant])
    return [cell for cell in found if cell.pattern != DENSE]


def _draw(axes: Axes, points: list[tuple[float, Cell]], style: Style, is_open: bool) -> None:
    cells = [cell for _, cell in points]
    errors = [cell.mean("stderr") for cell in cells]
    line(axes, [x for x, _ in points], [cell.perplexity for cell in cells], errors, style, is_open)


def _labelled(styles: dict[Variant, Style]) -> dict[str, Style]:
    return {variant.label: style for variant, style in styles.items()}
