"""What is compared: runs that differ in nothing but the seed are a `Cell`; cells that may be compared, a `Table`.

Only runs of the same model contents on the same windows stand side by side. Methods are compared window by window: the
standard error of a paired difference is far smaller than that of either perplexity.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from report.runs import DENSE, Pattern, Run
from report.words import facts_of

METHOD_ORDER = ("dense", "magnitude", "wanda", "sparsegpt", "dass")  # the others follow by name
WIN = 2.0  # a difference counts beyond this many standard errors of it, or more where there are few seeds
CONFIDENCE = 0.975  # of the quantile that takes the place of 2 where there are few


class Variant(NamedTuple):
    """A row of a table, in reading order: a method, and in its label what tells it from the others of that method."""

    rank: int
    label: str
    method: str


@dataclass(frozen=True)
class Cell:
    """One method under one pattern: its runs, which differ in the seeds alone; those with a result, if any has one."""

    pattern: Pattern
    variant: Variant
    runs: tuple[Run, ...]

    @property
    def found(self) -> bool:
        """Whether there is any result."""
        return self.runs[0].perplexity is not None

    @property
    def perplexity(self) -> float:
        """Mean perplexity over the seeds; NaN without a result."""
        return self.mean("perplexity") or math.nan

    def mean(self, name: str) -> float | None:
        """Mean over the seeds of a field of `Run`; None if a run lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else float(np.mean(values))

    @functools.cached_property
    def spread(self) -> float | None:
        """Standard deviation of the perplexity over the seeds; None with fewer than two results."""
        values = [run.perplexity for run in self.runs if run.perplexity is not None]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean loss of one cell minus that of another over the same windows, nats per token."""

    mean: float
    stderr: float
    freedom: float = math.inf
    """Degrees of freedom of the standard error (Welch and Satterthwaite): few where it comes from few seeds.

    Infinite without seeds: windows are many.
    """

    @property
    def counts(self) -> bool:
        """Whether the two can be told apart."""
        return abs(self.mean) > max(WIN, stats.t.ppf(CONFIDENCE, self.freedom)) * self.stderr


@dataclass(frozen=True)
class Table:
    """Cells that may be compared, in reading order: dense, then pattern by pattern, method by method."""

    facts: dict[str, str]
    """What holds for all cells, in words: model, evaluation, pruned, calibration, seeds, machine."""
    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]

    @property
    def dataset(self) -> str:
        """The name of the evaluation."""
        return self.runs[0].dataset

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns, dense left out, from the freest to the strictest."""
        return sorted({cell.pattern for cell in self.cells} - {DENSE})

    @functools.cached_property
    def variants(self) -> list[Variant]:
        """The methods and their variants in reading order."""
        return sorted({cell.variant for cell in self.cells})

    def reference(self, pattern: Pattern) -> Cell | None:
        """Wanda under a pattern; of several variants in the table the published one."""
        wanda = {cell.variant: cell.runs[0].as_published for cell in self.cells if cell.variant.method == "wanda"}
        candidates = [variant for variant, published in wanda.items() if published or len(wanda) == 1]
        return self.cell(pattern, candidates[0]) if len(candidates) == 1 else None

    def rows(self) -> list[tuple[Pattern, Variant]]:
        """Pattern and variant of every row: what was run, and each method of which a pattern has nothing."""
        run = {(cell.pattern, cell.variant) for cell in self.cells}
        tried = {(cell.pattern, cell.variant.method) for cell in self.cells}
        lacking = {(p, v) for p in self.patterns for v in self.variants if (p, v.method) not in tried}
        return sorted(run | {(pattern, variant) for pattern, variant in lacking if variant.method != "dense"})

    def cell(self, pattern: Pattern, variant: Variant) -> Cell | None:
        """One method under one pattern; None if it was not run."""
        return next((cell for cell in self.cells if (cell.pattern, cell.variant) == (pattern, variant)), None)

    def find(self, pattern: str, method: str, options: dict[str, Any]) -> Cell | None:
        """The cell of a method with all of these options; of several the published variant. None if it is not one."""
        cells = [cell for cell in self.cells if (str(cell.pattern), cell.variant.method) == (pattern, method)]
        cells = [cell for cell in cells if options.items() <= cell.runs[0].options.items()]
        cells = [cell for cell in cells if len(cells) == 1 or cell.runs[0].as_published]
        return cells[0] if len(cells) == 1 else None

    def best(self, pattern: Pattern) -> set[Variant]:
        """The lowest perplexity of a pattern and all that cannot be told apart from it; none where none was beaten."""
        cells = [cell for cell in self.cells if cell.pattern == pattern != DENSE and cell.found]
        return {cell.variant for cell in unbeaten(cells)}


def unbeaten(cells: list[Cell]) -> list[Cell]:
    """Of cells with a result the lowest and all that cannot be told apart from it; none of a single one."""
    lowest = min(cells, key=lambda cell: cell.perplexity, default=None)
    if lowest is None or len(cells) < 2:
        return []
    differences = [paired_difference(cell, lowest) for cell in cells]
    return [cell for cell, found in zip(cells, differences, strict=True) if not (found and found.counts)]


def build_tables(runs: list[Run]) -> list[Table]:
    """One table for each setting; a run that does not depend on a part of the setting stands in every table it fits."""
    runs = [run for run in runs if run.setting.evaluation]
    rows = variants(runs)  # of all tables together, so that a row has the same name in each
    settings = {run.setting for run in runs}
    whole = [one for one in settings if not any(one != other and one.agrees(other) for other in settings)]
    tables = [_table([run for run in runs if run.setting.agrees(one)], rows) for one in whole]
    named = ("model", "evaluation", "calibration")
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)  # in words: their identities tell them apart
    for index, table in enumerate(tables):
        alike[tuple(table.facts[name] for name in (*named, "pruned"))].append(index)
    for indices in alike.values():
        for name in named:
            if len({getattr(whole[index], name) for index in indices}) > 1:
                for index in indices:
                    tables[index].facts[name] += f", identity {getattr(whole[index], name)}"
    return sorted(tables, key=lambda table: list(table.facts.values()))


def titles(tables: list[Table]) -> list[str]:
    """What tells each table from the others: its model, or all the facts in which they differ."""
    alike = len({table.facts["model"] for table in tables}) == len(tables)
    names = ["model"] if alike else ["model", "evaluation", "pruned", "calibration"]
    differing = [name for name in names if len({table.facts[name] for table in tables}) > 1]
    return [", ".join(table.facts[name] for name in differing or ["model"]) for table in tables]


def variants(runs: list[Run]) -> dict[str, Variant]:
    """The row of each run by its id: the method, and each option in which the runs of that method differ.

    Runs whose method has the same name and options but other code get its identity. Those that would then share row,
    pattern and seeds differ in something unknown here: they get their ids, and no mean.
    """
    labels = {}
    for run in runs:
        same = [other.options for other in runs if other.method == run.method]
        differing = [
            f"{key}={value}"
            for key, value in sorted(run.options.items())
            if any(key not in options or options[key] != value for options in same)
        ]
        labels[run.id] = f"{run.method} ({', '.join(differing)})" if differing else run.method
    for suffix in ("method_identity", "id"):
        places: dict[tuple, set[str | None]] = defaultdict(set)
        keys = {}
        for run in runs:
            keys[run.id] = (run.setting, labels[run.id], run.pattern, *([run.replicate] if suffix == "id" else []))
            if (identity := getattr(run, suffix)) is not None:
                places[keys[run.id]].add(identity)
        for run in runs:
            if len(places[keys[run.id]]) > 1:
                labels[run.id] += f" [{getattr(run, suffix)}]"
    ranks = {name: rank for rank, name in enumerate(METHOD_ORDER)}
    return {run.id: Variant(ranks.get(run.method, len(ranks)), labels[run.id], run.method) for run in runs}


def paired_difference(cell: Cell, other: Cell) -> Difference | None:
    """Mean loss of `cell` minus that of `other`, nats per token; None for a single window, which has no error.

    Only runs of the same model contents are paired. The variance is that of the windows' differences and, where a
    method ran with several seeds, that between seeds: of the differences where both ran with the same ones, else of
    each method. None, too, where one of them still lacks the other's seeds, which would pass for one without noise.
    """
    if not (cell.found and other.found):
        return None
    shared = {run.model_identity for run in cell.runs} & {run.model_identity for run in other.runs}
    ours, theirs = ([run for run in one.runs if run.model_identity in shared] for one in (cell, other))
    if not shared or len(ours[0].losses) < 2:
        return None
    a, b = (np.array([run.losses for run in runs]) for runs in (ours, theirs))  # (n_seeds, n_windows)
    fewer = len(shared) == 1 and max(len(cell.runs), len(other.runs)) > max(len(ours), len(theirs))
    if [run.replicate for run in ours] == [run.replicate for run in theirs] and not fewer:
        samples = [(a - b).mean(axis=1)]
    elif any(len(runs) == 1 and runs[0].depends_on_seeds for runs in (ours, theirs)):
        return None
    else:
        samples = [a.mean(axis=1), b.mean(axis=1)]
    d = a.mean(axis=0) - b.mean(axis=0)
    of_seeds = [(sample.var(ddof=1) / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    variance = d.var(ddof=1) / len(d) + sum(v for v, _ in of_seeds)
    uncertain = sum(v**2 / freedom for v, freedom in of_seeds)
    return Difference(float(d.mean()), math.sqrt(variance), float(variance**2 / uncertain) if uncertain else math.inf)


def _table(runs: list[Run], rows: dict[str, Variant]) -> Table:
    groups: dict[tuple[Pattern, Variant], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.replicate):
        groups[run.pattern, rows[run.id]].append(run)
    cells = []
    for (pattern, variant), group in sorted(groups.items()):
        finished = [run for run in group if run.perplexity is not None]
        cells.append(Cell(pattern, variant, tuple(finished or group)))
    facts = facts_of(runs, "model", "evaluation", "pruned", "calibration", "seeds", "machine")
    return Table(facts, tuple(runs), tuple(cells))
