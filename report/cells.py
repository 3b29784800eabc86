"""What the report compares.

Runs that differ in nothing but the seed are averaged in a `Cell`; cells that may be compared (same model, evaluation,
targets, calibration) stand in one `Table`. Methods are compared on the same windows of text: the standard error of a
paired difference is far smaller than that of either perplexity.
"""

import functools
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import stats

from report.runs import Run, missing_text

METHOD_ORDER = ("dense", "magnitude", "wanda", "sparsegpt", "dass")  # the others follow by name
WIN = 2.0  # a difference counts beyond this many standard errors of it, or more where there are few seeds
CONFIDENCE = 0.975  # of the quantile that takes the place of 2 where there are few


@dataclass(frozen=True)
class Cell:
    """One method under one pattern: its runs, which differ in the seeds alone; those with a result, if any has one."""

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """Name of the method, without the options that the label may carry."""
        return self.runs[0].method

    @property
    def pattern(self) -> str:
        """Label of the pattern."""
        return self.runs[0].pattern

    @property
    def found(self) -> bool:
        """Whether there is any result."""
        return self.runs[0].perplexity is not None

    @property
    def perplexity(self) -> float:
        """Mean perplexity over the seeds; NaN without a result."""
        return float(np.mean([run.perplexity for run in self.runs])) if self.found else math.nan

    @property
    def replicates(self) -> tuple[tuple[int, int], ...]:
        """The seeds of the runs."""
        return tuple(run.replicate for run in self.runs)

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """(n_seeds, n_windows) mean token loss of each window, nats."""
        return np.array([run.losses for run in self.runs])

    def mean(self, name: str) -> float | None:
        """Mean over the seeds of a field of `Run`; None if a run lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else float(np.mean(values))

    def spread(self) -> float | None:
        """Standard deviation of the perplexity over the seeds; None with fewer than two results."""
        values = [run.perplexity for run in self.runs if run.perplexity is not None]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean loss of one cell minus that of another over the same windows, nats per token."""

    mean: float
    stderr: float
    freedom: float
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

    facts: dict[str, str]  # what holds for all cells: model, evaluation, pruned, calibration, seeds, machine
    dataset: str
    cells: tuple[Cell, ...]

    @property
    def patterns(self) -> list[str]:
        """The patterns, dense first, then from the freest to the strictest."""
        return list(dict.fromkeys(cell.pattern for cell in self.cells))

    @property
    def reference(self) -> str:
        """The label that stands for Wanda: of several variants the published one (within output rows, no update)."""
        variants = {cell.label: " ".join(cell.runs[0].options) for cell in self.cells if cell.method == "wanda"}
        changes = ("=out", "=layer", "update=obs")
        published = [label for label, text in variants.items() if not any(change in text for change in changes)]
        candidates = published if len(variants) > 1 else list(variants)
        return candidates[0] if len(candidates) == 1 else "wanda"

    def rows(self) -> list[tuple[str, str]]:
        """Pattern and label of every row: what was run, and each method of which nothing was run under a pattern."""
        methods = {cell.label: cell.method for cell in self.cells}
        run = {(cell.pattern, cell.label) for cell in self.cells}
        tried = {(cell.pattern, cell.method) for cell in self.cells} | {("dense", name) for name in methods.values()}
        return [
            (pattern, label)
            for pattern in self.patterns
            for label in sorted(methods, key=rank)
            if (pattern, label) in run or ((pattern, methods[label]) not in tried and methods[label] != "dense")
        ]

    def cell(self, pattern: str, label: str) -> Cell | None:
        """One method under one pattern; None if it was not run."""
        return next((cell for cell in self.cells if (cell.pattern, cell.label) == (pattern, label)), None)

    def best(self, pattern: str) -> set[str]:
        """The lowest perplexity of a pattern and all that cannot be told apart from it; none where none was beaten."""
        cells = [cell for cell in self.cells if cell.pattern == pattern != "dense" and cell.found]
        if len(cells) < 2:
            return set()
        lowest = min(cells, key=lambda cell: cell.perplexity)
        differences = {cell.label: paired_difference(cell, lowest) for cell in cells}
        return {label for label, difference in differences.items() if not (difference and difference.counts)}


def build_tables(runs: list[Run]) -> list[Table]:
    """One table for each setting; a run that does not depend on a part of the setting stands in every table it fits."""

    def agree(setting: tuple, other: tuple) -> bool:
        return all(part is None or part == other[i] for i, part in enumerate(setting))

    runs = [run for run in runs if run.evaluation]
    labels = method_labels(runs)  # of all tables together, so that a row has the same name in each
    settings = {run.setting for run in runs}
    whole = [one for one in settings if not any(one != other and agree(one, other) for other in settings)]
    return [_table([run for run in runs if agree(run.setting, one)], one, labels) for one in sorted(whole, key=str)]


def method_labels(runs: list[Run]) -> dict[str, str]:
    """Label of each run by its id: the method, and each option in which the runs of that method differ.

    Runs that would share label, pattern and seed differ in something unknown here: they get their ids, and no mean.
    """
    labels = {}
    for run in runs:
        same = [other.options for other in runs if other.method == run.method]
        deviations = [option for option in run.options if any(option not in options for options in same)]
        labels[run.id] = f"{run.method} ({', '.join(deviations)})" if deviations else run.method
    places = {run.id: (run.setting, labels[run.id], run.pattern, run.replicate) for run in runs}
    taken = Counter(places.values())
    return {
        run_id: f"{labels[run_id]} [{run_id}]" if taken[place] > 1 else labels[run_id]
        for run_id, place in places.items()
    }


def paired_difference(cell: Cell, other: Cell) -> Difference | None:
    """Mean loss of `cell` minus that of `other`, nats per token; None for a single window, which has no error.

    The variance is that of the windows' differences and, where a method ran with several seeds, that between seeds:
    of the differences where both ran with the same ones, else of each method. None, too, where one of them still lacks
    the other's seeds, which would pass for a method without noise.
    """
    if not (cell.found and other.found):
        return None
    d = cell.losses.mean(axis=0) - other.losses.mean(axis=0)
    if len(d) < 2:
        return None
    samples = []
    if cell.replicates == other.replicates:
        samples.append((cell.losses - other.losses).mean(axis=1))
    elif any(len(one.runs) == 1 and one.runs[0].depends_on_seeds for one in (cell, other)):
        return None
    else:
        samples += [one.losses.mean(axis=1) for one in (cell, other)]
    of_seeds = [(sample.var(ddof=1) / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    variance = d.var(ddof=1) / len(d) + sum(v for v, _ in of_seeds)
    uncertain = sum(v**2 / freedom for v, freedom in of_seeds)
    return Difference(float(d.mean()), math.sqrt(variance), float(variance**2 / uncertain) if uncertain else math.inf)


def _table(runs: list[Run], setting: tuple[str | None, ...], labels: dict[str, str]) -> Table:
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[strictness(run.pattern), rank(labels[run.id])].append(run)
    model, evaluation, pruned, calibration = (part or "none" for part in setting)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs if run.calibration}))
    trained = ", ".join(
        str(seed) for seed in sorted({run.training_seed for run in runs if run.training_seed is not None})
    )
    facts = {"model": model, "evaluation": evaluation, "pruned": pruned, "calibration": calibration}
    facts |= {"seeds": (seeds or "none") + (f" (of the models' training: {trained})" if trained else "")}
    facts |= {"machine": "; ".join(sorted({run.machine for run in runs if run.machine})) or "none"}
    if missing := [run for run in runs if run.perplexity is None]:
        facts |= {"missing": missing_text(missing)}
    cells = []
    for _, group in sorted(groups.items()):
        group.sort(key=lambda run: run.replicate)
        finished = [run for run in group if run.perplexity is not None]
        cells.append(Cell(labels[group[0].id], tuple(finished or group)))
    return Table(facts, runs[0].dataset, tuple(cells))


def rank(label: str) -> tuple[int, str]:
    """Sort key of a row label: the fixed order of the methods, then the name."""
    name = label.split(" ")[0]
    return METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER), label


def strictness(pattern: str) -> tuple[float, int]:
    """Sort key of a pattern: its sparsity, then how small its groups are (50%, 4:8, 2:4); dense first."""
    if pattern == "dense":
        return -1.0, 0
    if pattern.endswith("%"):
        return float(pattern[:-1]) / 100, -sys.maxsize
    n, m = map(int, pattern.split(":"))
    return 1 - n / m, -m
