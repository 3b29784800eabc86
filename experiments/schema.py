"""The typed config: what may stand in `conf/prune.yaml` and its groups."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from dass.training import tiny
from dass.training.masked import Recipe


@dataclass
class ModelConfig:
    """conf/model: exactly one of packaged, trained, hub_id and path says where the model comes from."""

    name: str = "???"
    packaged: str | None = None
    trained: tiny.Recipe | None = None
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    bos: str | None = None
    projections: Any = None  # {role: regular expression}; OmegaConf cannot fill an optional dictionary
    # entries of transformers' config that fix the shapes, for `experiments.plan` without the hub; no run reads it
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class SparsityConfig:
    """conf/sparsity: either ratio, or n and m."""

    name: str = "???"
    ratio: float | None = None
    n: int | None = None
    m: int | None = None


@dataclass
class CalibrationConfig:
    """conf/calibration."""

    name: str = "???"
    path: str | None = None
    n_sequences: int | None = None
    seq_len: int | None = None
    bos: str | None = None
    join: bool = False
    revision: str | None = None
    field: str = "text"
    min_expert_tokens: int | None = None


@dataclass
class EvaluationConfig:
    """conf/evaluation."""

    name: str = "???"
    path: str | None = None
    seq_len: int | None = None
    n_windows: int | None = None
    limit: int | None = None
    bos: str | None = None
    revision: str | None = None
    field: str = "text"


@dataclass
class TrackingConfig:
    """conf/tracking."""

    name: str = "???"
    project: str = "dass"
    group: str = ""
    folder: str = "outputs"


@dataclass
class MethodConfig:
    """The part of conf/method that all methods share; further keys are parameters of criterion and update."""

    name: str = "???"
    criterion: str | None = None
    axis: dict[str, str] = field(default_factory=dict)
    update: str = "none"
    order: str = "released"
    order_seed: int = 0
    exclude: str | None = None


@dataclass
class TrainingConfig(Recipe):
    """How a pruned model is trained on, see conf/finetune.yaml; no steps: it is not."""

    n_sequences: int = 128


@dataclass
class PruneConfig:
    """conf/prune.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    finetune: TrainingConfig = field(default_factory=TrainingConfig)
    scale: str | None = None
    report: str | None = None
    targets: str = "mlp"
    exclude: str | None = None
    seed: int = 0
    device: str = "auto"
    memory: str = "auto"
    batch_size: int | None = None
    results_dir: str = "results/runs"
    save_model: str | None = None
    masks: str | None = None
    rerun: bool = False
    dry_run: bool = False
    debug: bool = False


ConfigStore.instance().store(name="prune_schema", node=PruneConfig)
