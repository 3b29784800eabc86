"""Runs in words, for facts and titles; nothing is read out of them again."""

from typing import Any

import pandas as pd

from report.runs import RANDOM, Run, place_of


def model_words(run: Run) -> str:
    """The model with its dtype and its place."""
    places = [f"{key}: {value}" for key, value in place_of(run.config["model"]).items()]
    details = ", ".join(part for part in (run.setting.dtype, *places) if part)
    return f"{run.model} ({details})" if details else run.model


def evaluation_words(run: Run) -> str:
    """The text and its windows, or the tasks and their items."""
    evaluation = run.config["evaluation"]
    if run.setting.evaluation == "none":
        return "none"
    if run.losses:
        return _text(evaluation, f"{len(run.losses)} windows", run.seq_len) + f", {run.tokens} tokens counted"
    if evaluation["seq_len"] is None:  # zero-shot tasks
        items = f"at most {evaluation['limit']} items" if evaluation.get("limit") else "all items"
        return f"{evaluation['name']}, {items} of each task (bos: {evaluation.get('bos')})"
    return _text(evaluation, f"{evaluation['n_windows'] or 'all'} windows", evaluation["seq_len"])


def calibration_words(run: Run) -> str:
    """The text and its sequences."""
    given = run.config["calibration"]
    return _text(given, f"{given['n_sequences'] or 'all'} sequences", given["seq_len"]) if run.calibrates else "none"


def machine_words(run: Run) -> str:
    """Where it ran; empty where it did not."""
    if run.record is None:
        return ""
    machine = run.record["machine"]
    several = f", {machine['processes']} processes" if machine.get("processes") else ""
    return f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads{several}, {machine['memory_gb']:g} GB"


def facts_of(runs: list[Run], *names: str) -> dict[str, str]:
    """The named facts of what holds for all runs of a table; and, where runs are missing, how many and why."""
    known = sorted(runs, key=lambda run: run.record is None)  # a run with a record knows more
    words = {
        "model": map(model_words, known),
        "evaluation": map(evaluation_words, known),
        "pruned": (run.setting.pruned or "none" for run in runs),
        "calibration": map(calibration_words, known),
        "seeds": [_seeds(runs)],
        "orders": [_orders(runs)],
        "machine": ["; ".join(sorted({machine_words(run) for run in runs} - {""})) or "none"],
    }
    facts = {name: next((text for text in words[name] if text != "none"), "none") for name in names}
    missing = [run for run in runs if run.why]
    reasons = "; ".join(sorted({run.why for run in missing}))
    return facts | ({"missing": f"{len(missing)} runs: {reasons}"} if missing else {})


def entries_of(runs: list[Run], name: str) -> pd.DataFrame:
    """One tidy row for each entry that the record of a run has under a name: `stages` or `metrics`."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        known = {"id": run.id, "model": model_words(run), "method": run.method, "pattern": str(run.pattern)}
        known |= {"evaluation": evaluation_words(run), "machine": machine_words(run)}
        found = run.record[name] if run.record else []
        entries = [{"stage": key, **stage} for key, stage in found.items()] if isinstance(found, dict) else found
        rows += [known | {key: value for key, value in entry.items() if key != "items"} for entry in entries]
    return pd.DataFrame(rows)


def _seeds(runs: list[Run]) -> str:
    seeds = ", ".join(map(str, sorted({run.seed for run in runs if run.calibrates}))) or "none"
    trained = ", ".join(map(str, sorted({run.training_seed for run in runs if run.training_seed is not None})))
    return f"{seeds} (of the models' training: {trained})" if trained else seeds


def _orders(runs: list[Run]) -> str:
    """Over which orders of the neurons N:M results are a mean; none where nothing is in groups."""
    found = {(run.order, run.order_seed) for run in runs if run.depends_on_order}
    drawn = sorted(seed for order, seed in found if seed is not None)
    words = sorted({order for order, _ in found if order != RANDOM}) + [f"random {seed}" for seed in drawn]
    return ", ".join(words) or "none"


def _text(text: dict[str, Any], count: str, seq_len: int | None) -> str:
    """A calibration or evaluation with all that its config says."""
    counted = ("name", "n_sequences", "n_windows", "seq_len")
    details = [
        f"{key}: {value}"
        for key, value in text.items()
        if key not in counted and value is not None and (key, value) != ("field", "text")
    ]
    return f"{text['name']}, {count} × {seq_len or 'all'} tokens ({', '.join(details)})"
