"""A table of text, how numbers are put into it, and how it is written as Markdown and LaTeX."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dass.errors import one_line
from report.runs import Run
from report.tables import Difference

MISSING = "—"
MARKDOWN = re.compile(r"[\\`*<|&$~#]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])")  # within a word _ is no mark
LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "---"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$"}
    | {"±": r"$\pm$", "×": r"$\times$", "≈": r"$\approx$", "Δ": r"$\Delta$"}
)


@dataclass(frozen=True)
class Grid:
    """One table with what a reader must know beside it."""

    title: str
    frame: pd.DataFrame  # plain text; numbers are ready to be shown
    facts: dict[str, str] = field(default_factory=dict)  # what holds for all rows
    legend: str = ""  # how to read marks and errors
    bold: frozenset[tuple[int, int]] = frozenset()  # row and column of the cells in bold
    words: int = 2  # so many columns from the left are words; the others are numbers
    runs: list[list[Run]] = field(default_factory=list)  # behind each row, those with a record; none: behind no row
    cells: dict[tuple[int, int], list[Run]] = field(default_factory=dict)  # behind a cell, if not all of its row


def number(value: float | None, form: str, stderr: float | None = None) -> str:
    """A number with its standard error, if it has one, both in the format `form` (its sign for the number alone)."""
    if value is None or np.isnan(value):
        return MISSING
    error = f" ± {stderr:{form.lstrip('+')}}" if stderr and not np.isnan(stderr) else ""
    return f"{value:{form}}{error}".replace("-", "−")


def marked(difference: Difference | None, form: str = "+.3f") -> str:
    """A difference with its standard error; marked where the two cannot be told apart."""
    if difference is None:
        return MISSING
    return ("" if difference.counts else "≈ ") + number(difference.mean, form, difference.stderr)


def grid_of(
    title: str,
    cells: pd.DataFrame,
    row: Callable[[Any], dict[str, str]],
    facts: dict[str, str],
    legend: str,
    bold: str | None = None,
) -> Grid:
    """One table: of each cell pattern, label and what `row` makes of it; the best have their column `bold` in bold."""
    frame = pd.DataFrame(
        [{"Pattern": str(cell.pattern), "Method": cell.label} | row(cell) for cell in cells.itertuples()]
    )
    best = {(int(index), list(frame).index(bold)) for index in np.flatnonzero(cells.is_best) if bold}
    return Grid(title, frame, facts, legend, frozenset(best), runs=recorded(cells.runs))


def recorded(rows: Iterable[list[Run]]) -> list[list[Run]]:
    """Of the runs behind each row those that have a record, each once."""
    return [list({run.id: run for run in runs if run.record}.values()) for runs in rows]


def as_markdown(text: str) -> str:
    """A text in which Markdown reads no mark, HTML included, on one line."""
    return MARKDOWN.sub(r"\\\g<0>", one_line(text))


def as_latex(text: str) -> str:
    """A text in which LaTeX reads no command, on one line; behind the end of a row, [ and * would be arguments."""
    escaped = one_line(text).translate(LATEX)
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped


def to_markdown(grids: list[Grid]) -> str:
    """All tables as Markdown; a legend that they share stands once, behind the last."""
    parts = []
    for index, grid in enumerate(grids):
        frame = grid.frame.map(as_markdown).rename(columns=as_markdown)
        for i, j in grid.bold:
            frame.iat[i, j] = f"**{frame.iat[i, j]}**"
        align = ["left" if j < grid.words else "right" for j in range(frame.shape[1])]
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if len(frame) else None)
        facts = "".join(f"- {name}: {as_markdown(text)}\n" for name, text in grid.facts.items())
        shared = index + 1 < len(grids) and grids[index + 1].legend == grid.legend
        legend = f"\n{grid.legend}\n" if grid.legend and not shared else ""
        parts.append(f"### {as_markdown(grid.title)}\n\n{facts}{chr(10) if facts else ''}{table}\n{legend}")
    return "\n".join(parts)


def to_latex(grids: list[Grid]) -> str:
    """All tables as LaTeX floats over both columns; needs the package booktabs."""
    parts = []
    for grid in grids:
        facts = " ".join(f"{name.capitalize()}: {text}." for name, text in grid.facts.items())
        escaped = grid.frame.map(as_latex).rename(columns=as_latex)
        for i, j in grid.bold:
            escaped.iat[i, j] = rf"\textbf{{{escaped.iat[i, j]}}}"
        starts = escaped.iloc[1:, 0].ne(escaped.iloc[:, 0].shift()[1:])  # of another pattern or model: a rule above
        escaped.iloc[1:, 0] = escaped.iloc[1:, 0].where(~starts, "\\midrule\n" + escaped.iloc[1:, 0])
        latex = escaped.style.hide(axis="index").to_latex(
            hrules=True,
            column_format="l" * grid.words + "r" * (grid.frame.shape[1] - grid.words),
            caption=as_latex(f"{grid.title}. {facts} {grid.legend}".strip()),
            environment="table*",
            position_float="centering",
        )
        parts.append(latex.replace(r"\centering", r"\centering\small\setlength{\tabcolsep}{4pt}", 1))
    return "\n".join(parts)
