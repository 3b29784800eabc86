"""What no setting may be, whatever it means: numbers, names and paths that end in a traceback further on."""

import math
from pathlib import Path
from typing import Any

from dass.errors import DassError, one_line, told

NAMES = ("model.name", "method.name", "sparsity.name", "calibration.name", "evaluation.name")
PATHS = ("model.path", "calibration.path", "evaluation.path", "save_model", "masks", "results_dir", "tracking.folder")
WHOLE = 2**63


def require_plain(composed: dict[str, Any]) -> None:
    """Resolve `~` in the paths of a composed config, in place; DassError where a value can be nothing that is meant."""
    for key, value in _leaves("", composed):
        if isinstance(value, int) and not -WHOLE <= value < WHOLE:
            raise DassError(f"{key} has {len(str(abs(value)))} digits, too large a number: give a smaller one.", key)
        if isinstance(value, float) and not math.isfinite(value):
            raise DassError(f"{key}={value} is not a finite number: give one.", key)
        if isinstance(value, str):
            require_one_line(key, value)
        if key in NAMES and (not isinstance(value, str) or not value.strip()):
            raise DassError(f"{key}={value} is not a name: give a word.", key)
    for key in PATHS:
        *groups, last = key.split(".")
        place = composed
        for group in groups:
            place = place.get(group) or {}
        if isinstance(place.get(last), str):
            place[last] = usable_path(key, place[last])


def require_one_line(key: str, value: str) -> None:
    """Raise DassError where a text would break the line that it is printed in."""
    if one_line(value) != value:
        raise DassError(f"{key}={one_line(value)} holds a line break or a control character: remove it.", key)


def usable_path(key: str, path: str) -> str:
    """A path with `~` resolved; DassError where there can be none such on this system."""
    short = path if len(path) < 100 else f"{path[:60]}…"
    with told(f"{key}={short} cannot be a path here", "give another", OSError, RuntimeError, ValueError, field=key):
        if not path.strip():
            raise ValueError("it is empty")
        whole = Path(path).expanduser()
        whole.exists()
    return str(whole) if path.startswith("~") else path


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        keys = {name: one_line(f"{key}.{name}" if key else name) for name in value}
        return [leaf for name, one in value.items() for leaf in _leaves(keys[name], one)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in _leaves(key, one)]
    return [(key, value)]
