"""Perplexities as tables: in full, side by side over models, and beside the records of another folder."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from report.grid import MISSING, Grid, with_error
from report.runs import Run
from report.tables import Cell, Table, paired_difference, titles, variants
from report.words import model_words

BOLD_LEGEND = (
    "apart from it (paired difference of the loss within two standard errors, or within Student's quantile of them "
    "where they come from few seeds); several in bold are a draw. "
)
LEGEND = (
    "± one standard error over windows. Bold: the lowest perplexity of a pattern and every other that cannot be told "
    f"{BOLD_LEGEND}≈: cannot be told apart from the reference by the same rule. Δ loss: nats per token; ratio: of the "
    "perplexities. Targeted, all linear: share of zeros in the targeted weights, in all linear ones. "
    f"{MISSING}: not run, or does not apply."
)
SIDE_BY_SIDE_LEGEND = (
    f"Perplexity. Bold: the lowest of a pattern and every other that cannot be told {BOLD_LEGEND}{MISSING}: not run."
)
Counterpart = Callable[[dict[str, Any]], dict[str, Any] | None]
"""From a cell's options to those of the cell that it is compared with besides Wanda; None: with none."""


def perplexity_grid(table: Table, header: str = "", counterpart: Counterpart | None = None) -> Grid:
    """One table in full: perplexity, paired difference to Wanda (and to a counterpart), ratio, sparsity."""
    rows, bold = [], set()
    for index, (pattern, variant) in enumerate(table.rows()):
        cell, reference = table.cell(pattern, variant), table.reference(pattern)
        row = {"Pattern": str(pattern), "Method": variant.label, "Perplexity": MISSING}
        if cell and cell.found:
            row["Perplexity"] = with_error(cell.perplexity, cell.mean("stderr"), ".2f")
            if cell.spread is not None:
                row["Perplexity"] += f" ({len(cell.runs)} seeds, sd {cell.spread:.2f})"
        row["Δ loss to Wanda"] = difference_text(cell, reference)
        if counterpart:
            options = counterpart(cell.runs[0].options) if cell else None
            row[header] = difference_text(cell, table.find(str(pattern), variant.method, options) if options else None)
        difference = paired_difference(cell, reference) if cell and reference and cell is not reference else None
        row["Ratio"] = f"{math.exp(difference.mean):.3f}" if difference else MISSING
        if cell is reference and cell and cell.found:
            row["Ratio"] = "1"
        for name, field in (("Targeted", "sparsity_targeted"), ("All linear", "sparsity_linear")):
            share = cell.mean(field) if cell else None
            row[name] = MISSING if share is None else f"{share:.1%}"
        rows.append(row)
        if variant in table.best(pattern):
            bold.add((index, 2))
    title = f"Perplexity of {table.facts['model']}, {table.dataset}"
    return Grid(title, pd.DataFrame(rows), table.facts, LEGEND, frozenset(bold))


def difference_text(cell: Cell | None, reference: Cell | None) -> str:
    """The paired difference with its standard error; marked where it is within two of them."""
    if cell is None or reference is None or not cell.found:
        return MISSING
    if cell is reference:
        return "reference"
    difference = paired_difference(cell, reference)
    if difference is None:
        return MISSING
    return ("" if difference.counts else "≈ ") + with_error(difference.mean, difference.stderr, "+.4f")


def side_by_side(tables: list[Table]) -> Grid:
    """The perplexities of several models in one table, a column for each."""
    order = sorted({row for table in tables for row in table.rows()})
    frame = pd.DataFrame({"Pattern": [str(p) for p, _ in order], "Method": [v.label for _, v in order]})
    bold = set()
    for column, (table, title) in enumerate(zip(tables, titles(tables), strict=True), 2):
        cells = [table.cell(*row) for row in order]
        texts = [f"{cell.perplexity:.2f}" if cell and cell.found else MISSING for cell in cells]
        frame[title] = texts
        bold |= {(i, column) for i, (pattern, variant) in enumerate(order) if variant in table.best(pattern)}
    return Grid("All models", frame, legend=SIDE_BY_SIDE_LEGEND, bold=frozenset(bold))


def comparison(runs: list[Run], committed: list[Run]) -> str:
    """Each run beside the committed one of the same identity, as Markdown."""
    before = {run.id: run.perplexity for run in committed}
    rows = variants(runs)
    lines = []
    for run in sorted(runs, key=lambda run: (run.model, run.pattern, rows[run.id])):
        if run.perplexity is None:
            continue
        value = before.get(run.id)
        change = "no committed record" if value is None else f"{100 * (run.perplexity / value - 1):+.3f} %"
        line = {"Run": run.id, "Model": model_words(run), "Method": rows[run.id].label, "Pattern": str(run.pattern)}
        line |= {"Perplexity here": f"{run.perplexity:.4f}", "Committed": "" if value is None else f"{value:.4f}"}
        lines.append(line | {"Difference": change})
    align = ("left",) * 4 + ("right",) * 3
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True, colalign=align)
