"""Published numbers beside ours, with what would make them comparable."""

from pathlib import Path
from typing import Any

import pandas as pd

from dass.errors import DassError
from report.grid import MISSING, Grid
from report.runs import Run
from report.tables import Table

DATASETS = {"wikitext2": "wikitext2-test"}  # what our evaluations are called in the publications' file
COLUMNS = ["metric", "dataset", "model", "method", "pattern", "value", "seq_len", "targets", "source"]
LEGEND = (
    "A published number is comparable where data, sequence length and pruned projections agree (the dense model prunes "
    f"none). {MISSING}: not run here."
)


def read_published(folder: Path) -> pd.DataFrame:
    """The perplexities of all CSV files of `results/published`; an unknown cell is empty and left out.

    Raises:
        DassError: a file cannot be read, lacks a column, or holds a value that is no number; names it.
    """
    frames = [pd.DataFrame(columns=COLUMNS)]
    for path in sorted(folder.glob("*.csv")):
        try:
            rows = pd.read_csv(path)
            if missing := [column for column in COLUMNS if column not in rows]:
                raise DassError(f"{path} has no column {missing[0]}: the columns are {', '.join(COLUMNS)}.")
            rows["value"], rows["seq_len"] = pd.to_numeric(rows["value"]), pd.to_numeric(rows["seq_len"])
        except ValueError as error:  # pandas' own errors among them
            raise DassError(f"{path} is not a table of published numbers ({error}): correct it.") from error
        frames.append(rows[(rows["metric"] == "perplexity") & rows["value"].notna()][COLUMNS])
    return pd.concat([frame for frame in frames if len(frame)] or frames, ignore_index=True)


def beside_published(tables: list[Table], published: pd.DataFrame) -> list[Grid]:
    """Our perplexity, found or missing, beside each published one of the same cell; no grid where there is none."""
    rows = []
    for table in tables:
        for number in published[published["model"] == table.runs[0].model].itertuples():
            cell = table.find(number.pattern, number.method, {})  # of several variants of it, the one as published
            if cell is not None:
                run = cell.runs[0]
                row = {"Model": number.model, "Method": cell.variant.label, "Pattern": number.pattern}
                row["Our perplexity"] = f"{cell.perplexity:.2f}" if cell.found else MISSING
                row["Published perplexity"] = f"{number.value:g}"
                row["Ours: data, length, targets"] = f"{run.dataset}, {run.seq_len}, {run.setting.pruned or 'none'}"
                row["Published: data, length, targets"] = f"{number.dataset}, {number.seq_len}, {number.targets}"
                rows.append(row | {"Comparable": why_not_comparable(number, run) or "yes", "Source": number.source})
    frame = pd.DataFrame(rows).drop_duplicates(ignore_index=True)
    return [Grid("Beside published numbers", frame, legend=LEGEND, words=3)] if rows else []


def why_not_comparable(number: Any, run: Run) -> str:
    """What differs between a published number (a row of `read_published`) and ours; empty where nothing does."""
    differing = {
        "data": DATASETS.get(run.dataset) != number.dataset,
        "sequence length": run.seq_len != number.seq_len,
        "targets": number.method != "dense" and run.setting.pruned != number.targets,
        "a part of the text": run.config["evaluation"].get("n_windows") is not None,
    }
    words = [name for name, differs in differing.items() if differs]
    return f"no: {', '.join(words)}" if words else ""
