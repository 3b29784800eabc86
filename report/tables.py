"""Perplexities as tables: in full, side by side over models, beside published numbers, and beside committed records."""

import math
from dataclasses import asdict, dataclass

import pandas as pd
from tabulate import tabulate

from report.cells import Cell, Table, method_labels, paired_difference, rank, strictness
from report.grid import MISSING, Grid, with_error
from report.runs import Run

LEGEND = (
    "± one standard error over windows. Bold: the lowest perplexity of a pattern and every other that cannot be told "
    "apart from it (paired difference of the loss within two standard errors, or within Student's quantile of them "
    "where they come from few seeds); several in bold are a draw. ≈: cannot be told apart from the reference by the "
    "same rule. Δ loss: nats per token; ratio: of the perplexities. "
    "Targeted, all linear: share of zeros in the targeted weights, in all linear ones. "
    f"{MISSING}: not run, or does not apply."
)
SIDE_BY_SIDE_LEGEND = (
    "Perplexity. Bold: the lowest of a pattern and every other that cannot be told apart from it (paired difference of "
    "the loss within two standard errors, or within Student's quantile of them where they come from few seeds); "
    f"several in bold are a draw. {MISSING}: not run."
)


@dataclass(frozen=True)
class Contrast:
    """A second comparison besides that with Wanda, such as of each mask with and without the update."""

    header: str
    references: dict[str, str]
    """The label that a label is compared with; the others have no such comparison."""


def perplexity_grid(table: Table, contrast: Contrast | None = None) -> Grid:
    """One table in full: perplexity, paired difference to Wanda (and of the contrast), sparsity, time."""
    headers = ["Pattern", "Method", "Perplexity", "Δ loss to Wanda", "Ratio", "Targeted", "All linear"]
    rows, bold = [], set()
    for index, (pattern, label) in enumerate(table.rows()):
        rows.append(_row(table, pattern, label))
        if contrast:
            reference = table.cell(pattern, contrast.references.get(label, ""))
            rows[-1].insert(4, difference_text(table.cell(pattern, label), reference))
        if label in table.best(pattern):
            bold.add((index, 2))
    if contrast:
        headers.insert(4, contrast.header)
    title = f"Perplexity of {table.facts['model']}, {table.dataset}"
    return Grid(title, tuple(headers), rows, table.facts, LEGEND, frozenset(bold))


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
    keys = {key: None for table in tables for key in table.rows()}
    order = sorted(keys, key=lambda key: (strictness(key[0]), rank(key[1])))
    rows, bold = [], set()
    for i, (pattern, label) in enumerate(order):
        cells = [table.cell(pattern, label) for table in tables]
        rows.append([pattern, label, *(f"{cell.perplexity:.2f}" if cell and cell.found else MISSING for cell in cells)])
        bold |= {(i, 2 + j) for j, table in enumerate(tables) if label in table.best(pattern)}
    headers = ("Pattern", "Method", *(table.facts["model"] for table in tables))
    return Grid("All models", headers, rows, legend=SIDE_BY_SIDE_LEGEND, bold=frozenset(bold))


def frame(runs: list[Run]) -> pd.DataFrame:
    """One row per run, one column per field of `Run` except the losses of the windows."""
    rows = [asdict(run) | {"options": ", ".join(run.options)} for run in runs]
    return pd.DataFrame(rows, dtype=object).drop(columns="losses")  # object: beside a None, integers stay integers


def comparison(runs: list[Run], committed: list[Run]) -> str:
    """Each run beside the committed one of the same identity, as Markdown."""
    before = {run.id: run.perplexity for run in committed}
    labels = method_labels(runs)
    rows = []
    for run in sorted(runs, key=lambda run: (run.model, strictness(run.pattern), rank(labels[run.id]))):
        value = before.get(run.id)
        if run.perplexity is None:
            continue
        end = (
            ["", "no committed record"]
            if value is None
            else [f"{value:.4f}", f"{100 * (run.perplexity / value - 1):+.3f} %"]
        )
        rows.append([run.id, run.model, labels[run.id], run.pattern, f"{run.perplexity:.4f}", *end])
    headers = ["Run", "Model", "Method", "Pattern", "Perplexity here", "Committed", "Difference"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left",) * 4 + ("right",) * 3)


def _row(table: Table, pattern: str, label: str) -> list[str]:
    cell, reference = table.cell(pattern, label), table.cell(pattern, table.reference)
    if cell is None or not cell.found:
        return [pattern, label, *[MISSING] * 5]
    perplexity = with_error(cell.perplexity, cell.mean("stderr"), ".2f")
    if (spread := cell.spread()) is not None:
        perplexity += f" ({len(cell.runs)} seeds, sd {spread:.2f})"
    ratio = MISSING
    if cell is reference:
        ratio = "1"
    elif reference and (difference := paired_difference(cell, reference)):
        ratio = f"{math.exp(difference.mean):.3f}"
    shares = [cell.mean("sparsity_targeted"), cell.mean("sparsity_linear")]
    sparsity = [MISSING if share is None else f"{share:.1%}" for share in shares]
    return [pattern, label, perplexity, difference_text(cell, reference), ratio, *sparsity]
