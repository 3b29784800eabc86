"""What was run: one `Run` for each record, and for each run that an experiment names but that has no record."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Run:
    """What was run, and its perplexity; what the run did not use (a dense run: any calibration) is None."""

    id: str
    model: str  # with its dtype
    evaluation: str | None  # in words: dataset, windows, sequence length, tokens counted
    pruned: str | None  # the targets
    calibration: str | None  # in words: text, sequences, sequence length
    dataset: str
    seq_len: int | None
    tokens: int | None
    whole_text: bool  # all windows of the text are evaluated
    method: str
    options: tuple[str, ...]  # ("alpha=0.5", "axis.gate=out"): what the method's config says beyond its name
    pattern: str  # "dense", "50%", "2:4"
    seed: int
    training_seed: int | None  # of a model that this repository trained
    perplexity: float | None  # None without a record, or without a perplexity in it
    stderr: float | None
    sparsity_targeted: float | None
    sparsity_linear: float | None
    pruning_seconds: float | None
    machine: str | None  # None: not run
    losses: tuple[float, ...]  # mean token loss of each window, nats
    why: str = ""  # it was not run

    @property
    def setting(self) -> tuple[str | None, ...]:
        """What comparable runs have in common; a None agrees with everything."""
        return self.model, self.evaluation, self.pruned, self.calibration

    @property
    def calibration_source(self) -> str:
        """The calibration text; empty where the run read none."""
        return (self.calibration or "").split(",")[0]

    @property
    def calibration_size(self) -> int:
        """The number of calibration sequences; 0 where the run read none, or all of a file."""
        words = (self.calibration or "").split(", ")
        return int(words[1].split(" ")[0]) if len(words) > 1 and words[1].split(" ")[0].isdigit() else 0

    @property
    def depends_on_seeds(self) -> bool:
        """Whether another draw of the calibration set, or another training, would give another result."""
        return self.calibration is not None or self.training_seed is not None

    @property
    def replicate(self) -> tuple[int, int]:
        """Which of several like runs this is."""
        return self.training_seed or 0, self.seed


def runs_of(records: list[dict[str, Any]]) -> list[Run]:
    """One run per record, whatever it measured; a record with unusable contents is named on stderr and left out."""
    runs = []
    for record in records:
        try:
            runs.append(_run(record))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            print(f"left out: the record {record['id']} is malformed ({error!r}): run it again.", file=sys.stderr)
    return runs


def missing_run(design: str, config: dict[str, Any], calibrates: bool, why: str, found: list[Run]) -> Run:
    """A run that an experiment names and that has no record.

    Args:
        design: its identity as far as the config alone tells it.
        config: the composed config.
        calibrates: whether its method reads calibration tokens.
        why: the reason, in a sentence.
        found: the experiment's runs with a record, which tell what the config does not (a dtype, a number of tokens).
    """
    run = _described(design, config, calibrates, "")
    alike = next((other for other in found if _name(other.model) == _name(run.model)), run)
    scored = [other for other in found if other.dataset == run.dataset and other.model == alike.model]
    return replace(run, model=alike.model, evaluation=scored[0].evaluation if scored else run.evaluation, why=why)


def missing_text(missing: list[Run]) -> str:
    """How many runs are missing, and why."""
    return f"{len(missing)} runs: " + "; ".join(sorted({run.why for run in missing}))


def _run(record: dict[str, Any]) -> Run:
    config, stages, machine = record["config"], record["stages"], record["machine"]
    _require_contents(record)
    dtype = config.get("resolved", config["model"])["dtype"]  # the model's own may be "auto"
    run = _described(record["id"], config, "calibration" in stages, dtype)
    run = replace(
        run,
        sparsity_targeted=record["sparsity"]["targeted"] if run.pruned else None,
        sparsity_linear=record["sparsity"]["linear"] if run.pruned else None,
        pruning_seconds=stages["pruning"]["seconds"] if run.pruned else None,
        machine=f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']:g} GB",
    )
    metric = next((metric for metric in record["metrics"] if metric["metric"] == "perplexity"), None)
    if metric is None:
        return run
    losses = tuple(map(float, record["windows"]))
    if not math.isclose(math.exp(math.fsum(losses) / len(losses)), metric["value"], rel_tol=1e-4):
        raise ValueError("its windows contradict its perplexity")
    return replace(
        run,
        evaluation=_words(config["evaluation"], f"{len(losses)} windows", metric["seq_len"])
        + f", {metric['tokens']} tokens counted",
        dataset=metric["dataset"],
        seq_len=metric["seq_len"],
        tokens=metric["tokens"],
        perplexity=metric["value"],
        stderr=metric["stderr"],
        losses=losses,
    )


def _name(model: str) -> str:
    return model.split(" (")[0]


def _require_contents(record: dict[str, Any]) -> None:
    """What the reports of single stages, of accuracies and of comparisons read; KeyError or ValueError without it."""
    for stage in record["stages"].values():
        if not math.isfinite(stage["seconds"] + stage["peak_memory_gb"]):
            raise ValueError("a stage took no time that can be told")
    for metric in record["metrics"]:
        if metric["metric"] == "acc" and metric["dataset"] != "mean":
            right = math.fsum(metric["items"])
            if len(metric["items"]) != metric["n"] or not math.isclose(
                right / metric["n"], metric["value"], rel_tol=1e-6
            ):
                raise ValueError(f"its items contradict its accuracy on {metric['dataset']}")
    if "methods" in record["config"]["method"] and not {"errors", "jaccard", "norms"} <= set(record["diagnostics"]):
        raise ValueError("its diagnostics are not whole")


def _described(run_id: str, config: dict[str, Any], calibrates: bool, dtype: str) -> Run:
    """A run by its config alone."""
    method, model, evaluation = config["method"], config["model"], config["evaluation"]
    trained = model.get("trained")
    places = [f"{key}: {model[key]}" for key in ("hub_id", "revision", "path") if model.get(key)]
    details = ", ".join(part for part in [dtype, *places] if part)
    pruned = calibration = None
    if method["name"] != "dense":
        pruned = config["targets"] + (f" without {config['exclude']}" if config["exclude"] else "")
    if calibrates:
        sequences, length = config["calibration"]["n_sequences"], config["calibration"]["seq_len"]
        calibration = _words(config["calibration"], f"{sequences or 'all'} sequences", length or "all")
    return Run(
        id=run_id,
        model=f"{model['name']} ({details})" if details else model["name"],
        evaluation=_evaluation(evaluation),
        pruned=pruned,
        calibration=calibration,
        dataset=evaluation["name"],
        seq_len=evaluation["seq_len"],
        tokens=None,
        whole_text=evaluation.get("n_windows") is None,
        method=method["name"],
        options=tuple(f"{key}={value}" for key, value in sorted(_flat(method).items()) if key != "name"),
        pattern=_pattern(config["sparsity"]) if pruned else "dense",
        seed=config["seed"],
        training_seed=trained["seed"] if trained else None,
        perplexity=None,
        stderr=None,
        sparsity_targeted=None,
        sparsity_linear=None,
        pruning_seconds=None,
        machine=None,
        losses=(),
    )


def _pattern(sparsity: dict[str, Any]) -> str:
    return f"{100 * sparsity['ratio']:g}%" if sparsity["n"] is None else f"{sparsity['n']}:{sparsity['m']}"


def _evaluation(evaluation: dict[str, Any]) -> str | None:
    """An evaluation in words, as far as its config tells; None where there is none."""
    if evaluation["name"] == "none":
        return None
    if evaluation["seq_len"] is None:  # zero-shot tasks
        items = f"{evaluation['limit']} items" if evaluation["limit"] else "all items"
        return f"{evaluation['name']}, {items} of each task (bos: {evaluation['bos']})"
    return _words(evaluation, f"{evaluation['n_windows'] or 'all'} windows", evaluation["seq_len"])


def _words(text: dict[str, Any], count: str, seq_len: int | str) -> str:
    """A calibration or evaluation in words, with all that its config says."""
    counted = ("name", "n_sequences", "n_windows", "seq_len")
    details = [f"{key}: {value}" for key, value in text.items() if key not in counted and value is not None]
    return f"{text['name']}, {count} × {seq_len} tokens ({', '.join(details)})"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
