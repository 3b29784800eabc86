"""Typed rows: one `Run` for each record, and for each run that a manifest names but that has no record.

What is grouped or compared is a field of its own type; words are made where something is rendered (`report/words.py`).
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from dass.manifests import Manifest
from dass.records import identity_of

AS_PUBLISHED: dict[str, dict[str, Any]] = {  # the options that tell the published variant from those of an ablation
    "magnitude": {"axis.gate": "layer", "update": "none"},
    "wanda": {"axis.gate": "in", "update": "none"},
    "sparsegpt": {"update": "obs"},
    "dass": {"alpha": 0.5, "axis.gate": "out", "update": "none"},
}


class Pattern(NamedTuple):
    """How many weights survive; in order from the freest to the strictest, dense first."""

    sparsity: float
    smallness: float
    """Of the groups: -m, or minus infinity where the whole comparison group is one."""

    @classmethod
    def of(cls, ratio: float | None, n: int | None, m: int | None) -> "Pattern":
        """From the values of the config: either a ratio, or n and m."""
        return cls(1 - n / m, -m) if n and m else cls(ratio or 0.0, -math.inf)

    def __str__(self) -> str:
        """As tables show it: 50%, 2:4, dense."""
        if self == DENSE:
            return "dense"
        if math.isinf(self.smallness):
            return f"{100 * self.sparsity:g}%"
        return f"{round((self.sparsity - 1) * self.smallness)}:{-self.smallness:g}"


DENSE = Pattern(-1.0, -math.inf)


class Setting(NamedTuple):
    """What comparable runs have in common; a None, of what a run did not use, agrees with everything."""

    model: str
    """Identity of its contents; of a model trained here, of its recipe but for the seed."""
    dtype: str | None
    evaluation: str | None
    """Identity of the windows."""
    pruned: str | None
    calibration: str | None

    def agrees(self, other: "Setting") -> bool:
        """Whether a run of this setting may stand in a table of the other."""
        return all(part is None or part == theirs for part, theirs in zip(self, other, strict=True))


@dataclass(frozen=True)
class Run:
    """What was run and what came of it; what it did not use (a dense run: any calibration) is None."""

    id: str
    config: dict[str, Any]
    model: str
    setting: Setting
    model_identity: str | None
    method_identity: str | None
    calibrates: bool
    method: str
    axis: dict[str, str]
    update: str | None
    parameters: dict[str, Any]
    pattern: Pattern
    seed: int
    training_seed: int | None  # of a model that this repository trained
    record: dict[str, Any] | None = None
    dataset: str = ""
    seq_len: int | None = None
    tokens: int | None = None
    perplexity: float | None = None  # None without a record, or without a perplexity in it
    stderr: float | None = None
    sparsity_targeted: float | None = None
    sparsity_linear: float | None = None
    pruning_seconds: float | None = None
    losses: tuple[float, ...] = ()  # mean token loss of each window, nats
    why: str = ""  # it has no result

    @property
    def options(self) -> dict[str, Any]:
        """What the method's config says beyond its name, with dotted keys."""
        return self.parameters | {f"axis.{role}": axis for role, axis in self.axis.items()} | {"update": self.update}

    @property
    def as_published(self) -> bool:
        """Whether its method is the published variant."""
        return AS_PUBLISHED.get(self.method, {}).items() <= self.options.items()

    @property
    def replicate(self) -> tuple[int, int, str]:
        """Which of several like runs it is: of training, of the calibration set, of the machine that trained."""
        trained = self.training_seed is not None
        return self.training_seed or 0, self.seed, (self.model_identity or "") if trained else ""

    @property
    def depends_on_seeds(self) -> bool:
        """Whether another draw of the calibration set, or another training, would give another result."""
        return self.calibrates or self.training_seed is not None

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """The metrics of accuracy by task, with the mean; empty where none were measured."""
        metrics = self.record["metrics"] if self.record else []
        return {metric["dataset"]: metric for metric in metrics if metric["metric"] == "acc"}


def runs_of(records: list[dict[str, Any]]) -> list[Run]:
    """One run per record, whatever it measured; a record with unusable contents is named on stderr and left out."""
    runs = []
    for record in records:
        try:
            runs.append(_run(record))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            print(f"left out: the record {record['id']} is malformed ({error!r}): run it again.", file=sys.stderr)
    return runs


def planned_runs(manifest: Manifest, runs: list[Run]) -> list[Run]:
    """The runs of a manifest, each once: those that have a record, and the missing ones with the reason.

    A run whose config could not be composed is named on stderr and left out.
    """
    by_id = {run.id: run for run in runs}
    named = [by_id[planned.fingerprint] for planned in manifest.runs if planned.fingerprint in by_id]
    found = list({run.id: run for run in named}.values())
    missing = []
    for index, planned in enumerate(manifest.runs):
        if planned.fingerprint in by_id:
            continue
        if not planned.config:
            print(f"left out: run {index + 1} of the manifest {manifest.name}: {planned.why}", file=sys.stderr)
            continue
        run_id = planned.fingerprint or f"{manifest.name}#{index + 1}"
        missing.append(missing_run(run_id, planned.config, planned.calibrates, planned.why or "not run yet", found))
    return found + missing


def missing_run(run_id: str, config: dict[str, Any], calibrates: bool, why: str, found: list[Run]) -> Run:
    """A run without a record: what its config does not tell (identities, a dtype) is that of a `found` run alike."""
    run = _described(run_id, config, calibrates, None, {})
    setting = run.setting
    models = [other for other in found if _recipe(other.config["model"]) == _recipe(config["model"])]
    if models:
        setting = setting._replace(model=models[0].setting.model, dtype=models[0].setting.dtype)
    for name in ("evaluation", "calibration"):
        for other in models + found:
            theirs = getattr(other.setting, name)
            if getattr(setting, name) and theirs and _given(other.config[name]) == _given(config[name]):
                setting = setting._replace(**{name: theirs})
                break
    return replace(run, setting=setting, why=why)


def frame_of(runs: list[Run]) -> pd.DataFrame:
    """One tidy row per run with one type per column, without the losses of the windows."""
    nested = ("config", "setting", "record", "losses", "calibrates", "axis", "parameters")
    rows = []
    for run in runs:
        row = {key: value for key, value in vars(run).items() if key not in nested}
        row |= run.options | {"pattern": str(run.pattern), "n_windows": len(run.losses) or None}
        parts = {"setting": run.setting._asdict(), "machine": run.record["machine"] if run.record else {}}
        parts["sparsity"] = run.config["sparsity"] if run.setting.pruned else {}
        parts["calibration"] = run.config["calibration"] if run.calibrates else {}
        rows.append(row | {f"{part}.{key}": value for part, known in parts.items() for key, value in known.items()})
    frame = pd.DataFrame(rows, dtype=object)
    for name, column in frame.items():
        kinds = set(map(type, column.dropna()))
        number = "float64" if float in kinds else "boolean" if bool in kinds else "Int64"
        frame[name] = column.astype(number if kinds and kinds <= {int, float, bool} else "string")
    return frame


def _run(record: dict[str, Any]) -> Run:
    config, stages, identity = record["config"], record["stages"], record["identity"]
    _require_contents(record)
    dtype = config.get("resolved", config["model"])["dtype"]  # the model's own may be "auto"
    run = _described(record["id"], config, "calibration" in stages, dtype, identity)
    pruned, setting = run.setting.pruned is not None, run.setting
    if run.calibrates:  # draws of one text are replicates
        text = {key: value for key, value in record["determinants"]["calibration"].items() if key != "seed"}
        setting = setting._replace(calibration=identity_of(text))
    run = replace(
        run,
        record=record,
        setting=setting,
        sparsity_targeted=record["sparsity"]["targeted"] if pruned else None,
        sparsity_linear=record["sparsity"]["linear"] if pruned else None,
        pruning_seconds=stages["pruning"]["seconds"] if pruned else None,
        why=record.get("failed", {}).get("evaluation", ""),
    )
    metric = next((metric for metric in record["metrics"] if metric["metric"] == "perplexity"), None)
    if metric is None:
        return run
    losses = tuple(map(float, record["windows"]))
    if not math.isclose(math.exp(math.fsum(losses) / len(losses)), metric["value"], rel_tol=1e-4):
        raise ValueError("its windows contradict its perplexity")
    measured = {key: metric[key] for key in ("dataset", "seq_len", "tokens", "stderr")}
    return replace(run, **measured, perplexity=metric["value"], losses=losses)


def _require_contents(record: dict[str, Any]) -> None:
    """What the reports of single stages, of accuracies and of comparisons read; KeyError or ValueError without it."""
    for stage in record["stages"].values():
        if not math.isfinite(stage["seconds"] + stage["peak_memory_gb"]):
            raise ValueError("a stage took no time that can be told")
    for metric in record["metrics"]:
        if metric["metric"] == "acc" and metric["dataset"] != "mean":
            right = math.fsum(metric["items"])
            agrees = math.isclose(right / metric["n"], metric["value"], rel_tol=1e-6)
            if len(metric["items"]) != metric["n"] or not agrees:
                raise ValueError(f"its items contradict its accuracy on {metric['dataset']}")
    if "methods" in record["config"]["method"] and not {"errors", "jaccard", "norms"} <= set(record["diagnostics"]):
        raise ValueError("its diagnostics are not whole")


def _described(
    run_id: str, config: dict[str, Any], calibrates: bool, dtype: str | None, identity: dict[str, Any]
) -> Run:
    """A run by its config and the identities of its parts, where they are known."""
    method, model, evaluation, sparsity = (config[key] for key in ("method", "model", "evaluation", "sparsity"))
    trained, dense = model.get("trained"), method["name"] == "dense"
    excluding = f" without {config['exclude']}" if config["exclude"] else ""
    return Run(
        id=run_id,
        config=config,
        model=model["name"],
        setting=Setting(
            model=identity["model"] if identity and not trained else identity_of(_recipe(model)),
            dtype=dtype,
            evaluation=identity["evaluation"] if identity else _given(evaluation),
            pruned=None if dense else config["targets"] + excluding,
            calibration=_given(config["calibration"]) if calibrates else None,
        ),
        model_identity=identity.get("model"),
        method_identity=f"{identity['method']}, numerics {identity['numerics']}" if identity.get("method") else None,
        calibrates=calibrates,
        method=method["name"],
        axis=method.get("axis") or {},
        update=method.get("update"),
        parameters={key: value for key, value in method.items() if key not in ("name", "axis", "update")},
        pattern=DENSE if dense else Pattern.of(**{key: sparsity[key] for key in ("ratio", "n", "m")}),
        dataset=evaluation["name"],
        seq_len=evaluation["seq_len"],
        seed=config["seed"],
        training_seed=trained["seed"] if trained else None,
    )


def place_of(model: dict[str, Any]) -> dict[str, str]:
    """Where its config says that a model lies."""
    return {key: model[key] for key in ("hub_id", "revision", "path") if model.get(key)}


def _recipe(model: dict[str, Any]) -> dict[str, Any]:
    """What its config says of a model; of a trained one all but the seed."""
    trained = {key: value for key, value in (model.get("trained") or {}).items() if key != "seed"}
    return {"name": model["name"], **place_of(model), "trained": trained}


def _given(text: dict[str, Any]) -> str | None:
    """An identity of what its config says of a calibration or an evaluation; None where there is none."""
    given = {key: value for key, value in text.items() if value is not None}
    return None if text["name"] == "none" else identity_of(given)
