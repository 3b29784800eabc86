"""A table of text, and how it is written as Markdown, LaTeX and CSV."""

from dataclasses import dataclass, field

import pandas as pd
from tabulate import tabulate

MISSING = "—"
LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "---"}
    | {"<": "$<$", ">": "$>$", "±": r"$\pm$", "×": r"$\times$", "≈": r"$\approx$", "Δ": r"$\Delta$", "−": "$-$"}
)


@dataclass(frozen=True)
class Grid:
    """One table with what a reader must know beside it."""

    title: str
    headers: tuple[str, ...]
    rows: list[list[str]]
    """Plain text, as many as headers each."""
    facts: dict[str, str] = field(default_factory=dict)
    """What holds for all rows."""
    legend: str = ""
    """How to read marks and errors."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells in bold."""
    text_columns: int = 2
    """So many columns from the left are words; the others are numbers."""


def to_markdown(grids: list[Grid]) -> str:
    """All tables as Markdown; a legend that they share stands once, behind the last."""
    parts = []
    for index, grid in enumerate(grids):
        rows = [
            [f"**{text}**" if (i, j) in grid.bold else text.replace("|", r"\|") for j, text in enumerate(row)]
            for i, row in enumerate(grid.rows)
        ]
        align = ["left" if j < grid.text_columns else "right" for j in range(len(grid.headers))]
        table = tabulate(rows, grid.headers, "pipe", disable_numparse=True, colalign=align if rows else None)
        facts = "".join(f"- {name}: {text}\n" for name, text in grid.facts.items())
        shared = index + 1 < len(grids) and grids[index + 1].legend == grid.legend
        legend = f"\n{grid.legend}\n" if grid.legend and not shared else ""
        parts.append(f"### {grid.title}\n\n{facts}{chr(10) if facts else ''}{table}\n{legend}")
    return "\n".join(parts)


def to_latex(grids: list[Grid]) -> str:
    """All tables as LaTeX floats over both columns; needs the package booktabs."""
    lines: list[str] = []
    for grid in grids:
        facts = " ".join(f"{name.capitalize()}: {text}." for name, text in grid.facts.items())
        caption = f"{grid.title}. {facts} {grid.legend}".strip().translate(LATEX)
        columns = "l" * grid.text_columns + "r" * (len(grid.headers) - grid.text_columns)
        header = " & ".join(text.translate(LATEX) for text in grid.headers) + r" \\"
        lines += [r"\begin{table*}", r"\centering\small\setlength{\tabcolsep}{4pt}", rf"\caption{{{caption}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header]
        before = None
        for i, row in enumerate(grid.rows):
            cells = [text.translate(LATEX) for text in row]
            cells = [rf"\textbf{{{text}}}" if (i, j) in grid.bold else text for j, text in enumerate(cells)]
            lines += [r"\midrule"] * (row[0] != before) + [" & ".join(cells) + r" \\"]
            before = row[0]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""]
    return "\n".join(lines)


def to_csv(frame: pd.DataFrame) -> str:
    """A table of numbers in full precision."""
    return frame.to_csv(index=False, lineterminator="\n")


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A number with its standard error, both in the format `form` (the sign of it for the number alone)."""
    return (f"{value:{form}}" + (f" ± {stderr:{form.lstrip('+')}}" if stderr else "")).replace("-", "−")
