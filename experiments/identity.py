"""What determines a result, and only what a run uses: the source of its identity and of its place in a table.

The identity hashes the contents of the files that a run reads, and the dtype that it computes in. The place in a table
(`design_of`) is known from the config alone: a table finds its records on a machine that lacks the model, and whatever
device they were made on.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dass.data import assets
from dass.errors import DassError
from dass.evaluation.zero_shot import TASKS, item_files
from dass.models import folder_fingerprint
from dass.pruning.blocks import ATTENTION_ROLES, INPUT_OF_ROLE
from dass.pruning.method import BlockPruner
from dass.records import file_sha256, identity_of
from dass.training.tiny import recipe_identity, trained_model
from experiments.methods import pruners_of
from experiments.schema import EvaluationConfig, ModelConfig, PruneConfig, typed

PACKAGED_TEXTS = {"packaged_c4": "c4", "packaged_wiki": "wiki"}


def determinants(config: PruneConfig, pruners: dict[str, BlockPruner], contents: bool) -> dict[str, Any]:
    """Model, evaluation, and the pruning by each of the methods; the dtype is not in it.

    Args:
        pruners: by the name of the method; none for the dense model, several where methods are only compared.
        contents: identify local files and folders by what they hold, which must be there; else by their paths.
    """
    found: dict[str, Any] = {
        "model": _model(config.model, contents),
        "evaluation": _evaluation(config.evaluation, contents),
    }
    prunings = [_pruning(config, pruner, contents) for pruner in pruners.values()]
    if len(prunings) == 1:
        return found | prunings[0]
    return found | ({"compared": dict(zip(pruners, prunings, strict=True))} if prunings else {})


def design_of(config: PruneConfig) -> str:
    """16 hex digits for what a run is to do, whatever the contents of its local files and the dtype of its device."""
    return identity_of(determinants(config, pruners_of(config), contents=False))


def design_of_record(record: dict[str, Any]) -> str:
    """`design_of` the run that left a record; DassError where its config is not one of this version's."""
    known = OmegaConf.structured(PruneConfig)
    try:
        kept = {key: value for key, value in record["config"].items() if key in known}
        merged: DictConfig = OmegaConf.merge(known, kept)  # type: ignore[assignment]
        return design_of(typed(merged))
    except Exception as error:  # a foreign config can make OmegaConf raise anything
        raise DassError(f"The config of the record {record['id']} does not fit ({error}): run it again.") from error


def targeted_roles(pruner: BlockPruner) -> list[str]:
    """The roles that a method may prune."""
    return [role for role in INPUT_OF_ROLE if pruner.targets == "all" or role not in ATTENTION_ROLES]


def needs_calibration(pruner: BlockPruner) -> bool:
    """Whether a method reads any statistics."""
    return any(pruner.method.needs_for(role) for role in targeted_roles(pruner))


def _model(model: ModelConfig, contents: bool) -> dict[str, Any]:
    """Its contents, or its id and revision, but not its place."""
    sources = ("packaged", "trained", "hub_id", "path")
    given = [name for name in sources if getattr(model, name) is not None]
    if model.name == "local" and model.path is None:
        raise DassError("model=local needs a folder: give `model.path=DIR`.")
    if len(given) != 1:
        raise DassError(f"model={model.name} must set one of {', '.join(sources)}; it sets {given or 'none'}.")
    if model.packaged is not None:
        return {"packaged": model.packaged, "sha256": assets.packaged_sha256(model.packaged)}
    if model.trained is not None:
        recipe = recipe_identity(model.trained)  # it gives the same weights on one machine only
        return {"trained": recipe} | ({"folder": folder_fingerprint(trained_model(model.trained))} if contents else {})
    if model.path is not None:
        return {"folder": folder_fingerprint(Path(model.path)) if contents else model.path}
    return {"hub_id": model.hub_id, "revision": model.revision}


def _pruning(config: PruneConfig, pruner: BlockPruner, contents: bool) -> dict[str, Any]:
    """What determines the pruned weights."""
    method, roles = pruner.method, targeted_roles(pruner)
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
    if needs_calibration(pruner):
        calibration = config.calibration
        identity["calibration"] = {
            "name": calibration.name,
            "file": _file(calibration.name, calibration.path, "calibration", contents),
            "n_sequences": calibration.n_sequences,
            "seq_len": calibration.seq_len,
            "bos": calibration.bos,
            "join": calibration.join,
        }
        if calibration.name != "tokens_file":
            identity["seed"] = config.seed
    return identity


def _evaluation(evaluation: EvaluationConfig, contents: bool) -> dict[str, Any] | None:
    if evaluation.name == "none":
        return None
    if evaluation.name.startswith("zero_shot"):
        return {
            "name": evaluation.name,
            "data": _items(evaluation, contents),
            "limit": evaluation.limit,
            "bos": evaluation.bos,
        }
    if evaluation.seq_len is None:
        raise DassError(f"evaluation={evaluation.name} needs an explicit `evaluation.seq_len`: set it.")
    whole_packaged_text = evaluation.name == "packaged_wiki" and evaluation.n_windows is None
    return {
        "name": evaluation.name,
        "file": _file(evaluation.name, evaluation.path, "evaluation", contents),
        "seq_len": evaluation.seq_len,
        "n_windows": evaluation.n_windows,
        "bos": evaluation.bos,
    } | ({"articles": assets.HELD_OUT_ARTICLES} if whole_packaged_text else {})


def _items(evaluation: EvaluationConfig, contents: bool) -> Any:
    """The zero-shot items: those of a package, of local files, or (None) the hub's."""
    if evaluation.name == "zero_shot_packaged":
        return {task: assets.packaged_sha256(task) for task in TASKS}
    if evaluation.path is None or not contents:
        return evaluation.path
    return {task: file_sha256(file) for task, file in item_files("folder", evaluation.path).items()}


def _file(name: str, path: str | None, group: str, contents: bool) -> str | None:
    """A text that a calibration or evaluation reads: of a package, a local file, or (None) the hub's."""
    if name in PACKAGED_TEXTS:
        return assets.packaged_sha256(PACKAGED_TEXTS[name])
    if path is None or not contents:
        return path
    if not Path(path).is_file():
        raise DassError(f"{group}.path={path} is not a file: check the path.")
    return file_sha256(Path(path))
