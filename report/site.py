"""The results as one page for a browser: all tables, sorted by any column, the figures, and the records behind them.

It is static: no server, no network, and without scripts only the sorting is missed.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd
import yaml

from dass.errors import DassError
from dass.manifests import Manifest
from dass.records import write_atomically
from report.figures import write_figure
from report.grid import MISSING, Grid
from report.kinds import Material, find_kind
from report.reading import planned_runs
from report.runs import Run
from report.words import calibration_words, evaluation_words, machine_words, model_words

TEMPLATE = "site.html.j2"
WIDTH, HEIGHT, MARGIN = 640, 160, 6  # of the plot of a run's windows, in units of its own


class Shown(NamedTuple):
    """A report on the page."""

    name: str
    about: str  # what it shows
    grids: list[Grid]
    figure: str | None  # the address of a picture, relative to the page


def write_site(folder: Path, runs: list[Run], manifests: list[Manifest], published: pd.DataFrame) -> Path:
    """Write the page of the sweeps that have a result, each as its experiment is reported; returns its path.

    Raises:
        DassError: there is none.
    """
    reports = []
    for manifest in manifests:
        planned = planned_runs(manifest, runs)
        if any(not run.why for run in planned):
            found, name = find_kind(manifest.report), manifest.name.removesuffix("-small")
            made = found(Material(planned, published))
            pictures = write_figure(made.draw, folder / "figures", name) if made.draw is not None else []
            figure = next((f"figures/{path.name}" for path in pictures if path.suffix == ".png"), None)
            reports.append(Shown(name, inspect.getdoc(found) or "", made.grids, figure))
    if not reports:
        raise DassError("No sweep has a result: launch one with `python -m experiments.prune -m experiment=NAME`.")
    path = folder / "index.html"
    write_atomically(path, render_site(reports))
    return path


def render_site(reports: list[Shown]) -> str:
    """The page: a section for each report, and one for each run that stands behind a row of its tables."""
    runs = {run.id: run for shown in reports for grid in shown.grids for row in grid.runs for run in row}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"yaml": lambda tree: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}
    functions = (points, run_words, model_words, machine_words, calibration_words, evaluation_words)
    environment.globals |= {function.__name__: function for function in functions}
    constants = {"width": WIDTH, "height": HEIGHT, "missing": MISSING}
    return environment.get_template(TEMPLATE).render(reports=reports, runs=runs.values(), **constants)


def run_words(run: Run) -> str:
    """A run in a few words: what tells it from the others behind a row."""
    trained = f" (trained with seed {run.training_seed})" if run.training_seed is not None else ""
    order = f", {run.order} order {run.order_seed}" if run.order_seed is not None else ""
    return f"{run.model}{trained}, {run.method}, {run.pattern}, seed {run.seed}{order}"


def points(losses: Sequence[float]) -> list[tuple[float, float, float]]:
    """Of each window x and y in its plot, and its loss; the lowest loss lies at the bottom, the highest at the top."""
    lowest, step = min(losses), WIDTH / len(losses)
    scale = (HEIGHT - 2 * MARGIN) / (max(losses) - lowest or 1)
    return [(step * (i + 0.5), HEIGHT - MARGIN - scale * (loss - lowest), loss) for i, loss in enumerate(losses)]
