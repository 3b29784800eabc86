"""Typed rows: one `Run` for each record, and for each run that a manifest names but that has no record.

What is grouped or compared is a field of its own type; words are made where something is rendered (`report/words.py`).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

AS_PUBLISHED: dict[str, dict[str, Any]] = {  # the options that tell the published variant from those of an ablation
    "magnitude": {"axis.gate": "layer", "update": "none"},
    "wanda": {"axis.gate": "in", "update": "none"},
    "sparsegpt": {"update": "obs"},
    "dass": {"alpha": 0.5, "axis.gate": "out", "update": "none"},
}


RELEASED, RANDOM = "released", "random"
NO_OPTIONS = ("name", "axis", "update", "order", "order_seed")


@dataclass(frozen=True, order=True)
class Pattern:
    """How many weights survive; in order from the freest to the strictest, dense first."""

    sparsity: float
    smallness: float  # of the groups: -m, or minus infinity where the whole comparison group is one

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

    model: str  # identity of its contents; of a model trained here, of its recipe but for the seed
    dtype: str | None
    evaluation: str  # identity of the windows or items; none where nothing was evaluated
    pruned: str | None
    calibration: str | None

    def agrees(self, other: "Setting") -> bool:
        """Whether a run of this setting may stand in a table of the other."""
        return all(part is None or part == theirs for part, theirs in zip(self, other, strict=True))


@dataclass(frozen=True)
class Run:
    """What was run and what came of it; what it did not use, measure or leave a record of is None."""

    id: str
    config: dict[str, Any]
    model: str
    setting: Setting
    model_identity: str | None
    method_identity: str | None
    calibrates: bool
    method: str
    update: str | None
    options: dict[str, Any]  # what the method's config says beyond its name, with dotted keys
    pattern: Pattern
    order: str  # of the neurons; released and random are draws of one kind, the others are options of the method
    order_seed: int | None  # of a random order
    seed: int
    training_seed: int | None  # of a model that this repository trained
    dataset: str
    seq_len: int | None
    tokens: int | None = None
    perplexity: float | None = None
    stderr: float | None = None
    sparsity_targeted: float | None = None
    sparsity_linear: float | None = None
    pruning_seconds: float | None = None
    losses: tuple[float, ...] = ()  # mean token loss of each window, nats
    record: dict[str, Any] | None = None
    why: str = ""  # it has no result; else empty

    @property
    def as_published(self) -> bool:
        """Whether its method is the published variant."""
        return AS_PUBLISHED.get(self.method, {}).items() <= self.options.items() and "order" not in self.options

    @property
    def replicate(self) -> tuple[int, int, int, str]:
        """Which of several like runs: of training, of the calibration set, of neuron order, of machine that trained."""
        order = 0 if self.order_seed is None else self.order_seed + 1
        machine = self.model_identity if self.training_seed is not None else None
        return self.training_seed or 0, self.seed, order, machine or ""

    @property
    def depends_on(self) -> tuple[bool, bool, bool, bool]:
        """On which parts of `replicate` its result depends."""
        trained = self.training_seed is not None
        return trained, self.calibrates, self.depends_on_order, trained

    @property
    def depends_on_order(self) -> bool:
        """Whether it has groups of N:M, cut in an order that is one of many: another would have cut them otherwise."""
        return math.isfinite(self.pattern.smallness) and self.order in (RELEASED, RANDOM)

    @property
    def parameters(self) -> int | None:
        """All of the model's parameters; our first records do not tell them."""
        return self.record["sparsity"].get("parameters") if self.record else None

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """The metrics of accuracy by task, with the mean; empty where none were measured."""
        metrics = self.record["metrics"] if self.record else []
        return {metric["dataset"]: metric for metric in metrics if metric["metric"] == "acc"}

    @property
    def accuracy(self) -> float | None:
        """The mean accuracy in %."""
        return 100 * self.accuracies["mean"]["value"] if self.accuracies else None

    @property
    def samples(self) -> list[np.ndarray]:
        """What is compared, less is better: losses of the windows [nats]; or, by task, minus the right items [%]."""
        if self.losses:
            return [np.array(self.losses)]
        return [-100 * np.array(metric["items"]) for task, metric in self.accuracies.items() if task != "mean"]


def frame_of(runs: list[Run]) -> "pd.DataFrame":
    """One tidy row per run with one type per column, without the losses of the windows.

    An option of a method has a column of its name, or `method.NAME` where a run has a field of that name, such as seed.
    """
    import pandas as pd  # 30 MB that a run does not need

    nested = ("config", "setting", "record", "losses", "calibrates", "options")
    rows = []
    for run in runs:
        row = {key: value for key, value in vars(run).items() if key not in nested}
        known = {*row, "n_windows"} - {"update", "order"}  # these two are options, too
        row |= {f"method.{key}" if key in known else key: value for key, value in run.options.items()}
        row |= {"pattern": str(run.pattern), "n_windows": len(run.losses) or None}
        parts = {"setting": run.setting._asdict(), "machine": run.record["machine"] if run.record else {}}
        parts["sparsity"] = run.config["sparsity"] if run.setting.pruned else {}
        parts["calibration"] = run.config["calibration"] if run.calibrates else {}
        rows.append(row | {f"{part}.{key}": value for part, known in parts.items() for key, value in known.items()})
    frame = pd.DataFrame(rows, dtype=object)
    for name, column in frame.items():
        kinds = set(map(type, column.dropna()))
        number = "boolean" if kinds == {bool} else "float64" if float in kinds else "Int64"
        are_numbers = bool(kinds) and (kinds == {bool} or kinds <= {int, float})
        frame[name] = column.astype(number if are_numbers else "string")
    return frame


def place_of(model: dict[str, Any]) -> dict[str, str]:
    """Where its config says that a model lies."""
    return {key: model[key] for key in ("hub_id", "revision", "path") if model.get(key)}
