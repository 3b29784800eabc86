"""The typed config, and what a run is made of once it is resolved: library values and an identity."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dass import assets
from dass.errors import DassError
from dass.models import folder_fingerprint, resolve_device, resolve_dtype
from dass.pruning.blocks import ATTENTION_ROLES, INPUT_OF_ROLE
from dass.pruning.masks import NM, Pattern, Unstructured
from dass.pruning.method import BlockPruner, Method
from dass.records import file_sha256, identity_of


@dataclass
class ModelConfig:
    """conf/model: exactly one of packaged, hub_id and path says where the model comes from."""

    name: str = "???"
    packaged: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None
    dtype: str = "auto"
    bos: str = "tokenizer"


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
    bos: str = "tokenizer"
    join: bool = False


@dataclass
class EvaluationConfig:
    """conf/evaluation."""

    name: str = "???"
    path: str | None = None
    seq_len: int | None = None
    n_windows: int | None = None
    bos: str = "tokenizer"


@dataclass
class TrackingConfig:
    """conf/tracking."""

    name: str = "???"
    project: str = "dass"
    group: str = ""
    folder: str = "outputs"


@dataclass
class MethodConfig:
    """The part of conf/method that all methods share; further keys are parameters of the criterion."""

    name: str = "???"
    criterion: str | None = None
    axis: dict[str, str] = field(default_factory=dict)
    update: str = "none"
    exclude: str | None = None
    damping: float = 0.01
    block_size: int = 128


@dataclass
class PruneConfig:
    """conf/prune.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    targets: str = "mlp"
    exclude: str | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int | None = None
    results_dir: str = "results/runs"
    save_model: str | None = None
    masks: str | None = None
    rerun: bool = False
    debug: bool = False


ConfigStore.instance().store(name="prune_schema", node=PruneConfig)


@dataclass(frozen=True)
class Plan:
    """A checked run: nothing heavy has been loaded yet."""

    config: PruneConfig
    composed: dict[str, Any]
    """The composed config as plain values, for the record."""
    dtype: str
    device: torch.device
    pruner: BlockPruner | None
    """None for the dense model."""
    run_id: str

    @property
    def calibrates(self) -> bool:
        """Whether the method reads any statistics."""
        return self.pruner is not None and _needs_calibration(self.pruner)


def resolve(config: DictConfig) -> Plan:
    """Check the composed config and turn it into library values and an identity.

    Raises:
        DassError: a value or combination that means nothing, or a file that is not there.
    """
    composed: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore
    _require_known_keys(config)
    typed: PruneConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    _require_separate_folders(typed)
    if not 0 <= typed.seed < 2**63:
        raise DassError(f"seed={typed.seed} must be between 0 and 2^63 - 1.")
    device = resolve_device(typed.device)
    model_identity = _model_identity(typed.model)
    pruner = _pruner(typed)
    if pruner is None and typed.masks is not None:
        raise DassError("masks=DIR has nothing to write for the dense model: choose a method that prunes.")
    if typed.batch_size is not None and typed.batch_size < 1:
        raise DassError(f"batch_size={typed.batch_size} must be at least 1, or null for one that fits the memory.")
    evaluation = _evaluation_identity(typed.evaluation)
    dtype = typed.model.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # known without fetching the model
    else:
        dtype = resolve_dtype(dtype, source_of(typed.model), typed.model.revision)
    determinants = {"model": model_identity, "dtype": dtype, "evaluation": evaluation}
    if pruner is not None:
        determinants |= _pruning_identity(typed, pruner)
    return Plan(typed, composed, dtype, device, pruner, identity_of(determinants))


def _require_known_keys(config: DictConfig) -> None:
    """Keys added with `+` pass Hydra; only a method may have more than its schema says."""
    schema: DictConfig = OmegaConf.structured(PruneConfig)
    for key, node in config.items():
        name, unknown = str(key), []
        if name not in list(schema):
            unknown = [name]
        elif isinstance(node, DictConfig) and name != "method":
            unknown = [f"{name}.{inner!s}" for inner in node if inner not in list(schema[name])]
        if unknown:
            raise DassError(f"There is no setting {unknown[0]}: see the files in conf/ for those that exist.")


def _require_separate_folders(config: PruneConfig) -> None:
    """A saved model replaces its folder: nothing else may lie in it, nor may it be the model that it comes from."""
    if config.save_model is None:
        return
    target = Path(config.save_model).resolve()
    for name, other in (
        ("masks", config.masks),
        ("results_dir", config.results_dir),
        ("model.path", config.model.path),
    ):
        if other is not None and target in (Path(other).resolve(), *Path(other).resolve().parents):
            raise DassError(f"save_model={config.save_model} would replace {name}={other}: choose another folder.")


def source_of(model: ModelConfig) -> str:
    """What to load: a hub id or a folder, which for a packaged model is made on first need."""
    if model.packaged is not None:
        return str(assets.packaged_model(model.packaged))
    return str(model.path or model.hub_id)


def _model_identity(model: ModelConfig) -> dict[str, Any]:
    """What identifies a model: its contents, or its id and revision, but not its place."""
    given = [name for name in ("packaged", "hub_id", "path") if getattr(model, name) is not None]
    if model.name == "local" and model.path is None:
        raise DassError("model=local needs a folder: give `model.path=DIR`.")
    if len(given) != 1:
        raise DassError(f"model={model.name} must set one of packaged, hub_id and path; it sets {given or 'none'}.")
    if model.packaged is not None:
        return {"packaged": model.packaged, "sha256": assets.packaged_sha256(model.packaged)}
    if model.path is not None:
        return {"folder": folder_fingerprint(Path(model.path))}
    return {"hub_id": model.hub_id, "revision": model.revision}


def _pattern(sparsity: SparsityConfig) -> Pattern:
    nm = (sparsity.n, sparsity.m)
    if sparsity.ratio is not None and nm == (None, None):
        return Unstructured(sparsity.ratio)
    if sparsity.ratio is None and sparsity.n is not None and sparsity.m is not None:
        return NM(sparsity.n, sparsity.m)
    raise DassError(
        f"sparsity={sparsity.name} has ratio={sparsity.ratio}, n={sparsity.n}, m={sparsity.m}: set either ratio "
        f"(unstructured) or both n and m (n of m are kept)."
    )


def _pruner(config: PruneConfig) -> BlockPruner | None:
    """The method with its targets; None for the dense model."""
    shared = {f.name for f in fields(MethodConfig)}
    axis = config.method.get("axis")
    given = dict(config.method)
    if isinstance(axis, str):
        given["axis"] = dict.fromkeys(INPUT_OF_ROLE, axis)
    method: MethodConfig = OmegaConf.to_object(  # type: ignore[assignment]
        OmegaConf.merge(OmegaConf.structured(MethodConfig), {k: v for k, v in given.items() if k in shared})
    )
    parameters = {k: v for k, v in given.items() if k not in shared}
    for name, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DassError(f"method.{name}={value} is not a number: correct it.")
    if method.criterion is None:
        if parameters or method.axis or method.update != "none":
            raise DassError(f"method={method.name} has no criterion, so it prunes nothing: set `method.criterion`.")
        return None
    return BlockPruner(
        Method(
            method.criterion,
            method.axis,  # type: ignore[arg-type]  # checked by Method
            _pattern(config.sparsity),
            method.update,  # type: ignore[arg-type]
            parameters,
            method.damping,
            method.block_size,
        ),
        config.targets,  # type: ignore[arg-type]
        "|".join(f"(?:{expression})" for expression in (method.exclude, config.exclude) if expression) or None,
    )


def _targeted_roles(pruner: BlockPruner) -> list[str]:
    return [role for role in INPUT_OF_ROLE if pruner.targets == "all" or role not in ATTENTION_ROLES]


def _needs_calibration(pruner: BlockPruner) -> bool:
    return any(pruner.method.needs_for(role) for role in _targeted_roles(pruner))


def _pruning_identity(config: PruneConfig, pruner: BlockPruner) -> dict[str, Any]:
    """What determines the pruned weights, and only what this method uses."""
    method, roles = pruner.method, _targeted_roles(pruner)
    uses_hessian = any("inverse_factor" in method.needs_for(role) for role in roles)
    identity: dict[str, Any] = {
        "criterion": method.criterion,
        "axis": {role: method.axis.get(role, "wanda") for role in roles},
        "parameters": {name: float(value) for name, value in method.all_parameters().items()},
        "update": method.update,
        "solver": {"damping": method.damping, "block_size": method.block_size} if uses_hessian else None,
        "pattern": vars(method.pattern),
        "targets": pruner.targets,
        "exclude": pruner.exclude,
    }
    if _needs_calibration(pruner):
        calibration = config.calibration
        identity["calibration"] = {
            "name": calibration.name,
            "file": _file_identity(calibration.path, "calibration"),
            "n_sequences": calibration.n_sequences,
            "seq_len": calibration.seq_len,
            "bos": calibration.bos,
            "join": calibration.join,
        }
        if calibration.name == "packaged_c4":
            identity["calibration"]["file"] = assets.packaged_sha256("c4")
        if calibration.name != "tokens_file":
            identity["seed"] = config.seed
    return identity


def _evaluation_identity(evaluation: EvaluationConfig) -> dict[str, Any] | None:
    if evaluation.name == "none":
        return None
    if evaluation.seq_len is None:
        raise DassError(f"evaluation={evaluation.name} needs an explicit `evaluation.seq_len`: set it.")
    file = _file_identity(evaluation.path, "evaluation")
    if evaluation.name == "packaged_wiki":
        file = assets.packaged_sha256("wiki")
    return {
        "name": evaluation.name,
        "file": file,
        "seq_len": evaluation.seq_len,
        "n_windows": evaluation.n_windows,
        "bos": evaluation.bos,
    }


def _file_identity(path: str | None, group: str) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise DassError(f"{group}.path={path} is not a file: check the path.")
    return file_sha256(Path(path))
