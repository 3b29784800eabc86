"""The tables: what a row of each shows. Perplexity, calibration sets, time, accuracy; and beside other numbers."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from dass.errors import DassError, told
from dass.records import paths_in
from report.grid import MISSING, Grid, grid_of, marked, number, recorded
from report.items import TOLD, pairing_of
from report.runs import Run
from report.tables import WIN, find, labels_of, paired_difference
from report.words import facts_of, machine_words, model_words

BOLD_LEGEND = (
    "apart from it (paired difference of the loss within two standard errors, or within Student's quantile of them "
    "where they come from few draws); several in bold are equals. "
)
LEGEND = (
    "± one standard error over windows; draws: of the calibration set, of the neurons' order, or of the model's "
    "training; sd: over them. Bold: the lowest perplexity of a pattern and every other that cannot be told "
    f"{BOLD_LEGEND}≈: cannot be told apart from the reference by the same rule. Δ loss: nats per token; ratio: its "
    "exponential, a ratio of geometric means where there are several draws. Targeted, all linear: share of zeros in "
    f"the targeted weights, in all linear ones. {MISSING}: not run, or does not apply."
)
SIDE_BY_SIDE_LEGEND = (
    f"Perplexity. Bold: the lowest of a pattern and every other that cannot be told {BOLD_LEGEND}{MISSING}: not run."
)
CALIBRATION_LEGEND = (
    "Perplexity: mean over the seeds, ± one standard error over windows. Δ loss: nats per token, with a standard error "
    "over windows and seeds, paired in both; ≈: within two of them, or Student's quantile where there are few seeds. "
    f"{MISSING}: not run, or not with all seeds yet."
)
TIME_LEGEND = (
    "Seconds by stage: reading the model, drawing the calibration tokens, and the walk over the blocks; peak memory of "
    "the walk: resident on the host, and allocated on the GPU where there is one. One run each, so that a few per cent "
    f"are noise. Ratio: where Wanda ran on the same machine. {MISSING}: there is no such stage, or the run is missing."
)
ACCURACY_LEGEND = (
    "Accuracy in %, 0-shot, ± one standard error over items. Δ mean: difference of the mean to Wanda's, with the "
    "standard error of the paired difference over items; ≈: within two of them, no win. Bold: the highest mean of a "
    "pattern and every other within two standard errors of it. N:M masks are those of the named orders of the neurons; "
    f"by how much other orders would change an accuracy is in no ±. {MISSING}: not run."
)
NEEDED = (
    f"the least n of each task by which {TOLD:g} points of the mean are told from zero, from sum(s^2 / min(n, N)) = "
    f"(T × {TOLD / WIN:g} point)^2 over T tasks, s^2 being the variance of the paired differences of a task's items, "
    "N its whole set, where the run has all of it; won: items that are right here and wrong with Wanda, lost: the "
    "reverse"
)
PUBLISHED_LEGEND = (
    "A published number is comparable where data, sequence length and pruned projections agree (the dense model prunes "
    f"none). {MISSING}: not run here."
)
NOISE = {"none": 0.005, "obs": 0.03}  # by update; measured between two processors: 0.11 % and, with obs, 1.6 %
NOISE_LEGEND = (
    "Noise: by so much a perplexity may differ between processors, whose sums are rounded otherwise; a repair of the "
    "weights (obs) amplifies it. More is an error."
)
DATASETS = {"wikitext2": "wikitext2-test"}  # what our evaluations are called in the publications' file
COLUMNS = ["metric", "dataset", "model", "method", "pattern", "value", "seq_len", "targets", "source"]
STAGES = ("load", "calibration", "pruning")
Changed = Callable[[dict[str, Any]], dict[str, Any]]
"""From the options of a cell to those that are others in the cell that it is compared with; none: with no cell."""


def perplexity_grid(table: pd.DataFrame, header: str = "", changed: Changed | None = None, same: str = MISSING) -> Grid:
    """One table in full: perplexity, paired difference to Wanda, ratio, sparsity.

    Args:
        header, changed: of one more column, the difference to the same method with other options.
        same: what stands there for a cell that has them already.
    """

    def counterpart(cell: Any) -> str:
        others = changed(cell.runs[0].options) if changed and cell.runs else {}
        other = find(table, str(cell.pattern), cell.method, cell.runs[0].options | others) if others else None
        if other is None or math.isnan(cell.score):
            return MISSING
        return same if other.Index == cell.Index else marked(paired_difference(cell.runs, other.runs), "+.4f")

    def row(cell: Any) -> dict[str, str]:
        draws = f" ({cell.n_draws} draws, sd {cell.spread:.2f})" if cell.n_draws > 1 else ""
        ratio = math.exp(cell.delta.mean) if cell.delta else math.nan
        return {
            "Perplexity": number(cell.perplexity, ".2f", cell.stderr) + draws,
            "Δ loss to Wanda": to_reference(cell, "+.4f"),
            **({header: counterpart(cell)} if changed else {}),
            "Ratio": "1" if cell.is_reference and cell.n_draws else number(ratio, ".3f"),
            "Targeted": number(cell.sparsity_targeted, ".1%"),
            "All linear": number(cell.sparsity_linear, ".1%"),
        }

    facts = table.facts.iloc[0]
    return grid_of(f"Perplexity of {facts['model']}, {table.dataset.iloc[0]}", table, row, facts, LEGEND, "Perplexity")


def to_reference(cell: Any, form: str) -> str:
    """The difference of a cell to the reference; of what was not run none."""
    return "reference" if cell.is_reference and not math.isnan(cell.score) else marked(cell.delta, form)


def side_by_side(cells: pd.DataFrame) -> Grid:
    """The perplexities of several tables in one, a column for each."""
    titles = list(cells.title.unique())
    both = cells.pivot(index=["pattern", "rank", "label"], columns="title", values=["perplexity", "is_best", "runs"])
    texts = both.perplexity[titles].map(lambda value: number(value, ".2f"))
    best = both.is_best[titles].eq(True).to_numpy().nonzero()
    names = pd.DataFrame({"Pattern": [str(key[0]) for key in both.index], "Method": [key[2] for key in both.index]})
    bold = frozenset((int(row), int(column) + 2) for row, column in zip(*best, strict=True))
    columns = [recorded(both.runs[title].map(lambda runs: runs if isinstance(runs, list) else [])) for title in titles]
    behind = {(row, column): runs for column, own in enumerate(columns, 2) for row, runs in enumerate(own)}
    together = [list(chain(*runs)) for runs in zip(*columns, strict=True)]
    frame = names.join(texts.reset_index(drop=True))
    return Grid("All models", frame, legend=SIDE_BY_SIDE_LEGEND, bold=bold, runs=recorded(together), cells=behind)


def calibration_grid(cells: pd.DataFrame) -> Grid:
    """All calibration sets of one model; a row for each set and method."""
    runs = list({run.id: run for group in cells.runs for run in group}.values())
    dense, pruned = cells[cells.method == "dense"], cells[cells.method != "dense"]
    rows = [
        {
            "Calibration text": cell.source,
            "Method": cell.label,
            "Sequences": str(cell.sequences),
            "Seeds": str(cell.n_draws),
            "Perplexity": number(cell.perplexity, ".2f", cell.stderr),
            "sd over seeds": number(cell.spread, ".2f"),
            "Δ loss to Wanda": to_reference(cell, "+.4f"),
        }
        for cell in pruned.itertuples()
    ]
    lengths = {run.config["calibration"]["seq_len"] or "all" for run in runs if run.calibrates}
    facts = {key: cells.facts.iloc[0][key] for key in ("model", "evaluation", "pruned")}
    facts["pattern"] = ", ".join(map(str, sorted(pruned.pattern.unique())))
    facts["sequence length"] = ", ".join(sorted(map(str, lengths)))
    facts["dense"] = number(dense.perplexity.mean(), ".2f")
    title = f"Perplexity of {facts['model']} by calibration set"
    facts |= facts_of(runs, "machine")
    return Grid(title, pd.DataFrame(rows), facts, CALIBRATION_LEGEND, runs=recorded(pruned.runs))


def time_grid(table: pd.DataFrame) -> Grid:
    """Seconds and memory."""
    references = {cell.pattern: cell for cell in table[table.is_reference].itertuples() if cell.runs}

    def row(cell: Any) -> dict[str, str]:
        stages = [run.record["stages"] for run in cell.runs if run.record]
        wanda: Any = references.get(cell.pattern)
        alike = wanda and cell.runs and machine_words(cell.runs[0]) == machine_words(wanda.runs[0])
        measured = alike and wanda.pruning_seconds > 0  # of a tiny model they round to none
        return {
            **{f"{name} [s]": number(_mean(stages, name, "seconds"), ".1f") for name in STAGES},
            "Ratio to Wanda": number(cell.pruning_seconds / wanda.pruning_seconds, ".2f") if measured else MISSING,
            "Memory [GB]": number(_mean(stages, "pruning", "peak_memory_gb"), ".2f"),
            "GPU [GB]": number(_mean(stages, "pruning", "peak_gpu_memory_gb"), ".2f"),
        }

    return grid_of(
        f"Pruning time of {table.facts.iloc[0]['model']}", table, row, _facts(table, "calibration"), TIME_LEGEND
    )


def zero_shot_grid(table: pd.DataFrame) -> Grid:
    """Accuracies, all on the same items; and how many of them a difference to Wanda needs."""
    sizes = {task: metric["n"] for runs in table.runs for run in runs for task, metric in run.accuracies.items()}

    def row(cell: Any) -> dict[str, str]:
        found, shown = [run.accuracies for run in cell.runs], {}
        for task, n in sizes.items():
            value, stderr = (100 * _mean(found, task, key) for key in ("value", "stderr"))
            shown[f"{task} (n = {n})"] = number(value, ".1f", stderr)
        return shown | {"Δ mean to Wanda": to_reference(cell, "+.1f")}

    gained = table.assign(delta=[lost and -lost for lost in table.delta])
    title = f"Zero-shot accuracy of {table.facts.iloc[0]['model']}"
    bold = f"mean (n = {sizes['mean']})" if sizes else None
    facts = _facts(table, "evaluation", "orders")
    if pairings := _pairings(table):
        facts["items needed"] = f"{', '.join(pairings)}; {NEEDED}"
    return grid_of(title, gained, row, facts, ACCURACY_LEGEND, bold)


def _pairings(table: pd.DataFrame) -> list[str]:
    """Of each cell beside its Wanda how many items of each task are needed, and how many made the difference."""
    wanda = {cell.pattern: cell.runs for cell in table[table.is_reference].itertuples()}
    found = []
    for cell in table[~table.is_reference].itertuples():
        if pairing := pairing_of(cell.runs, wanda.get(cell.pattern, [])):
            needed = "more than there are" if pairing.needed is None else pairing.needed
            found.append(f"{cell.label} {cell.pattern} {needed} ({pairing.won} won, {pairing.lost} lost)")
    return found


def read_published(folder: Path) -> pd.DataFrame:
    """The perplexities of all CSV files of `results/published`; an unknown cell is empty and left out.

    Raises:
        DassError: a file cannot be read, lacks a column, or holds a value that is no number; names it.
    """
    frames = [pd.DataFrame(columns=COLUMNS)]
    for path in paths_in(folder, ".csv"):
        with told(f"{path} is not a table of published numbers", "correct it", Exception):  # whatever pandas raises
            rows = pd.read_csv(path, dtype=str)
            if missing := [column for column in COLUMNS if column not in rows]:
                raise DassError(f"{path} has no column {missing[0]}: the columns are {', '.join(COLUMNS)}.")
            if not isinstance(rows.index, pd.RangeIndex):
                raise ValueError("its rows have more cells than columns")
            rows = rows[COLUMNS].assign(value=pd.to_numeric(rows["value"]), seq_len=pd.to_numeric(rows["seq_len"]))
            rows = rows[(rows["metric"] == "perplexity") & rows["value"].notna()]
            is_sound = rows["value"].between(1, 1e300) & rows["seq_len"].between(1, 1e9) & rows.notna().all(axis=1)
            if not is_sound.all():
                raise ValueError(f"row {rows.index[~is_sound][0] + 1} lacks a cell, or a number that is possible")
        frames.append(rows.astype({"seq_len": int}))
    return pd.concat([frame for frame in frames if len(frame)] or frames, ignore_index=True)


def beside_published(cells: pd.DataFrame, published: pd.DataFrame) -> list[Grid]:
    """Our perplexity, found or missing, beside each published one of the same cell; no grid where there is none."""
    rows, behind = [], []
    for _, table in cells.groupby("table", sort=False):
        for theirs in published[published["model"] == table.model.iloc[0]].itertuples():
            cell = find(table, theirs.pattern, theirs.method, {})  # of several variants of it, the one as published
            if cell is not None:
                run = cell.runs[0]
                row = {"Model": theirs.model, "Method": cell.label, "Pattern": theirs.pattern}
                row["Our perplexity"] = number(cell.perplexity, ".2f")
                row["Published perplexity"] = f"{theirs.value:g}"
                row["Ours: data, length, targets"] = f"{run.dataset}, {run.seq_len}, {run.setting.pruned or 'none'}"
                row["Published: data, length, targets"] = f"{theirs.dataset}, {theirs.seq_len}, {theirs.targets}"
                others = differing(theirs, run)
                row["Comparable"] = f"no: {', '.join(others)}" if others else "yes"
                if (row := row | {"Source": theirs.source}) not in rows:
                    rows.append(row)
                    behind.append(cell.runs)
    title, frame = "Beside published numbers", pd.DataFrame(rows)
    return [Grid(title, frame, legend=PUBLISHED_LEGEND, words=3, runs=recorded(behind))] if rows else []


def comparison(runs: list[Run], committed: list[Run]) -> Grid:
    """Each run with a perplexity beside the committed one of the same identity."""
    before = {run.id: run.perplexity for run in committed}
    labels = labels_of(runs)
    rows = []
    for run in sorted(runs, key=lambda run: (run.model, run.pattern, labels[run.id])):
        if run.perplexity is not None:
            value = before.get(run.id)
            row = {"Run": run.id, "Model": model_words(run), "Method": labels[run.id], "Pattern": str(run.pattern)}
            row |= {"Perplexity here": f"{run.perplexity:.4f}", "Committed": number(value, ".4f")}
            change = "no committed record" if value is None else f"{100 * (run.perplexity / value - 1):+.3f} %"
            rows.append(row | {"Difference": change, "Noise": f"{noise_of(run):.1%}"})
    return Grid("Compared with the committed records", pd.DataFrame(rows), legend=NOISE_LEGEND, words=4)


def noise_of(run: Run) -> float:
    """By how much its perplexity may differ, as a share, on another processor."""
    return NOISE.get(run.update or "none", NOISE["obs"])


def beyond_noise(runs: list[Run], committed: list[Run]) -> list[str]:
    """The runs whose perplexity differs from the committed one of the same identity by more than the noise."""
    before = {run.id: run.perplexity for run in committed}
    pairs = [(run, before.get(run.id)) for run in runs if run.perplexity is not None]
    return [run.id for run, value in pairs if value and abs(run.perplexity / value - 1) > noise_of(run)]  # type: ignore[operator]


def _mean(found: list[dict[str, Any]], name: str, key: str) -> float:
    """The mean over several runs of what each has under a name, where it has it; else NaN."""
    values = [entries[name].get(key) for entries in found if name in entries]
    return float(pd.Series(values, dtype=float).mean())


def _facts(table: pd.DataFrame, *names: str) -> dict[str, str]:
    """Some facts, the machine, and what is missing."""
    facts = table.facts.iloc[0]
    return {key: facts[key] for key in (*names, "machine", "missing") if key in facts}


def differing(theirs: Any, run: Run) -> list[str]:
    """What forbids to compare a published number (a row of `read_published`) with ours; nothing: they are alike."""
    found = {
        "data": DATASETS.get(run.dataset) != theirs.dataset,
        "sequence length": run.seq_len != theirs.seq_len,
        "targets": theirs.method != "dense" and run.setting.pruned != theirs.targets,
        "a part of the text": run.config["evaluation"].get("n_windows") is not None,
    }
    return [name for name, differs in found.items() if differs]
