"""What a run leaves besides its record, the pruned model with its card and the masks; and whether it is there."""

import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from transformers import PreTrainedModel

from dass.audit import facts_of
from dass.data.catalogue import MODELS, find
from dass.errors import DassError
from dass.folders import is_saved, read_seal, require_own_folder
from dass.models import resolve_dtype
from dass.pruning.adaptive import AdaptivePruner
from dass.records import file_sha256, read_record, record_path, require_writable
from dass.saving import model_card, save_model, source_licence, write_card
from dass.sparsity import MASKS_FILE, PackedMasks, require_own_masks
from dass.streaming import Shelf
from experiments.fingerprint import source_of
from experiments.public import public_override
from experiments.resolve import Plan
from report.reading import runs_of


def destination(folder: str, run_id: str) -> Path:
    """Where a run writes its model or masks: into the folder itself, or in a sweep into one of its own inside it."""
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return Path(folder).expanduser() / run_id if sweeping else Path(folder).expanduser()


def command_of() -> str:
    """The command that makes this run alone, without the places of this machine."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join(["python", "-m", "experiments.prune", *map(public_override, overrides)])


def is_ready(plan: Plan, label: str) -> bool:
    """Whether a run is done, which is said; if not, DassError where what it leaves could not be written."""
    for folder in (plan.config.results_dir, plan.config.save_model, plan.config.masks):
        if folder is not None:
            require_writable(Path(folder))
    if is_skipped(plan, label):
        return True
    if plan.config.save_model is not None:
        require_own_folder(destination(plan.config.save_model, plan.run_id))
    if plan.config.masks is not None:
        require_own_masks(destination(plan.config.masks, plan.run_id))
    return False


def is_skipped(plan: Plan, label: str) -> bool:
    """Whether a run is left out because it is done, which is said."""
    if plan.config.rerun or not is_done(plan):
        return False
    path = record_path(Path(plan.config.results_dir), plan.run_id)
    print(f"{label}: already done, skipping: {path} (rerun=true runs it again)")
    return True


def is_done(plan: Plan) -> bool:
    """Whether the record is there and sound, and the model and masks that are asked for are there and whole."""
    try:
        record = read_record(record_path(Path(plan.config.results_dir), plan.run_id))
    except DassError:
        return False
    return not record["failed"] and bool(runs_of([record])) and is_written(plan, record)


def is_written(plan: Plan, record: dict[str, Any]) -> bool:
    """Whether the model and the masks that are asked for are there, and are those that the record speaks of."""
    saved, masks, files = plan.config.save_model, plan.config.masks, dict(record["files"])
    of_masks = files.pop(MASKS_FILE, None)
    if saved is not None:
        folder = destination(saved, plan.run_id)
        held = read_seal(folder)
        if held is None or not files or not files.items() <= held[1].items() or not is_saved(folder, plan.run_id):
            return False
    if masks is None:
        return True
    path = destination(masks, plan.run_id) / MASKS_FILE
    return path.is_file() and of_masks == file_sha256(path)


def save_masks(plan: Plan, masks: PackedMasks, record: dict[str, Any]) -> None:
    """Write the masks where they are asked for, and their checksum into the record."""
    if plan.config.masks is not None:
        provenance = {key: record[key] for key in ("id", "config", "git", "versions")}
        path = masks.write(destination(plan.config.masks, plan.run_id), provenance)
        record["files"][MASKS_FILE] = file_sha256(path)


def save(plan: Plan, model: PreTrainedModel, shelf: Shelf | None, record: dict[str, Any]) -> None:
    """Write the model where it is asked for, and its checksums into the record."""
    config = plan.config
    if config.save_model is not None:
        source, revision = source_of(config.model), config.model.revision
        folder, dtype = destination(config.save_model, plan.run_id), resolve_dtype(config.model.dtype, source, revision)
        card = card_of(plan, source, record)
        record["files"] |= save_model(model, folder, card, plan.run_id, dtype, source, revision, shelf=shelf)


def write_metrics(plan: Plan, source: str, record: dict[str, Any]) -> None:
    """Put what was measured since into the model card of the saved model."""
    write_card(destination(str(plan.config.save_model), plan.run_id), card_of(plan, source, record), plan.run_id)


def card_of(plan: Plan, source: str, record: dict[str, Any]) -> str:
    """The model card of a run."""
    config, sparsity = plan.config, record["sparsity"]
    facts = {"method": str(config.method["name"])}
    for pruner in plan.pruners.values():
        axes: dict[str, dict[str, None]] = {}
        for one in sparsity["projections"].values():
            axes.setdefault(one["role"], {})[one["axis"]] = None
        values = (f"{name}={value}" for name, value in pruner.method.all_parameters().items())
        chosen = pruner.candidates if isinstance(pruner, AdaptivePruner) else None
        facts["method"] += f", for each MLP one of {', '.join(chosen)}" if chosen else "".join(f", {v}" for v in values)
        facts["pattern"] = str(pruner.method.pattern)
        facts["axis"] = ", ".join(f"{role}: {' or '.join(found)}" for role, found in axes.items())
        facts["order of the neurons"] = pruner.method.order
        facts["update"] = pruner.method.update
    facts["zeros"] = ", ".join(f"{sparsity[name]:.4f} of {name}" for name in ("targeted", "mlp", "linear", "total"))
    facts |= facts_of(record["audit"]) if "audit" in record else {}
    facts["fingerprint"] = plan.run_id
    packaged = find(config.model.packaged, MODELS).hub_id if config.model.packaged else None
    return model_card(
        name=f"{config.model.name} pruned by {config.method['name']}" if plan.pruners else config.model.name,
        base_model=config.model.hub_id or packaged or config.model.name,
        licence=source_licence(source, config.model.revision),
        command=record["command"],
        facts=facts,
        metrics=record["metrics"],
    )
