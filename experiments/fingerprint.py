"""The one identity of a run: a hash over what determines its result, and only what the run uses.

Values that equal the documented `BASELINE` of `dass/fingerprint.py` are left out: a setting's default is named there.
What a name hides is in it: contents of files, revisions of the hub, the code of criterion and update, and `NUMERICS`.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from dass import hub
from dass.checkpoint import model_contents
from dass.code import code_of
from dass.data import assets
from dass.data.sources import SOURCES, Part, find_source
from dass.data.tokens import default_bos
from dass.errors import DassError
from dass.evaluation import door
from dass.fingerprint import Fingerprint, hashed
from dass.models import load_config, load_tokenizer
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.criteria import CRITERIA
from dass.pruning.heads import known_heads
from dass.pruning.order import ORDERS
from dass.pruning.update import UPDATES
from dass.records import identity_of, read_records
from dass.training.masked import train
from dass.training.stability import judged
from dass.training.tiny import model_folder, recipe_identity, trained_model
from experiments.methods import Pruner
from experiments.schema import CalibrationConfig, EvaluationConfig, ModelConfig, PruneConfig
from report.reading import runs_of

Settings = TypeVar("Settings", bound=Any)
"""Of an app that reads a model, a calibration and an evaluation, such as `PruneConfig`."""


def fingerprint_of(config: PruneConfig, pruners: Mapping[str, Pruner], dtype: str) -> Fingerprint:
    """The identity of a run that computes in `dtype`; DassError where a file that it names is not there.

    Of a model that another machine trained, and this one did not, that of the run whose record came from there.
    """
    config = pinned(config, calibrates(config, pruners))
    hidden = {part: text_identity(part, getattr(config, part)) for part in texts_read(config, pruners)}

    def with_model(contents: str | None) -> Fingerprint:
        return assembled(config, pruners, dtype, hidden | {"model": model_identity(config.model, contents)})

    trained = config.model.trained
    if trained is not None and not model_folder(trained).exists():
        known, done = _trained_elsewhere(Path(config.results_dir))
        contents = known.get(identity_of(recipe_identity(trained)))
        if contents and (found := with_model(contents)).id in done:
            return found
    return with_model(None)


@cache  # a sweep asks for each of its runs
def _trained_elsewhere(folder: Path) -> tuple[dict[str, str], set[str]]:
    """What the records of a folder tell of models that were trained here or elsewhere.

    Returns:
        By the identity of its recipe, the contents that most of them are of; and the runs that are done.
    """
    records: list[dict[str, Any]] = []
    with suppress(DassError):
        records = [run.record for run in runs_of(read_records(folder)) if run.record and not run.record["failed"]]
    models = [record["determinants"]["model"] for record in records]
    counts = Counter((identity_of(one["trained"]), one["contents"]) for one in models if "trained" in one)
    return dict(key for key, _ in reversed(counts.most_common())), {record["id"] for record in records}


def assembled(
    config: PruneConfig, pruners: Mapping[str, Pruner], dtype: str, hidden: Mapping[str, dict[str, Any]]
) -> Fingerprint:
    """The identity of pinned settings, given what the names of the model and of each text that is read hide."""
    parts: dict[str, dict[str, Any] | None] = {"model": hidden["model"] | {"dtype": dtype}}
    parts |= {"method": _methods(config, pruners), "calibration": None, "evaluation": None}
    for part in texts_read(config, pruners):
        text = getattr(config, part)
        rest = {key: value for key, value in vars(text).items() if key not in ("path", "revision")}
        found: dict[str, Any] = {"name": text.name} | hidden[part] | rest
        if part == "calibration" and not find_source(text.name, part).tokens:
            found["seed"] = config.seed
        if part == "evaluation" and text.name == "packaged_wiki" and text.n_windows is None:
            found["articles"] = assets.HELD_OUT_ARTICLES
        parts[part] = found
    return Fingerprint(parts)


def pinned(config: Settings, calibrates: bool) -> Settings:
    """The settings without what is only known outside of them.

    A commit stands in the place of each branch of the hub that is read, as it may move meanwhile, and where nothing
    says how a text begins, what the model wants.
    """
    model, calibration, evaluation = config.model, config.calibration, config.evaluation
    if model.hub_id is not None:
        model = replace(model, revision=hub.commit_of(model.hub_id, model.revision))
    if calibrates and (repository := hub_text(calibration)):
        calibration = replace(calibration, revision=hub.commit_of(repository, calibration.revision, "dataset"))
    if repository := hub_text(evaluation):
        evaluation = replace(evaluation, revision=hub.commit_of(repository, evaluation.revision, "dataset"))
    if (calibrates and calibration.bos is None) or (evaluation.name != "none" and evaluation.bos is None):
        bos = _bos(model)
        calibration = replace(calibration, bos=calibration.bos or bos)
        evaluation = replace(evaluation, bos=evaluation.bos or bos)
    return replace(config, model=model, calibration=calibration, evaluation=evaluation)


def _bos(model: ModelConfig) -> str:
    """Where the model wants a BOS token; a note on stderr tells of one that is not its tokenizer's doing."""
    source = source_of(model)
    bos = default_bos(load_config(source, model.revision), partial(load_tokenizer, source, model.revision))
    if bos != "tokenizer":
        print(f"note: {model.name} is a Gemma, whose texts begin with a BOS each: model.bos={bos}", file=sys.stderr)
    return bos


def hub_text(text: CalibrationConfig | EvaluationConfig) -> str | None:
    """The data set on the hub that a text is read from; None of other texts and of a file in its place."""
    found = SOURCES.get(text.name)
    return found.repository if found is not None and text.path is None else None


def needs_calibration(pruner: Pruner) -> bool:
    """Whether a method reads any statistics."""
    return isinstance(pruner, AdaptivePruner) or any(pruner.method.needs_for(role) for role in pruner.roles)


def calibrates(config: PruneConfig, pruners: Mapping[str, Pruner]) -> bool:
    """Whether a run reads a calibration text: for statistics, or to train on."""
    return any(map(needs_calibration, pruners.values())) or config.finetune.steps > 0


def texts_read(config: PruneConfig, pruners: Mapping[str, Pruner]) -> list[Part]:
    """Of calibration and evaluation those that a run reads a text for."""
    reads: dict[Part, bool] = {"calibration": calibrates(config, pruners)}
    reads["evaluation"] = config.evaluation.name != "none"
    return [part for part in reads if reads[part]]


def text_identity(part: Part, text: CalibrationConfig | EvaluationConfig) -> dict[str, Any]:
    """What the name, path and revision of a text stand for."""
    if part == "evaluation":
        return door.identity(text.name, text.path, text.revision)
    return find_source(text.name, part).identity(text.path, text.revision)


def model_identity(model: ModelConfig, contents: str | None = None) -> dict[str, Any]:
    """Its contents (those that are given, where its files lie elsewhere), or its id and revision, but not its place."""
    if model.packaged is not None:
        return {"packaged": model.packaged, "sha256": assets.packaged_sha256(model.packaged)}
    if model.trained is not None:  # a recipe gives the same weights on one machine only
        contents = contents or model_contents(trained_model(model.trained))
        return {"trained": recipe_identity(model.trained), "contents": contents}
    if model.path is not None:
        return {"contents": contents or model_contents(Path(model.path).expanduser())}
    return {"hub_id": model.hub_id, "revision": model.revision}


def _methods(config: PruneConfig, pruners: Mapping[str, Pruner]) -> dict[str, Any] | None:
    """What determines the pruned weights, or the comparison, besides the model and the calibration; None: nothing."""
    prunings = {name: _method(config, name, pruner) for name, pruner in pruners.items()}
    if config.finetune.steps:
        training = asdict(config.finetune) | {"code": [code_of(train), code_of(judged)]}
        prunings = {name: part | {"training": training} for name, part in prunings.items()}
    compared = {name: hashed("method", part) for name, part in prunings.items()}
    return {"compared": compared} if len(prunings) > 1 else next(iter(prunings.values()), None)


def _method(config: PruneConfig, name: str, pruner: Pruner) -> dict[str, Any]:
    """The same of one method."""
    if isinstance(pruner, AdaptivePruner):
        candidates = {one: hashed("method", _method(config, one, own)) for one, own in pruner.candidates.items()}
        return {"name": name, "candidates": candidates, "share": pruner.share}
    method = pruner.method
    criterion, update = CRITERIA.find(method.criterion), UPDATES.find(method.update)
    used = [criterion, *map(method.criterion_for, pruner.roles)]
    code = {entry.function.__name__: code_of(entry.function) for entry in used}
    order = {"name": method.order, "seed": method.order_seed, "code": code_of(ORDERS.find(method.order).function)}
    if method.order == "matched" and pruner.targets == "all":
        order["heads"] = code_of(known_heads)
    defaults = criterion.parameters() | update.parameters()
    return {
        "name": name,
        "criterion": method.criterion,
        "axis": {role: method.axis.get(role, "wanda") for role in pruner.roles if role != "qkv" or role in method.axis},
        "update": method.update,
        "code": code | {f"{method.update} (update)": code_of(update.function)},
        "parameters": {key: value for key, value in method.all_parameters().items() if value != defaults[key]},
        "pattern": vars(method.pattern),
        "order": None if method.order == "released" else order,
        "targets": pruner.targets,
        "exclude": pruner.exclude,
        "projections": dict(config.model.projections or {}),
        # what an update has changed is rounded to the source's dtype, unless another is asked for
        "rounded": method.update == "none" or config.model.dtype == "auto",
    }


def source_of(model: ModelConfig) -> str:
    """What to load: a hub id or a folder, which for a packaged model is made on first need."""
    if model.packaged is not None:
        return str(assets.packaged_model(model.packaged))
    if model.trained is not None:
        return str(trained_model(model.trained))
    return str(Path(model.path).expanduser() if model.path is not None else model.hub_id)
