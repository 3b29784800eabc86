"""Perplexity by calibration set: how many sequences, which draw, from which text."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from report.cells import Table, rank
from report.curves import legend, line, panels
from report.figures import label_styles
from report.grid import MISSING, Grid, with_error
from report.runs import missing_text
from report.tables import difference_text

HEADERS = ("Calibration text", "Method", "Sequences", "Seeds", "Perplexity", "sd over seeds", "Δ loss to Wanda")
LEGEND = (
    "Perplexity: mean over the seeds, ± one standard error over windows. Δ loss: nats per token, with a standard error "
    "over windows and seeds, paired in both; ≈: within two of them, or Student's quantile where there are few seeds. "
    f"{MISSING}: not run, or not with all seeds yet."
)


@dataclass(frozen=True)
class CalibrationSet:
    """The table of one calibration set."""

    table: Table
    source: str
    """The text."""
    size: int
    """Sequences."""


def calibration_grid(sets: list[CalibrationSet]) -> Grid:
    """All calibration sets of one model, a row for each set and method."""
    tables = [one.table for one in sets]
    rows = []
    for one in sets:
        for cell in sorted(one.table.cells, key=lambda cell: rank(cell.label)):
            if cell.method == "dense":
                continue
            spread = cell.spread()
            rows.append(
                [
                    one.source,
                    cell.label,
                    str(one.size),
                    str(len(cell.runs) if cell.found else 0),
                    with_error(cell.perplexity, cell.mean("stderr"), ".2f") if cell.found else MISSING,
                    MISSING if spread is None else f"{spread:.2f}",
                    difference_text(cell, one.table.cell(cell.pattern, one.table.reference)),
                ]
            )
    facts = {key: tables[0].facts[key] for key in ("model", "evaluation", "pruned")}
    facts["pattern"] = ", ".join(dict.fromkeys(p for table in tables for p in table.patterns if p != "dense"))
    calibrations = {cell.runs[0].calibration for table in tables for cell in table.cells if cell.runs[0].calibration}
    facts["sequence length"] = ", ".join(sorted({words.split(" × ")[1].split(" ")[0] for words in calibrations}))
    dense = next((cell for table in tables for cell in table.cells if cell.method == "dense" and cell.found), None)
    facts["dense"] = f"{dense.perplexity:.2f}" if dense else MISSING
    facts["machine"] = "; ".join(sorted({table.facts["machine"] for table in tables}))
    runs = {run.id: run for table in tables for cell in table.cells for run in cell.runs}
    if missing := [run for run in runs.values() if run.perplexity is None]:
        facts["missing"] = missing_text(missing)
    return Grid(f"Perplexity of {facts['model']} by calibration set", HEADERS, rows, facts, LEGEND)


def calibration_figure(sets: list[CalibrationSet]) -> Figure:
    """Perplexity over the number of sequences, mean and standard deviation over the seeds; a panel for each model.

    The first text is drawn as lines, the others as open markers.
    """
    tables = [one.table for one in sets]
    models = list(dict.fromkeys(table.facts["model"] for table in tables))
    sources = list(dict.fromkeys(one.source for one in sets))
    figure, axes_list = panels(len(models))
    styles = {label: style for label, style in label_styles(tables).items() if label != "dense"}
    for axes, model in zip(axes_list, models, strict=True):
        for number, (label, style) in enumerate(styles.items()):
            for source in sources:
                cells = [
                    (one.size, cell)
                    for one in sets
                    for cell in one.table.cells
                    if (one.source, one.table.facts["model"], cell.label) == (source, model, label) and cell.found
                ]
                shifted = [size * 1.03 ** (number - len(styles) / 2) for size, _ in cells]
                if cells:
                    perplexities, spreads = zip(
                        *((cell.perplexity, cell.spread() or 0.0) for _, cell in cells), strict=True
                    )
                    line(axes, shifted, perplexities, spreads, style, source != sources[0])
        axes.set_xscale("log", base=2)
        ticks = sorted({one.size for one in sets})
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.set_title(model)
        axes.set_ylabel(f"perplexity, {tables[0].dataset}")
    axes_list[-1].set_xlabel("calibration sequences")
    others = f", open: {', '.join(sources[1:])}" if len(sources) > 1 else ""
    legend(figure, styles, f"± 1 sd over seeds; full: {sources[0]}{others}")
    return figure
