"""The tables of the report as Markdown, LaTeX and CSV, and the comparison with committed records."""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
from tabulate import tabulate

from dass.report.cells import Run, Table, method_labels, paired_difference, rank, strictness

MISSING = "—"
HEADERS = ("Pattern", "Method", "Perplexity", "Δ loss to Wanda", "Ratio", "Targeted", "All linear", "Pruning [s]")
LEGEND = (
    "± one standard error over windows. Bold: the lowest perplexity of a pattern and every other that cannot be told "
    "apart from it (paired difference of the loss within two standard errors); several in bold are a draw. "
    "≈: cannot be told apart from the reference by the same rule. Δ loss: nats per token; ratio: of the perplexities. "
    f"Targeted, all linear: share of zeros in the targeted weights, in all linear ones. {MISSING}: not run, or "
    "does not apply."
)
LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "---"}
    | {"<": "$<$", ">": "$>$", "±": r"$\pm$", "×": r"$\times$", "≈": r"$\approx$", "Δ": r"$\Delta$", "−": "$-$"}
)


def to_markdown(tables: list[Table]) -> str:
    """All tables as Markdown."""
    parts = []
    for table in tables:
        rows = [[*row[:2], f"**{row[2]}**" if bold else row[2], *row[3:]] for row, bold in _body(table)]
        rows = [[text.replace("|", r"\|") for text in row] for row in rows]
        grid = tabulate(rows, HEADERS, "pipe", disable_numparse=True, colalign=("left", "left", *["right"] * 6))
        facts = "\n".join(f"- {name}: {text}" for name, text in table.facts.items())
        parts.append(f"### Perplexity of {table.facts['model']}, {table.dataset}\n\n{facts}\n\n{grid}\n")
    return "\n".join([*parts, LEGEND + "\n"])


def to_latex(tables: list[Table]) -> str:
    """All tables as LaTeX floats over both columns; needs the package booktabs."""
    header = " & ".join(text.translate(LATEX) for text in HEADERS) + r" \\"
    opening = [r"\begin{table*}", r"\centering\small\setlength{\tabcolsep}{4pt}"]
    closing = [r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""]
    lines: list[str] = []
    for table in tables:
        facts = " ".join(f"{name.capitalize()}: {text}." for name, text in table.facts.items())
        caption = f"Perplexity. {facts} {LEGEND}".translate(LATEX)
        lines += [*opening, rf"\caption{{{caption}}}", r"\begin{tabular}{llrrrrrr}", r"\toprule", header]
        before = ""
        for row, bold in _body(table):
            cells = [text.translate(LATEX) for text in row]
            cells[2] = rf"\textbf{{{cells[2]}}}" if bold else cells[2]
            lines += [r"\midrule"] * (row[0] != before) + [" & ".join(cells) + r" \\"]
            before = row[0]
        lines += closing
    return "\n".join(lines)


def frame(runs: list[Run]) -> pd.DataFrame:
    """One row per run, one column per field of `Run` except the losses of the windows."""
    rows = [asdict(run) | {"options": ", ".join(run.options)} for run in runs]
    return pd.DataFrame(rows, dtype=object).drop(columns="losses")  # object: beside a None, integers stay integers


def to_csv(runs: list[Run]) -> str:
    """`frame` as CSV in full precision."""
    return frame(runs).to_csv(index=False, lineterminator="\n")


def comparison(runs: list[Run], committed: list[Run]) -> str:
    """Each run beside the committed one of the same identity, as Markdown."""
    before = {(run.id, run.dataset): run.perplexity for run in committed}
    labels = method_labels(runs)
    rows = []
    for run in sorted(runs, key=lambda run: (run.setting[:2], strictness(run.pattern), rank(labels[run.id]))):
        value = before.get((run.id, run.dataset))
        end = (
            ["", "no committed record"]
            if value is None
            else [f"{value:.4f}", f"{100 * (run.perplexity / value - 1):+.3f} %"]
        )
        rows.append([run.id, run.model, labels[run.id], run.pattern, f"{run.perplexity:.4f}", *end])
    headers = ["Run", "Model", "Method", "Pattern", "Perplexity here", "Committed", "Difference"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left",) * 4 + ("right",) * 3)


def _body(table: Table) -> list[tuple[list[str], bool]]:
    """The cells of each row as plain text, and whether its perplexity is the best or in a draw with it."""
    best = {pattern: table.best(pattern) for pattern in table.patterns}
    return [(_row(table, pattern, label), label in best[pattern]) for pattern, label in table.rows()]


def _row(table: Table, pattern: str, label: str) -> list[str]:
    cell, reference = table.cell(pattern, label), table.cell(pattern, table.reference)
    if cell is None:
        return [pattern, label, *[MISSING] * 6]
    perplexity = _with_error(cell.perplexity, cell.mean("stderr"), ".2f")
    if len(cell.runs) > 1:
        perplexity += f" ({len(cell.runs)} seeds, sd {np.std([run.perplexity for run in cell.runs], ddof=1):.2f})"
    delta, ratio = MISSING, MISSING
    if cell is reference:
        delta, ratio = "reference", "1"
    elif reference and (difference := paired_difference(cell, reference)):
        mark = "" if difference.counts else "≈ "
        delta = mark + _with_error(difference.mean, difference.stderr, "+.4f")
        ratio = f"{math.exp(difference.mean):.3f}"
    shares = [cell.mean("sparsity_targeted"), cell.mean("sparsity_linear")]
    seconds = cell.mean("pruning_seconds")
    numbers = [
        *(MISSING if x is None else f"{x:.1%}" for x in shares),
        MISSING if seconds is None else f"{seconds:.1f}",
    ]
    return [pattern, label, perplexity, delta, ratio, *numbers]


def _with_error(value: float, stderr: float | None, form: str) -> str:
    return (f"{value:{form}}" + (f" ± {stderr:{form.lstrip('+')}}" if stderr else "")).replace("-", "−")
