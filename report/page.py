"""Pages whose numbers come from the records: a Jinja template with the functions below.

A sentence that a number must bear out is followed by `require(...)`; where the records no longer support it, the page
is not built.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from dass.errors import DassError, told
from dass.manifests import Manifest
from report.diagnostics import diagnostics_frame
from report.grid import marked, number
from report.orders import gain, order_frame, shares, sources
from report.predictors import Measured, blocks_frame, correlation
from report.reading import planned_runs
from report.runs import Run
from report.tables import Difference, cells_of, find, paired_difference, unbeaten

SUFFIX = ".template.md"
NOTE = "<!-- Built by `make tables` from {}: change that file. -->\n\n"
VERDICTS = {-1: "holds here", 0: "cannot be told", 1: "does not hold here"}


@dataclass(frozen=True)
class View:
    """A table, asked by method and pattern; of several variants the one with these options, or the published one."""

    cells: pd.DataFrame

    def cell(self, method: str, pattern: str, **options: Any) -> Any:
        """The one cell with a result; `axis` means that of gate and up. DassError if there is none, or several."""
        wanted = {("axis.gate" if key == "axis" else key): value for key, value in options.items()}
        cell = find(self.cells, pattern, method, wanted)
        if cell is None or cell.runs[0].why:
            raise DassError(f"The page asks for {method} at {pattern} {options}, of which there is not one result.")
        return cell

    def ppl(self, method: str, pattern: str, **options: Any) -> float:
        """The perplexity of a cell."""
        return self.cell(method, pattern, **options).perplexity

    def delta(self, method: str, pattern: str, than: str | dict[str, Any] = "wanda", **options: Any) -> Difference:
        """The paired difference of a cell to another method, or to its own with other options."""
        words, others = (than, {}) if isinstance(than, str) else (method, options | than)
        other = self.cell(words, "dense" if words == "dense" else pattern, **others)
        return compare(self.cell(method, pattern, **options), other)


@dataclass(frozen=True)
class Page:
    """What a template can ask for."""

    runs: dict[str, list[Run]]  # by experiment

    def view(self, experiment: str, model: str, text: str | None = None, sequences: int | None = None) -> View:
        """The table of a model; of several calibration sets that with this text and number of sequences."""
        cells = cells_of(self._of(experiment)).query("model == @model")
        cells = cells if text is None else cells.query("source == @text and sequences == @sequences")
        if (n := cells.table.nunique()) != 1:
            raise DassError(f"The page asks for one table of {model} in {experiment}: there are {n}.")
        return View(cells)

    def minutes(self, *experiments: str) -> float:
        """The stages of all runs of these experiments (none named: of all), each run once."""
        runs = {run.id: run for name in experiments or self.runs for run in self._of(name)}
        stages = [stage for run in runs.values() if run.record for stage in run.record["stages"].values()]
        return sum(stage["seconds"] for stage in stages) / 60

    def machines(self) -> list[str]:
        """What the runs ran on."""
        found = {run.record["machine"]["cpu"] for runs in self.runs.values() for run in runs if run.record}
        return sorted(found)

    def block_mean(self, model: str, measure: str, methods: str = "", role: str = "", reduce: str = "mean") -> float:
        """A number of the diagnostics, over the blocks."""
        blocks = diagnostics_frame(self._measured()).groupby(["model", "measure", "methods", "role"]).value
        return float(blocks.agg(reduce)[model, measure, methods, role])

    def blocks(self, method: str = "dass", model: str | None = None) -> pd.DataFrame:
        """The blocks of all models, or of one, as `blocks_frame` gives them; of a method beside Wanda."""
        found = blocks_frame(self._measured())
        chosen = found[(found.method == method) & (found.model == (model or found.model))]
        if chosen.empty:
            raise DassError(f"The page asks for the blocks of {method} on {model or 'all models'}: there are none.")
        return chosen

    def _measured(self) -> Measured:
        """The diagnostics by the model's name."""
        runs = [run for run in self._of("diagnostics") if run.record]
        return {run.model: run.record["diagnostics"] for run in runs if run.record and "diagnostics" in run.record}

    def _of(self, experiment: str) -> list[Run]:
        if experiment not in self.runs:
            raise DassError(f"The page needs the sweep experiment={experiment} scale=small: launch it first.")
        return self.runs[experiment]


def compare(one: Any, other: Any) -> Difference:
    """The paired difference of any two cells of a model; DassError where they cannot be compared."""
    found = paired_difference(one.runs, other.runs)
    if found is None:
        raise DassError(f"The page compares {one.label} with {other.label}, which cannot be compared.")
    return found


def moved(view: View, method: str, pattern: str, other: str) -> Difference:
    """By how much a method's difference to Wanda changes from another pattern to this one.

    The errors of the two are taken as independent, though the windows are the same: the error is rather too large.
    """
    one, two = view.delta(method, pattern), view.delta(method, other)
    return Difference(one.mean - two.mean, math.hypot(one.stderr, two.stderr), min(one.freedom, two.freedom))


def draws(view: View, method: str, pattern: str, than: str = "wanda") -> list[float]:
    """The differences of mean loss to another method, one for each seed and order in which both were run."""
    others = {run.replicate: run for run in view.cell(than, pattern).runs}
    own = [run for run in view.cell(method, pattern).runs if run.replicate in others]
    return [float(np.mean(run.losses) - np.mean(others[run.replicate].losses)) for run in own]


def released(view: View, method: str, pattern: str) -> Difference:
    """The paired difference to Wanda in the order in which the model was released, whose error is that of windows."""
    found = paired_difference(
        *([run for run in view.cell(name, pattern).runs if run.order_seed is None] for name in (method, "wanda"))
    )
    if found is None:
        raise DassError(f"The page asks for {method} at {pattern} in the released order, in which it was not run.")
    return found


def gained(view: View, order: str, method: str, pattern: str, **options: Any) -> Difference:
    """What a chosen order of the neurons changes beside the mean over the random ones, see `report.orders.gain`."""
    row = find(order_frame(view.cells), pattern, method, options)
    found = None if row is None else gain(row, order)
    if found is None:
        raise DassError(f"The page asks what order={order} changes for {method} at {pattern}, which was not run.")
    return found


def varied(view: View, method: str, pattern: str, **options: Any) -> dict[str, float]:
    """The share of order, calibration and windows in the variance of a difference to Wanda, see `report.orders`."""
    frame = order_frame(view.cells)
    row, wanda = find(frame, pattern, method, options), find(frame, pattern, "wanda", {})
    found = {} if row is None or wanda is None else shares(sources(row, wanda))
    if not found:
        raise DassError(f"The page asks what the variance of {method} at {pattern} is made of, which was not run.")
    return found


def verdict(*differences: Difference) -> str:
    """Whether it holds that the first is better: of differences that agree. DassError where they do not."""
    verdicts = {VERDICTS[int(np.sign(one.mean)) if one.counts else 0] for one in differences}
    if len(verdicts) != 1:
        raise DassError(f"The records give {' and '.join(sorted(verdicts))}: give each its own verdict in the page.")
    return verdicts.pop()


def require(supported: bool, claim: str) -> str:
    """Nothing, where the records support a claim; DassError where they do not."""
    if not supported:
        raise DassError(f'The records no longer support "{claim}": change the page.')
    return ""


def bold_best(cells: list[Any], form: str = ".1f") -> list[str]:
    """Perplexities; bold are the lowest and what cannot be told apart from it, where there is more than one."""
    texts = [f"{cell.perplexity:{form}}" for cell in cells]
    return [f"**{text}**" if best else text for text, best in zip(texts, unbeaten(cells), strict=True)]


FILTERS: dict[str, Callable[..., Any]] = {
    "f": number,
    "pm": lambda difference, form="+.3f": number(difference.mean, form, difference.stderr),
    "marked": marked,
    "errors": lambda difference: abs(difference.mean) / difference.stderr,
    "correlation": correlation,
    "delta": View.delta,
    "ppl": View.ppl,
    "exp": math.exp,
    "log": math.log,
}


def render_page(template: Path, runs: list[Run], manifests: list[Manifest]) -> str:
    """The page of a template, filled from the runs of the experiments at the small scale.

    Raises:
        DassError: it asks for something that is not there, or says what the records do not support.
    """
    with told(f"page={template} cannot be looked at", "check the path", OSError):
        if not template.name.endswith(SUFFIX) or not template.is_file():
            raise DassError(f"page={template} is not a file NAME{SUFFIX}: check the path.")
    small = [manifest for manifest in manifests if manifest.name == f"{manifest.experiment}-small"]
    page = Page({str(manifest.experiment): planned_runs(manifest, runs) for manifest in small})
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    functions: list[Callable[..., Any]] = [page.view, page.minutes, page.machines, page.block_mean, page.blocks]
    functions += [compare, moved, draws, released, gained, varied, verdict, require, bold_best]
    with told(f"{template} is not a template that can be filled", "correct it", Exception):  # it holds expressions
        parsed = environment.from_string(template.read_text(encoding="utf-8"))
        text = parsed.render({function.__name__: function for function in functions})
    return NOTE.format(template.name) + text.strip("\n") + "\n"


def page_path(template: Path) -> Path:
    """Where the page of a template is written: NAME.md beside NAME.template.md."""
    return template.with_name(template.name.removesuffix(SUFFIX) + ".md")
