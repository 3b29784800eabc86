"""What a sweep was to run: one JSON file beside its records, from which a report tells what is missing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dass.errors import DassError, one_line, told
from dass.record_schema import Config
from dass.records import paths_in, read_json, write_atomically
from dass.schema_types import in_words

FOLDER = "manifests"  # inside that of the records
STRICT = ConfigDict(strict=True)  # no word is taken for a number


@dataclass(frozen=True, config=STRICT)
class PlannedRun:
    """One run of a sweep."""

    fingerprint: str | None  # of its record; None where it is not known, as of a model that cannot be read here
    config: dict[str, Any]  # the composed one
    calibrates: bool  # whether its method reads calibration tokens
    why: str | None  # the reason why there is no record, in a sentence; None: none is known


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """The runs of a sweep, in order, and how they are reported."""

    name: str  # of the file, without its suffix
    experiment: str | None
    scale: str | None  # of the experiment: small or paper
    report: str  # a kind of report
    command: list[str]  # the overrides that the sweep was launched with
    runs: list[PlannedRun]


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest of a sweep whose records lie in `folder`."""
    path = folder / FOLDER / f"{manifest.name}.json"
    write_atomically(path, json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read one manifest; a missing, corrupt or foreign file raises DassError that names it."""
    kinds = (OSError, ValueError, TypeError)
    with told(f"{path} is not a readable manifest", "launch its sweep again", *kinds), in_words():
        tree = read_json(path)
        if not isinstance(tree, dict) or not isinstance(tree.get("runs"), list):
            raise ValueError("it has no runs")
        manifest = Manifest(**tree | {"runs": [PlannedRun(**run) for run in tree["runs"]]})
        for config in filter(None, (run.config for run in manifest.runs)):
            Config.model_validate(config)
    if manifest.name != path.stem:
        raise DassError(f"{path} is the manifest of {one_line(manifest.name)}: give it back its name.")
    return manifest


def read_manifests(folder: Path) -> list[Manifest]:
    """All manifests beside the records in `folder`, in the order of their names; DassError names a malformed one."""
    return [read_manifest(path) for path in paths_in(folder / FOLDER, ".json")]
