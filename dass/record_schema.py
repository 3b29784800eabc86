"""What a record and the config of a run must hold; `dass/soundness.py` says which of their numbers must agree.

The schema names what is read somewhere; whatever else a record holds is let through, as plain values where a table
would show it.
"""

import math
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from dass.schema_types import (
    CLOSE,
    Count,
    Energy,
    Measured,
    NotNegative,
    OpenPart,
    Option,
    Part,
    Plain,
    Share,
    Size,
    Word,
)


class Trained(OpenPart):
    """The recipe of a model that was trained here."""

    seed: Count


class Model(Part):
    """`config.model`."""

    name: Word
    dtype: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None
    trained: Trained | None = None


class Method(Part):
    """`config.method`: whatever else it holds is an option."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option] = Field(init=False)
    name: Word
    axis: dict[str, str] | str | None = None
    update: str | None = None
    alpha: Annotated[float, Field(gt=-1e9, lt=1e9)] | None = None
    methods: list[str | dict[str, Plain]] | None = None


class Sparsity(OpenPart):
    """`config.sparsity`: either a ratio, or n of m."""

    ratio: Share | None
    n: Size | None
    m: Size | None

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if (self.n is None) != (self.m is None) or (self.n or 0) > (self.m or 0) or (self.n and self.ratio is not None):
            raise ValueError("either a ratio, or n of m are wanted")
        return self

    @property
    def pruned(self) -> float:
        """The share of weights that it removes."""
        return 1 - self.n / self.m if self.n and self.m else self.ratio or 0.0

    def __str__(self) -> str:
        """The name in tables, such as '2:4' or '50%'."""
        return f"{self.n}:{self.m}" if self.n else f"{100 * self.pruned:g}%"


class Calibration(OpenPart):
    """`config.calibration`."""

    name: Word
    n_sequences: Size | None
    seq_len: Size | None


class Evaluation(OpenPart):
    """`config.evaluation`."""

    name: Word
    seq_len: Size | None
    n_windows: Size | None
    limit: Size | None = None


class Resolved(Part):
    """What the config left open."""

    dtype: Word
    batch_size: Size | None = None  # of the calibration, after all halvings
    evaluation_batch_size: Size | None = None
    halved_from: dict[str, Size] | None = None  # by stage, where the memory of the device did not suffice
    hessians: Word | None = None  # how their products were made


class Config(Part):
    """The composed config of a run: what a report reads of it."""

    model: Model
    method: Method
    sparsity: Sparsity
    calibration: Calibration
    evaluation: Evaluation
    targets: Word
    exclude: str | None
    seed: Count
    resolved: Resolved | None = None


class Identity(Part):
    """The hashes of the parts."""

    numerics: int
    model: Word
    method: Word | None
    calibration: Word | None
    evaluation: Word | None


class Machine(OpenPart):
    """Where it ran."""

    cpu: str
    threads: Size
    memory_gb: Measured
    gpu: str | None
    processes: Size | None = None  # that did it together, where there were several


class Stage(OpenPart):
    """What a stage took."""

    seconds: Measured
    peak_memory_gb: Measured
    peak_gpu_memory_gb: Measured | None = None


class Projection(Part):
    """The zeros of a projection."""

    weights: Size
    zeros: Count
    sparsity: Share
    pattern: str | None = None
    order: str | None = None
    mlp_error_before: NotNegative | None = None  # of its block's MLPs on held-out calibration tokens, relative; where
    mlp_error_after: NotNegative | None = None  # they were trained by the update mlp

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not math.isclose(self.zeros / self.weights, self.sparsity, abs_tol=CLOSE):
            raise ValueError("its zeros contradict its sparsity")
        return self


class Zeros(Part):
    """The shares of zeros, and those of each projection."""

    projections: dict[str, Projection]
    targeted: Share
    linear: Share
    mlp: Share | None = None
    total: Share | None = None
    parameters: Size | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        found = self.projections.values()
        share = sum(one.zeros for one in found) / sum(one.weights for one in found) if found else self.targeted
        if not math.isclose(share, self.targeted, abs_tol=CLOSE):
            raise ValueError("the zeros of its projections contradict the sparsity of the targeted weights")
        return self


class Metric(Part):
    """A number with its uncertainty."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain] = Field(init=False)
    dataset: Word
    metric: Word
    value: float
    stderr: NotNegative | None
    n: Count
    seq_len: Size | None = None
    tokens: Size | None = None
    items: list[Annotated[int, Field(ge=0, le=1)]] | None = None  # 1 = right

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """The items of a task give its accuracy."""
        if self.items is None:
            return self
        n, share = len(self.items), sum(self.items) / max(len(self.items), 1)
        if n != self.n or n < 2 or not math.isclose(share, self.value, abs_tol=CLOSE):
            raise ValueError(f"its items contradict its accuracy on {self.dataset}")
        return self


class Norms(Part):
    """The spread of the norms of what down, and of what gate and up read, over the blocks."""

    cv: list[NotNegative | None]
    p90_p10: list[NotNegative | None]
    reordered: list[Share | None]
    input_cv: list[NotNegative | None]
    input_p90_p10: list[NotNegative | None]


class Expert(Part):
    """How methods change what one expert writes."""

    block: Word
    index: Count
    tokens: Count
    errors: dict[str, Energy | None]


class Diagnostics(Part):
    """What the comparison of methods left."""

    errors: dict[str, dict[str, list[Energy | None]]]  # by method and role, or `mlp` for the whole, over the blocks
    kept: dict[str, dict[str, list[Share | None]]]  # by method and role
    jaccard: dict[str, dict[str, list[Share | None]]]  # by pair of methods and role
    norms: Norms
    zeros: list[Share] | None = None  # share of exact zeros among the intermediate activations, over the blocks
    experts: list[Expert] | None = None  # our first records tell neither

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        zeros = {"zeros": self.zeros} if self.zeros is not None else {}
        tables = (*self.errors.values(), *self.kept.values(), *self.jaccard.values(), vars(self.norms) | zeros)
        if len({len(values) for table in tables for values in table.values()}) > 1:
            raise ValueError("its numbers are of different numbers of blocks")
        return self


class Bounds(Part):
    """The most that decoding can gain."""

    packed: Annotated[float, Field(ge=1)]
    bitmask: Annotated[float, Field(ge=1)]


class AuditSums(Part):
    """What hardware can make of the zeros of a whole model."""

    status: Word
    helps: Word
    prefill: Annotated[float, Field(ge=1)]
    decode: Bounds


class Audit(AuditSums):
    """The same as `dass/audit.py` tells it: of the weights as they are, and of fp32 what it would be in bf16."""

    bfloat16: AuditSums | None = None


class Evaluated(Part):
    """What was said of a model in training, and of the mask that its method would choose then."""

    step: Count
    loss: NotNegative
    windows: list[NotNegative]
    overlap: Share
    exchanged: NotNegative
    exchanged_windows: list[NotNegative]
    training_loss: NotNegative | None = None


class Record(Part):
    """A record: what a report reads of it."""

    id: Word
    identity: Identity
    determinants: dict[str, dict[str, Any] | None]
    config: Config
    versions: dict[str, str]
    machine: Machine
    stages: dict[str, Stage]
    sparsity: Zeros
    metrics: list[Metric]
    windows: list[NotNegative]
    files: dict[str, str]
    failed: dict[str, str]
    diagnostics: Diagnostics | None = None
    audit: Audit | None = None
    training: list[Evaluated] | None = None
