"""Cells: runs that differ in nothing but the seed; all of them in one tidy frame, table by table.

Only runs of the same model contents on the same windows stand in one table. Methods are compared window by window (or
item by item): the standard error of a paired difference is far smaller than that of either perplexity.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from report.runs import DENSE, Run, Setting
from report.words import facts_of

METHOD_ORDER = ("dense", "magnitude", "wanda", "sparsegpt", "dass")  # the others follow by name
WIN = 2.0  # a difference counts beyond this many standard errors of it, or more where there are few seeds
CONFIDENCE = 0.975  # of the quantile that takes the place of 2 where there are few
TABLE = ["table", "facts", "title", "model", "dataset", "source", "sequences"]
NAMED = ("model", "evaluation", "calibration", "pruned")  # the facts that tell settings apart
CELL = ["pattern", "rank", "label", "method", "runs"]
MEASURES = ("perplexity", "stderr", "accuracy", "pruning_seconds", "sparsity_targeted", "sparsity_linear")


@dataclass(frozen=True)
class Difference:
    """Mean loss of one cell minus that of another over the same windows [nats per token]; or accuracy lost [points]."""

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

    def __neg__(self) -> "Difference":
        """The other minus the one."""
        return Difference(-self.mean, self.stderr, self.freedom)


def cells_of(runs: list[Run]) -> pd.DataFrame:
    """A row for each cell: table by table, pattern by pattern, method by method.

    There is a table for each setting; a run that does not depend on a part of the setting stands in every table it
    fits. A method that was not run under a pattern has a row without runs there.

    Returns:
        The columns `TABLE` (facts: what holds for all its cells, in words; title: what tells it from the others; source
        and sequences: of its calibration, 0 where all of a file are used), `CELL` (runs: those with a result first),
        the means of `MEASURES` over the seeds, n_draws, spread (standard deviation of the perplexity), score (less is
        better), is_reference, delta (a `Difference` to the reference, or None) and is_best. A missing number is NaN.
    """
    labels = labels_of(runs)  # of all tables together, so that a row has the same name in each
    tables = settings_of(runs)
    facts = facts_apart(tables)
    differing = [name for name in NAMED if len({one[name] for one in facts}) > 1]
    if len({one["model"] for one in facts}) == len(facts):
        differing = ["model"]  # tells enough
    rows = []
    for number, index in enumerate(sorted(range(len(tables)), key=lambda index: list(facts[index].values()))):
        own, first = tables[index][1], tables[index][1][0]
        calibration: dict = next((run.config["calibration"] for run in own if run.calibrates), {})
        source, sequences = calibration.get("name"), calibration.get("n_sequences") or 0
        title = ", ".join(facts[index][name] for name in differing)
        table = (number, facts[index], title, first.model, first.dataset, source, sequences)
        rows += [(*table, *key, group) for key, group in _grouped(own, labels)]
    return _measured(pd.DataFrame(rows, columns=TABLE + CELL))


def settings_of(runs: list[Run]) -> list[tuple[Setting, list[Run]]]:
    """Each setting with its runs; one that does not depend on a part of a setting is of every setting that it fits."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    whole = [one for one in settings if not any(one != other and one.agrees(other) for other in settings)]
    return [(one, [run for run in runs if run.setting.agrees(one)]) for one in whole]


def facts_apart(tables: list[tuple[Setting, list[Run]]]) -> list[dict[str, str]]:
    """The facts of each setting's runs; those that are alike in words are told apart by their identities."""
    facts = [
        facts_of(own, "model", "evaluation", "pruned", "calibration", "seeds", "orders", "machine") for _, own in tables
    ]
    words = [[one[name] for name in NAMED] for one in facts]
    for (setting, _), one, said in zip(tables, facts, words, strict=True):
        twins = [other for (other, _), theirs in zip(tables, words, strict=True) if theirs == said]
        for name in NAMED[:3]:
            if len({getattr(twin, name) for twin in twins}) > 1:
                one[name] += f", identity {getattr(setting, name)}"
    return facts


def labels_of(runs: list[Run]) -> dict[str, str]:
    """The name of each run's row, by its id: the method, and each option in which the runs of that method differ.

    Runs whose method has the same name and options but other code get its identity. Those that would then share row,
    pattern and seeds differ in something unknown here: they get their ids, and no mean.
    """
    names = ["setting", "pattern", "replicate", "method_identity", "id"]
    values = []
    for run in runs:
        same = [other.options for other in runs if other.method == run.method]
        differing = [
            f"{key}={value}"
            for key, value in sorted(run.options.items())
            if any(key not in options or options[key] != value for options in same)
        ]
        label = f"{run.method} ({', '.join(differing)})" if differing else run.method
        values.append([*(getattr(run, name) for name in names), label])
    rows = pd.DataFrame(values, columns=[*names, "label"], dtype=object)
    for suffix, place in (("method_identity", names[:2]), ("id", names[:3])):
        are_several = rows.groupby([*place, "label"])[suffix].transform("nunique") > 1
        rows["label"] = rows.label.where(~are_several, rows.label + " [" + rows[suffix].map(str) + "]")
    return dict(zip(rows.id, rows.label, strict=True))


def find(cells: pd.DataFrame, pattern: str, method: str, options: dict[str, Any]) -> Any:
    """The cell of a table with this method and all of these options, as a named tuple.

    Of several that of the published variant; in a chosen order of the neurons only where `options` name it. None if
    there is not one.
    """
    own = [cell for cell in cells.itertuples() if (str(cell.pattern), cell.method) == (pattern, method) and cell.runs]
    wanted = {"order": None} | options
    own = [cell for cell in own if all(cell.runs[0].options.get(key) == value for key, value in wanted.items())]
    own = [cell for cell in own if len(own) == 1 or cell.runs[0].as_published]
    return own[0] if len(own) == 1 else None


def unbeaten(cells: list[Any]) -> list[bool]:
    """Of cells with a result which are the best, or cannot be told apart from it; none where none can be compared."""
    best = min(cells, key=lambda cell: cell.score)
    differences = [paired_difference(cell.runs, best.runs) for cell in cells]
    is_compared = sum(found is not None for found in differences) > 1  # with another than itself
    return [is_compared and found is not None and not found.counts for found in differences]


def paired_difference(ours: list[Run], theirs: list[Run]) -> Difference | None:
    """Mean loss of one cell's runs minus that of another's; None for a single window, which has no error.

    Only runs of the same model contents are paired. The variance is that of the windows' differences and, where a
    method ran with several draws (of seeds or of neuron orders), that between them: of the differences where both ran
    with the same ones, else of each method. Draws of one trained model, or else of one neuron order, are no independent
    ones: their mean is one. None, too, where one of them still lacks the other's draws, which would pass for one
    without noise.
    """
    both = [[run for run in runs if run.samples] for runs in (ours, theirs)]
    shared = set.intersection(*({run.model_identity for run in runs} for runs in both))
    pair = [[run for run in runs if run.model_identity in shared] for runs in both]
    if not shared or min(map(len, pair[0][0].samples)) < 2:
        return None
    fewer = len(shared) == 1 and max(map(len, both)) > max(map(len, pair))
    replicates = [[run.replicate for run in runs] for runs in pair]
    drawn = [len(set(part)) > 1 for part in zip(*(run.replicate for runs in both for run in runs), strict=True)]
    samples = [
        [_of_units(np.array(part), own, by_training=drawn[0] or drawn[3], by_order=drawn[2]) for part in parts]
        for own, parts in zip(
            replicates, (zip(*(run.samples for run in runs), strict=True) for runs in pair), strict=True
        )
    ]
    a, b = samples  # of the text, or of each task: (n_draws, n_windows or n_items)
    of_draws = [np.mean([part.mean(axis=1) for part in parts], axis=0) for parts in samples]  # (n_draws,)
    if replicates[0] == replicates[1] and not fewer:
        of_draws = [of_draws[0] - of_draws[1]]
    elif any(len(runs) == 1 and any(itertools.compress(drawn, runs[0].depends_on)) for runs in pair):
        return None
    of_windows = [x.mean(axis=0) - y.mean(axis=0) for x, y in zip(a, b, strict=True)]
    mean = float(np.mean([d.mean() for d in of_windows]))
    variance = sum(d.var(ddof=1) / len(d) for d in of_windows) / len(of_windows) ** 2
    draws = [(values.var(ddof=1) / len(values), len(values) - 1) for values in of_draws if len(values) > 1]
    variance += sum(v for v, _ in draws)
    uncertain = sum(v**2 / freedom for v, freedom in draws)
    return Difference(mean, math.sqrt(variance), float(variance**2 / uncertain) if uncertain else math.inf)


def _of_units(
    values: np.ndarray, replicates: list[tuple[int, int, int, str]], by_training: bool, by_order: bool
) -> np.ndarray:
    """Means over the draws that are no independent ones, (n_units, n); from (n_draws, n)."""
    if not (by_training or by_order):
        return values
    units: dict[Any, list[int]] = defaultdict(list)
    for index, (training, _, order, machine) in enumerate(replicates):
        units[(training, machine) if by_training else order].append(index)
    return np.array([values[own].mean(axis=0) for own in units.values()])


def _grouped(runs: list[Run], labels: dict[str, str]) -> list[tuple[tuple, list[Run]]]:
    """The runs of each cell of a table, by pattern, rank, label and method; none where a pattern lacks a method."""
    ranks = {name: rank for rank, name in enumerate(METHOD_ORDER)}
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (bool(run.why), run.replicate)):
        groups[run.pattern, ranks.get(run.method, len(ranks)), labels[run.id], run.method].append(run)
    patterns = {run.pattern for run in runs} - {DENSE}
    tried = {(run.pattern, run.method) for run in runs}
    for pattern, (_, *row) in itertools.product(patterns, list(groups)):
        if row[-1] != "dense" and (pattern, row[-1]) not in tried:
            groups[pattern, *row] = []
    return sorted(groups.items())


def _measured(cells: pd.DataFrame) -> pd.DataFrame:
    """Add what the runs of each cell measured and how it compares with the others of its table and pattern."""
    runs = cells.runs.explode()  # a row for each
    measured = {name: [getattr(run, name, None) for run in runs] for name in MEASURES}
    by_cell = pd.DataFrame(measured, index=runs.index, dtype=float).groupby(level=0)
    cells = cells.join(by_cell.mean())
    cells["spread"], cells["n_draws"] = by_cell.perplexity.std(), by_cell.perplexity.count()
    cells["score"] = cells.perplexity.fillna(-cells.accuracy)
    cells["is_reference"], cells["delta"], cells["is_best"] = False, None, False
    for _, table in cells.groupby("table"):
        wanda = table[(table.method == "wanda") & table.runs.astype(bool)]
        drawn = [row for row in wanda.itertuples() if "order" not in row.runs[0].options]  # in no chosen order
        published = {row.label: row.runs[0].as_published for row in drawn}
        candidates = [label for label, one in published.items() if one or len(published) == 1]
        for pattern, own in table.groupby("pattern"):
            is_reference = own.label.isin(candidates) & (len(candidates) == 1)
            reference: list[Run] = next(iter(own.runs[is_reference]), [])
            differences = [paired_difference(group, reference) for group in own.runs]
            cells.loc[own.index, "is_reference"] = is_reference
            cells.loc[own.index, "delta"] = pd.Series(differences, own.index, dtype=object)
            scored = own[own.score.notna()]
            if pattern != DENSE and len(scored):
                cells.loc[scored.index, "is_best"] = unbeaten(list(scored.itertuples()))
    return cells
