"""What a sweep was to run: one JSON file beside its records, from which a report tells what is missing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dass.errors import DassError
from dass.records import write_atomically

FOLDER = "manifests"  # inside that of the records


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    fingerprint: str | None
    """Of its record; None where it is not known, as of a model that cannot be read here."""
    config: dict[str, Any]
    """The composed config."""
    calibrates: bool
    """Whether its method reads calibration tokens."""
    why: str | None
    """The reason why there is no record, in a sentence; None: none is known."""


@dataclass(frozen=True)
class Manifest:
    """The runs of a sweep, in order, and how they are reported."""

    name: str
    """Of the file, without its suffix."""
    experiment: str | None
    scale: str | None
    """Of the experiment: small or paper."""
    report: str
    """A kind of report."""
    command: list[str]
    """The overrides that the sweep was launched with."""
    runs: list[PlannedRun]


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest of a sweep whose records lie in `folder`."""
    path = folder / FOLDER / f"{manifest.name}.json"
    write_atomically(path, json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read one manifest; a missing, corrupt or foreign file raises DassError that names it."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**tree | {"runs": [PlannedRun(**run) for run in tree["runs"]]})
        keys = [manifest.report, *manifest.command, *(key for run in manifest.runs for key in run.config)]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("names are not words")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DassError(f"{path} is not a readable manifest ({error}): launch its sweep again.") from error
    if manifest.name != path.stem:
        raise DassError(f"{path} is the manifest of {manifest.name}: give it back its name.")
    return manifest


def read_manifests(folder: Path) -> list[Manifest]:
    """All manifests beside the records in `folder`, in the order of their names; DassError names a malformed one."""
    return [read_manifest(path) for path in sorted((folder / FOLDER).glob("*.json"))]
