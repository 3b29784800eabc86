"""Settings that somebody gave and that this run does not read: a note each, so that nobody believes in a change."""

import sys

from dass.data.sources import SOURCES
from dass.pruning.masks import NM
from dass.pruning.pruner import BlockPruner
from experiments.fingerprint import hub_text
from experiments.methods import is_idle
from experiments.resolve import Plan

_said: set[str] = set()  # in a sweep each is said once


def note_idle(plan: Plan, overrides: list[str]) -> None:
    """Print a line on stderr for each override without an effect.

    Args:
        overrides: what was given, such as `calibration.seed=1`.
    """
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        why = _why_idle(plan, *key.partition(".")[::2])
        if why is not None and key not in _said:
            _said.add(key)
            print(f"note: {key} has no effect: {why}", file=sys.stderr)


def _why_idle(plan: Plan, group: str, name: str) -> str | None:
    """Why a setting has no effect in this run; None where it has one."""
    config, method = plan.config, plan.config.method["name"]
    scored = config.evaluation.name
    if group == "calibration" and not plan.calibrates:
        return f"{method} reads no calibration tokens"
    if group == "seed" and (not plan.calibrates or SOURCES[config.calibration.name].tokens):
        return "no calibration tokens are drawn"
    if not plan.pruners and (
        group in ("sparsity", "targets", "exclude", "masks") or (group, name) == ("model", "projections")
    ):
        return f"{method} prunes nothing"
    if (group, name) == ("model", "revision") and config.model.hub_id is None:
        return "the model is not read from the hub"
    if group == "finetune" and not config.finetune.steps:
        return "nothing is trained on: set finetune.steps"
    if group == "tracking" and name and config.tracking.name == "none":
        return "nothing is tracked"
    if group == "method":
        return _why_idle_in_method(plan, name)
    if group == "evaluation" and name and scored == "none":
        return "nothing is evaluated"
    if group == "evaluation" and scored.startswith("zero_shot"):
        reasons = dict.fromkeys(("n_windows", "seq_len"), "zero-shot tasks have items, not windows: set limit")
        return (reasons | dict.fromkeys(("revision", "field"), "zero-shot tasks are read as they are defined")).get(
            name
        )
    if (group, name) == ("evaluation", "limit"):
        return "it limits the items of zero-shot tasks, and a perplexity has windows: set n_windows"
    if group in ("calibration", "evaluation") and name == "revision" and hub_text(getattr(config, group)) is None:
        return f"the text is not read from the hub but from {group}.path"
    return None


def _why_idle_in_method(plan: Plan, name: str) -> str | None:
    """The same of a setting of the method."""
    words, pruner = plan.config.method, next(iter(plan.pruners.values()), None)
    if name == "order_seed" and words.get("order", "released") in ("released", "spread"):
        return "this order draws nothing"
    if not isinstance(pruner, BlockPruner) or plan.compares:
        return None
    if is_idle(name, words):
        return f"neither the criterion {words['criterion']} nor the update {words.get('update', 'none')} has it"
    if name == "block_size" and (isinstance(pruner.method.pattern, NM) or words["criterion"] != "obs"):
        return "it is the group of an unstructured comparison while obs is sweeping"
    return None
