"""Published numbers beside ours, with what would make them comparable."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dass.errors import DassError
from dass.report.cells import Table
from dass.report.grid import MISSING, Grid

DATASETS = {"wikitext2": "wikitext2-test"}  # what our evaluations are called in the publications' file
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
    """The perplexities of all CSV files of `results/published`; DassError where a file lacks a column."""
    numbers: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        rows = pd.read_csv(path)
        if missing := [column for column in COLUMNS if column not in rows]:
            raise DassError(f"{path} has no column {missing[0]}: the columns are {', '.join(COLUMNS)}.")
        rows = rows[(rows["metric"] == "perplexity") & rows["value"].notna()]
        numbers += [Published(**row) for row in rows.drop(columns="metric").to_dict("records")]
    return numbers


def beside_published(tables: list[Table], published: list[Published]) -> list[Grid]:
    """Ours and the published perplexity of every cell that has both or whose run is missing; no grid where none has."""
    rows = []
    for table in tables:
        for number in published:
            if table.facts["model"].split(" (")[0] != number.model:
                continue
            cell = table.cell(number.pattern, number.method)
            if cell is None:
                continue
            rows.append(
                [
                    number.model,
                    number.method,
                    number.pattern,
                    f"{cell.perplexity:.2f}" if cell.found else MISSING,
                    f"{number.value:g}",
                    f"{cell.runs[0].dataset}, {cell.runs[0].seq_len}, {cell.runs[0].pruned or 'none'}",
                    f"{number.dataset}, {number.seq_len}, {number.targets}",
                    why_not_comparable(number, table, number.method) or "yes",
                    number.source,
                ]
            )
    headers = (
        "Model",
        "Method",
        "Pattern",
        "Ours",
        "Published",
        "Ours: data, length, targets",
        "Published: data, length, targets",
        "Comparable",
        "Source",
    )
    return [Grid("Beside published perplexities", headers, rows, legend=LEGEND, text_columns=3)] if rows else []


def why_not_comparable(number: Published, table: Table, label: str) -> str:
    """What differs between a published number and ours, in words; empty where nothing does."""
    cell = table.cell(number.pattern, label)
    assert cell is not None
    run = cell.runs[0]
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
