"""No name, of a model, a method, a text or a machine, breaks a table or a figure."""

import io
import re
from pathlib import Path

import pytest

from report.grid import Grid, to_latex, to_markdown
from report.kinds import KINDS, Material
from report.reading import runs_of
from report.rows import read_published
from tests.report.records import losses, make_record

NAMES = [
    "a\nb",
    "a|b",
    "a\\|b",
    "a\\",
    "&amp;",
    "_a_ *b* `c`",
    "50%",
    "# x",
    "<b>x</b><!--",
    "$x$",
    "[x](y)",
    "*x",
    "\u2028",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_a_table(name: str) -> None:
    """Of models, methods and texts; in titles, facts, headers and cells."""
    records = [make_record(f"{model}{i}", method, losses(0.1 * i), model=model) for model in (name, "toy")
               for i, method in enumerate(("wanda", name))]  # fmt: skip
    for record in records:
        record["config"]["calibration"]["name"] = record["machine"]["cpu"] = name
    made = KINDS["perplexity"](Material(runs_of(records), read_published(Path("nowhere"))))
    grids = [*made.grids, Grid(name, made.grids[0].frame.assign(Pattern=name))]
    rows = [line for line in to_markdown(grids).splitlines() if line.startswith("|")]
    pipes = [len(re.findall(r"\|", re.sub(r"\\.", "", row))) for row in rows]
    assert len(rows) == sum(len(grid.frame) + 2 for grid in grids)
    assert pipes == [len(grid.frame.columns) + 1 for grid in grids for _ in range(len(grid.frame) + 2)]
    assert not re.search(r"(?<!\\)[<`]", to_markdown(grids))
    latex = to_latex(grids)
    body = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert len(body) == sum(len(grid.frame) + 1 for grid in grids) and not re.search(r"(?<!\\)[%#]", latex)
    assert latex.count("{") == latex.count("}") and not re.search(r"^(\[|\*)", latex, re.MULTILINE)
    assert made.draw
    made.draw().savefig(io.BytesIO(), format="pdf")
