"""Settings that somebody gave and that this run does not read: a note each, so that nobody believes in a change."""

import sys

from experiments.resolve import Plan

_said: set[str] = set()  # in a sweep each is said once


def note_idle(plan: Plan, overrides: list[str]) -> None:
    """Print a line on stderr for each override without an effect.

    Args:
        overrides: what was given, such as `calibration.seed=1`.
    """
    method, scored = plan.config.method["name"], plan.config.evaluation.name
    tasks = scored.startswith("zero_shot")
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        group, _, name = key.partition(".")
        why = None
        if group == "calibration" and not plan.calibrates:
            why = f"{method} reads no calibration tokens"
        elif not plan.pruners and (group in ("sparsity", "targets", "exclude")):
            why = f"{method} prunes nothing"
        elif group == "evaluation" and name and scored == "none":
            why = "nothing is evaluated"
        elif key == "evaluation.limit" and not tasks:
            why = "it limits the items of zero-shot tasks, and a perplexity has windows: set n_windows"
        elif key in ("evaluation.n_windows", "evaluation.seq_len") and tasks:
            why = "zero-shot tasks have items, not windows: set limit"
        elif key == "method.order_seed" and plan.config.method.get("order", "released") in ("released", "spread"):
            why = "this order draws nothing"
        if why is not None and key not in _said:
            _said.add(key)
            print(f"note: {key} has no effect: {why}", file=sys.stderr)
