"""The one identity of a run: a hash over what determines its result, and only what the run uses.

Values that equal the documented `BASELINE` are left out, so that a new setting with a default changes no old identity.
What a name hides is in it: contents of files, revisions of the hub, the code of criterion and update, and `NUMERICS`.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass.data import assets
from dass.data.sources import find_source
from dass.evaluation import door
from dass.models import model_contents
from dass.pruning import NUMERICS
from dass.pruning.criteria import CRITERIA
from dass.pruning.method import BlockPruner
from dass.pruning.update import UPDATES
from dass.records import identity_of
from dass.training.tiny import recipe_identity, trained_model
from experiments.schema import CalibrationConfig, EvaluationConfig, ModelConfig, PruneConfig

BASELINE: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "method": {"update": "none", "parameters": {}, "targets": "mlp", "exclude": None, "projections": {}}
    | {"rounded": True},
    "calibration": {"bos": "tokenizer", "join": False, "seed": 0, "n_sequences": None, "seq_len": None}
    | {"min_expert_tokens": None},
    "evaluation": {"bos": "tokenizer", "seq_len": None, "n_windows": None, "limit": None},
}
"""What is not hashed: a value that is not named here is."""


@dataclass(frozen=True)
class Fingerprint:
    """What determines a run, part by part."""

    parts: dict[str, dict[str, Any] | None]  # model, method, calibration, evaluation; None where the run has none

    @property
    def id(self) -> str:
        """16 hex digits for the whole."""
        return identity_of({"numerics": NUMERICS, **{name: hashed(name, part) for name, part in self.parts.items()}})

    def as_dict(self) -> dict[str, Any]:
        """For the record: 16 hex digits for each part, so that runs are compared that read the same."""
        parts = {name: part and identity_of(hashed(name, part)) for name, part in self.parts.items()}
        return {"numerics": NUMERICS, **parts}


def hashed(name: str, part: dict[str, Any] | None) -> dict[str, Any]:
    """A part without the values of the baseline."""
    baseline = BASELINE[name]
    return {key: value for key, value in (part or {}).items() if key not in baseline or baseline[key] != value}


def fingerprint_of(config: PruneConfig, pruners: dict[str, BlockPruner], dtype: str) -> Fingerprint:
    """The identity of a run that computes in `dtype`; DassError where a file that it names is not there."""
    prunings = {name: _method(config, name, pruner) for name, pruner in pruners.items()}
    compared = {name: hashed("method", part) for name, part in prunings.items()}
    method = {"compared": compared} if len(prunings) > 1 else next(iter(prunings.values()), None)
    calibrates = any(map(needs_calibration, pruners.values()))
    return Fingerprint(
        {
            "model": model_identity(config.model) | {"dtype": dtype},
            "method": method,
            "calibration": _calibration(config.calibration, config.seed) if calibrates else None,
            "evaluation": None if config.evaluation.name == "none" else _evaluation(config.evaluation),
        }
    )


def needs_calibration(pruner: BlockPruner) -> bool:
    """Whether a method reads any statistics."""
    return any(pruner.method.needs_for(role) for role in pruner.roles)


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """Its contents, or its id and revision, but not its place."""
    if model.packaged is not None:
        return {"packaged": model.packaged, "sha256": assets.packaged_sha256(model.packaged)}
    if model.trained is not None:  # a recipe gives the same weights on one machine only
        contents = _contents(trained_model(model.trained))
        return {"trained": recipe_identity(model.trained), "contents": contents}
    if model.path is not None:
        return {"contents": _contents(Path(model.path).expanduser())}
    return {"hub_id": model.hub_id, "revision": model.revision}


def _contents(folder: Path) -> str:
    """What a folder holds; hashed once in a sweep, unless a file has changed since."""
    stamps = (path.stat() for path in sorted(folder.rglob("*"))) if folder.is_dir() else ()
    return _contents_at(folder, tuple((stamp.st_ino, stamp.st_size, stamp.st_mtime_ns) for stamp in stamps))


@functools.cache
def _contents_at(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> str:
    return model_contents(folder)


def code_of(function: Callable[..., Any]) -> str:
    """16 hex digits for the code of a function and of what it calls in its own module, without comments and words.

    Who edits an equation gets another run; who edits a docstring does not.
    """
    module, sources, waiting = inspect.getmodule(function), {}, [function]
    while waiting:
        one = waiting.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        sources[one.__qualname__] = ast.unparse(tree)
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            used = getattr(module, name, None)
            if inspect.isfunction(used) and used.__module__ == function.__module__ and used.__qualname__ not in sources:
                waiting.append(used)
            elif isinstance(used, int | float | str):
                sources[name] = repr(used)
    return identity_of(sources)


def _method(config: PruneConfig, name: str, pruner: BlockPruner) -> dict[str, Any]:
    """What determines the pruned weights, besides the model and the calibration."""
    method = pruner.method
    criterion, update = CRITERIA.find(method.criterion), UPDATES.find(method.update)
    used = [criterion, *map(method.criterion_for, pruner.roles)]
    code = {entry.function.__name__: code_of(entry.function) for entry in used}
    defaults = criterion.parameters() | update.parameters()
    return {
        "name": name,
        "criterion": method.criterion,
        "axis": {role: method.axis.get(role, "wanda") for role in pruner.roles if role != "qkv" or role in method.axis},
        "update": method.update,
        "code": code | {f"{method.update} (update)": code_of(update.function)},
        "parameters": {key: value for key, value in method.all_parameters().items() if value != defaults[key]},
        "pattern": vars(method.pattern),
        "targets": pruner.targets,
        "exclude": pruner.exclude,
        "projections": dict(config.model.projections or {}),
        # what an update has changed is rounded to the source's dtype, unless another is asked for
        "rounded": method.update == "none" or config.model.dtype == "auto",
    }


def _calibration(calibration: CalibrationConfig, seed: int) -> dict[str, Any]:
    source = find_source(calibration.name, "calibration")
    read = _text(calibration, source.identity(calibration.path, calibration.revision))
    return read if source.tokens else read | {"seed": seed}


def _evaluation(evaluation: EvaluationConfig) -> dict[str, Any]:
    read = _text(evaluation, door.identity(evaluation.name, evaluation.path, evaluation.revision))
    whole_packaged_text = evaluation.name == "packaged_wiki" and evaluation.n_windows is None
    return read | ({"articles": assets.HELD_OUT_ARTICLES} if whole_packaged_text else {})


def _text(config: CalibrationConfig | EvaluationConfig, hidden: dict[str, Any]) -> dict[str, Any]:
    """Its settings, with what its name hides in the place of its path and revision."""
    rest = {key: value for key, value in vars(config).items() if key not in ("path", "revision")}
    return {"name": config.name} | hidden | rest


def source_of(model: ModelConfig) -> str:
    """What to load: a hub id or a folder, which for a packaged model is made on first need."""
    if model.packaged is not None:
        return str(assets.packaged_model(model.packaged))
    if model.trained is not None:
        return str(trained_model(model.trained))
    return str(Path(model.path).expanduser() if model.path is not None else model.hub_id)
