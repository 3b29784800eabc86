"""Published numbers beside ours, with what would make them comparable."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dass.errors import DassError
from report.cells import Cell, Table
from report.grid import MISSING, Grid
from report.runs import Run

DATASETS = {"wikitext2": "wikitext2-test"}  # what our evaluations are called in the publications' file
AS_PUBLISHED = {  # the options that tell the published variant from the others of an ablation
    "dense": (),
    "magnitude": ("axis.gate=layer", "update=none"),
    "wanda": ("axis.gate=in", "update=none"),
    "sparsegpt": ("update=obs",),
    "dass": ("alpha=0.5", "axis.gate=out", "update=none"),
}
COLUMNS = ("metric", "dataset", "model", "method", "pattern", "value", "seq_len", "targets", "source")
LEGEND = (
    "A published number is comparable where data, sequence length and pruned projections agree (the dense model prunes "
    f"none). {MISSING}: not run here."
)


@dataclass(frozen=True)
class Published:
    """One number of somebody else's."""

    dataset: str
    model: str
    method: str
    pattern: str
    value: float
    seq_len: int
    targets: str
    source: str


def read_published(folder: Path) -> list[Published]:
    """The perplexities of all CSV files of `results/published`; an unknown cell is empty and left out.

    Raises:
        DassError: a file cannot be read, lacks a column, or holds a value that is no number; names it.
    """
    numbers: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            rows = pd.read_csv(path)
            if missing := [column for column in COLUMNS if column not in rows]:
                raise DassError(f"{path} has no column {missing[0]}: the columns are {', '.join(COLUMNS)}.")
            rows["value"], rows["seq_len"] = pd.to_numeric(rows["value"]), pd.to_numeric(rows["seq_len"])
        except ValueError as error:  # pandas' own errors among them
            raise DassError(f"{path} is not a table of published numbers ({error}): correct it.") from error
        rows = rows[(rows["metric"] == "perplexity") & rows["value"].notna()]
        numbers += [Published(**row) for row in rows[list(COLUMNS[1:])].to_dict("records")]
    return numbers


def beside_published(tables: list[Table], published: list[Published]) -> list[Grid]:
    """Our perplexity, found or missing, beside each published one of the same cell; no grid where there is none."""
    rows = []
    for table in tables:
        for number in published:
            cell = published_variant(table, number)
            if cell is None or table.facts["model"].split(" (")[0] != number.model:
                continue
            run = cell.runs[0]
            rows.append(
                [
                    number.model,
                    cell.label,
                    number.pattern,
                    f"{cell.perplexity:.2f}" if cell.found else MISSING,
                    f"{number.value:g}",
                    f"{run.dataset}, {run.seq_len}, {run.pruned or 'none'}",
                    f"{number.dataset}, {number.seq_len}, {number.targets}",
                    why_not_comparable(number, run) or "yes",
                    number.source,
                ]
            )
    headers = (
        "Model",
        "Method",
        "Pattern",
        "Our perplexity",
        "Published perplexity",
        "Ours: data, length, targets",
        "Published: data, length, targets",
        "Comparable",
        "Source",
    )
    unique = list(dict.fromkeys(map(tuple, rows)))
    grid = Grid("Beside published numbers", headers, [list(row) for row in unique], legend=LEGEND, text_columns=3)
    return [grid] if rows else []


def published_variant(table: Table, number: Published) -> Cell | None:
    """Our cell of a published method: of several variants of it, the one as published."""
    cells = [cell for cell in table.cells if (cell.method, cell.pattern) == (number.method, number.pattern)]
    if len(cells) > 1:
        cells = [
            cell
            for cell in cells
            if all(option in cell.runs[0].options for option in AS_PUBLISHED.get(number.method, ()))
        ]
    return cells[0] if len(cells) == 1 else None


def why_not_comparable(number: Published, run: Run) -> str:
    """What differs between a published number and ours, in words; empty where nothing does."""
    differing = []
    if DATASETS.get(run.dataset) != number.dataset:
        differing.append("data")
    if run.seq_len != number.seq_len:
        differing.append("sequence length")
    if number.method != "dense" and run.pruned != number.targets:
        differing.append("targets")
    if not run.whole_text:
        differing.append("a part of the text")
    return f"no: {', '.join(differing)}" if differing else ""
