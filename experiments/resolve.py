"""From the composed config to a checked run: nothing heavy has been loaded yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dass.errors import DassError
from dass.models import resolve_device, resolve_dtype
from dass.pruning.comparison import check_comparison
from dass.pruning.method import BlockPruner
from experiments.fingerprint import Fingerprint, fingerprint_of, needs_calibration, source_of
from experiments.methods import pruners_of
from experiments.schema import ModelConfig, PruneConfig, typed


@dataclass(frozen=True)
class Checked:
    """A config that means something; no file and no model has been looked at."""

    config: PruneConfig
    composed: dict[str, Any]
    """The composed config as plain values, for the record."""
    pruners: dict[str, BlockPruner]
    """By the name of the method: none for the dense model, several where methods are only compared."""

    @property
    def compares(self) -> bool:
        """Whether methods are compared on every block, and the model stays dense."""
        return len(self.pruners) > 1

    @property
    def calibrates(self) -> bool:
        """Whether the run reads any calibration tokens."""
        return any(map(needs_calibration, self.pruners.values()))


@dataclass(frozen=True)
class Plan(Checked):
    """A run whose files are there, with its identity."""

    dtype: str
    device: torch.device
    fingerprint: Fingerprint

    @property
    def run_id(self) -> str:
        """The identity in 16 hex digits."""
        return self.fingerprint.id


def check(config: DictConfig) -> Checked:
    """Check the composed config and turn it into library values.

    Raises:
        DassError: a value or combination that means nothing.
    """
    composed: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore
    _require_known_keys(config)
    plain = typed(config)
    _require_one_model(plain.model)
    _require_separate_folders(plain)
    if not 0 <= plain.seed < 2**63:
        raise DassError(f"seed={plain.seed} must be between 0 and 2^63 - 1.", field="seed")
    pruners = pruners_of(plain)
    for name, asked in (("masks", plain.masks), ("save_model", plain.save_model)):
        if asked is not None and len(pruners) > 1:
            raise DassError(f"{name}=DIR has nothing to write where methods are only compared: choose one method.")
    if not pruners and plain.masks is not None:
        raise DassError("masks=DIR has nothing to write for the dense model: choose a method that prunes.")
    if len(pruners) > 1:
        check_comparison(pruners)
        if plain.evaluation.name != "none":
            raise DassError("method=compare leaves the model dense: set evaluation=none.")
    if plain.batch_size is not None and plain.batch_size < 1:
        raise DassError(f"batch_size={plain.batch_size} must be at least 1, or null for one that fits the memory.")
    needed = plain.calibration.min_expert_tokens
    if needed is not None and needed < 1:
        raise DassError(f"min_expert_tokens={needed} must be at least 1.", field="calibration.min_expert_tokens")
    return Checked(plain, composed, pruners)


def resolve(config: DictConfig) -> Plan:
    """Check the composed config, look at the files that it names, and reckon the identity.

    Raises:
        DassError: a value or combination that means nothing, or a file that is not there.
    """
    checked = check(config)
    model, device = checked.config.model, resolve_device(checked.config.device)
    dtype = model.dtype
    if dtype == "auto":  # on the CPU known without fetching the model
        dtype = "float32" if device.type == "cpu" else resolve_dtype(dtype, source_of(model), model.revision)
    dtype = resolve_dtype(dtype, "", None)
    fingerprint = fingerprint_of(checked.config, checked.pruners, dtype)
    return Plan(**vars(checked), dtype=dtype, device=device, fingerprint=fingerprint)


def loads(checked: Checked) -> list[str]:
    """In words what a run would load: the model, and the texts that it reads."""
    config, model = checked.config, checked.config.model
    source = next(f"{k} {v}" for k in ("packaged", "trained", "hub_id", "path") if (v := getattr(model, k)) is not None)
    found = [f"model {source}" + (f" @ {model.revision}" if model.revision else "") + f" in {model.dtype}"]
    if checked.calibrates:
        calibration = config.calibration
        size = f"{calibration.n_sequences or 'all'} x {calibration.seq_len or 'all'} tokens"
        found.append(f"calibration {calibration.path or calibration.name}, {size}")
    if config.evaluation.name != "none":
        found.append(f"evaluation {config.evaluation.path or config.evaluation.name}")
    return found


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


def _require_one_model(model: ModelConfig) -> None:
    """Where the model comes from is said once, and how it is laid out in words."""
    sources = ("packaged", "trained", "hub_id", "path")
    given = [name for name in sources if getattr(model, name) is not None]
    if model.name == "local" and model.path is None:
        raise DassError("model=local needs a folder: give `model.path=DIR`.")
    if len(given) != 1:
        raise DassError(f"model={model.name} must set one of {', '.join(sources)}; it sets {given or 'none'}.")
    words = model.projections
    if words is not None and not (isinstance(words, dict) and all(isinstance(word, str) for word in words.values())):
        raise DassError("The projections must be {gate: REGEX, up: REGEX, down: REGEX, dense: REGEX}.", field="model.projections")


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
