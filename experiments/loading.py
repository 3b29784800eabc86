"""What a run reads: fetched from the hub, loaded, and the same until its end."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from dass.checkpoint import require_contents
from dass.data.sources import SOURCES
from dass.evaluation.zero_shot import hub_items
from dass.models import load_model, model_folder
from dass.streaming import Shelf, load_streamed
from experiments.fingerprint import hub_text, source_of
from experiments.resolve import Plan


def load(plan: Plan, source: str, scratch: Path, in_memory: str) -> tuple[PreTrainedModel, Shelf | None]:
    """The model, whole, or with its blocks on a shelf in a folder; `in_memory`: see `brought`."""
    given = (source, plan.config.model.revision, plan.dtype, plan.device)
    if in_memory != "whole":
        return load_streamed(*given, scratch, plan.config.model.projections, by_expert=in_memory == "experts")
    return load_model(*given, plan.config.model.device_map), None


def require_unchanged(plan: Plan) -> None:
    """Raise DassError if a model folder was changed since the run's identity was told; on the CPU it is mapped."""
    contents = (plan.fingerprint.parts["model"] or {}).get("contents")
    if contents is not None:
        require_contents(Path(source_of(plan.config.model)), contents)


def downloads(plan: Plan) -> list[Callable[[], object]]:
    """What fetches the files of the hub that a run reads, unless they are in the cache; the model's come first."""
    config, found = plan.config, list[Callable[[], object]]()
    if config.model.hub_id is not None:
        found.append(partial(model_folder, config.model.hub_id, config.model.revision))
    if plan.calibrates and hub_text(config.calibration):
        found.append(partial(SOURCES[config.calibration.name].fetch, "calibration", config.calibration.revision))
    if hub_text(config.evaluation):
        found.append(partial(SOURCES[config.evaluation.name].fetch, "evaluation", config.evaluation.revision))
    return found + [hub_items] * (config.evaluation.name == "zero_shot")
