"""A table of text, and how it is written as Markdown and LaTeX."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

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
    frame: pd.DataFrame
    """Plain text; numbers are ready to be shown."""
    facts: dict[str, str] = field(default_factory=dict)
    """What holds for all rows."""
    legend: str = ""
    """How to read marks and errors."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells in bold."""
    words: int = 2
    """So many columns from the left are words; the others are numbers."""


def to_markdown(grids: list[Grid]) -> str:
    """All tables as Markdown; a legend that they share stands once, behind the last."""
    parts = []
    for index, grid in enumerate(grids):
        frame = grid.frame.map(lambda text: text.replace("|", r"\|"))
        for i, j in grid.bold:
            frame.iat[i, j] = f"**{frame.iat[i, j]}**"
        align = ["left" if j < grid.words else "right" for j in range(frame.shape[1])]
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if len(frame) else None)
        facts = "".join(f"- {name}: {text}\n" for name, text in grid.facts.items())
        shared = index + 1 < len(grids) and grids[index + 1].legend == grid.legend
        legend = f"\n{grid.legend}\n" if grid.legend and not shared else ""
        parts.append(f"### {grid.title}\n\n{facts}{chr(10) if facts else ''}{table}\n{legend}")
    return "\n".join(parts)


def to_latex(grids: list[Grid]) -> str:
    """All tables as LaTeX floats over both columns; needs the package booktabs."""
    parts = []
    for grid in grids:
        facts = " ".join(f"{name.capitalize()}: {text}." for name, text in grid.facts.items())
        bold = np.full(grid.frame.shape, "", dtype=object)
        for i, j in grid.bold:
            bold[i, j] = "textbf:--rwrap;"
        escaped = grid.frame.map(lambda text: text.translate(LATEX))
        escaped.columns = escaped.columns.map(lambda text: text.translate(LATEX))
        starts = escaped.iloc[1:, 0].ne(escaped.iloc[:, 0].shift()[1:])  # of another pattern or model: a rule above
        escaped.iloc[1:, 0] = escaped.iloc[1:, 0].where(~starts, "\\midrule\n" + escaped.iloc[1:, 0])
        latex = (
            escaped.style.hide(axis="index")
            .apply(lambda _, marks=bold: marks, axis=None)
            .to_latex(
                hrules=True,
                column_format="l" * grid.words + "r" * (grid.frame.shape[1] - grid.words),
                caption=f"{grid.title}. {facts} {grid.legend}".strip().translate(LATEX),
                environment="table*",
                position_float="centering",
            )
        )
        parts.append(latex.replace(r"\centering", r"\centering\small\setlength{\tabcolsep}{4pt}", 1))
    return "\n".join(parts)


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A number with its standard error, both in the format `form` (the sign of it for the number alone)."""
    return (f"{value:{form}}" + (f" ± {stderr:{form.lstrip('+')}}" if stderr else "")).replace("-", "−")
