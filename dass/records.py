"""One JSON file per run: its identity, its file, and all of them as a table.

A record has the keys in `RECORD_KEYS`, and where they apply `experts` and `diagnostics`.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dass.errors import DassError, told

RECORD_KEYS: tuple[str, ...] = ("id", "identity", "determinants", "command", "config", "git", "versions", "machine")
RECORD_KEYS += ("stages", "sparsity", "metrics", "windows", "files", "failed")
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "hydra-core", "omegaconf", "gguf", "lm-eval")


def identity_of(determinants: dict[str, Any]) -> str:
    """16 hex digits (SHA-256) of what determines a result; the order of keys does not matter."""
    canonical = json.dumps(determinants, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8) so that a reader, or a kill at any moment, sees all of it or nothing."""
    with told(f"Cannot write {path}", "free space or choose another folder", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def require_writable(folder: Path) -> None:
    """Raise DassError, before hours of work, if the folder is a file or nothing can be written there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DassError(f"Nothing can be written to {folder}, because of {existing}: choose another folder.")


def record_path(results_dir: Path, run_id: str) -> Path:
    """Where the record of a run lies."""
    return results_dir / f"{run_id}.json"


def write_record(results_dir: Path, record: dict[str, Any]) -> Path:
    """Write a record under its identity; a NaN in it is refused, since JSON has none."""
    path = record_path(results_dir, record["id"])
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Read one record; a corrupt or foreign file raises DassError that names it."""
    with told(f"{path} is not a readable record", "delete it and run again", OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not set(RECORD_KEYS) <= set(record) or record["id"] != path.stem:
        raise DassError(f"{path} is JSON but not a record of this project: move it out of the records' folder.")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder in the order of their file names.

    A corrupt or foreign JSON file is named on stderr and left out; no record at all raises DassError.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except DassError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not records:
        raise DassError(f"No records in {folder}: run `python -m experiments.prune`, or name another folder.")
    return records


def git_state() -> dict[str, Any]:
    """The commit of this checkout and whether tracked files differ from it; nulls outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def package_versions() -> dict[str, str]:
    """Python and the packages that a number may depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def machine_description(device: torch.device) -> dict[str, Any]:
    """The machine in words and numbers; memory in GB (10^9 bytes)."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory, 1),
        "device": device.type,
        "gpu": gpu,
    }
