"""Perplexity by calibration set: how many sequences, which draw, from which text."""

import pandas as pd

from report.grid import MISSING, Grid, with_error
from report.perplexity import difference_text
from report.runs import Run
from report.tables import Table
from report.words import facts_of

LEGEND = (
    "Perplexity: mean over the seeds, ± one standard error over windows. Δ loss: nats per token, with a standard error "
    "over windows and seeds, paired in both; ≈: within two of them, or Student's quantile where there are few seeds. "
    f"{MISSING}: not run, or not with all seeds yet."
)


def calibrated(table: Table) -> Run:
    """The first run of a table that read its calibration set."""
    return next(run for run in table.runs if run.calibrates)


def source(table: Table) -> str:
    """The name of its calibration text."""
    return str(calibrated(table).config["calibration"]["name"])


def size(table: Table) -> int:
    """The number of its calibration sequences; 0 where all of a file are used."""
    return calibrated(table).config["calibration"]["n_sequences"] or 0


def calibration_grid(tables: list[Table]) -> Grid:
    """All calibration sets of one model, a table for each; a row for each set and method."""
    rows = []
    for table in tables:
        for cell in sorted(table.cells, key=lambda cell: (cell.variant, cell.pattern)):
            if cell.variant.method != "dense":
                row = {"Calibration text": source(table), "Method": cell.variant.label, "Sequences": str(size(table))}
                row["Seeds"] = str(len(cell.runs) if cell.found else 0)
                perplexity = with_error(cell.perplexity, cell.mean("stderr"), ".2f") if cell.found else MISSING
                row |= {"Perplexity": perplexity}
                row["sd over seeds"] = MISSING if cell.spread is None else f"{cell.spread:.2f}"
                rows.append(row | {"Δ loss to Wanda": difference_text(cell, table.reference(cell.pattern))})
    runs = list({run.id: run for table in tables for run in table.runs}.values())
    facts = {key: tables[0].facts[key] for key in ("model", "evaluation", "pruned")}
    facts["pattern"] = ", ".join(map(str, sorted({pattern for table in tables for pattern in table.patterns})))
    lengths = {calibrated(table).config["calibration"]["seq_len"] or "all" for table in tables}
    facts["sequence length"] = ", ".join(sorted(map(str, lengths)))
    dense = [run.perplexity for run in runs if run.method == "dense" and run.perplexity is not None]
    facts["dense"] = f"{dense[0]:.2f}" if dense else MISSING
    title = f"Perplexity of {facts['model']} by calibration set"
    return Grid(title, pd.DataFrame(rows), facts | facts_of(runs, "machine"), LEGEND)
