"""One JSON file per run: its identity, its file, and all of them as a table.

A record has the keys in `RECORD_KEYS`, and where they apply `calibration`, `experts`, `training`, `diagnostics` and
`audit`.
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

from dass.errors import DassError, one_line, told

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
    """Raise DassError, before hours of work, if nothing can be written to the folder; it may not be there yet."""
    # a link to nothing, as an unmounted disk leaves it, is there, and cannot be written to
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    with told(f"Nothing can be written to {folder}, because of {existing}", "choose another folder", OSError):
        tempfile.TemporaryFile(dir=existing).close()


def record_path(results_dir: Path, run_id: str) -> Path:
    """Where the record of a run lies."""
    return results_dir / f"{run_id}.json"


def write_record(results_dir: Path, record: dict[str, Any]) -> Path:
    """Write a record under its identity; a NaN in it is refused, since JSON has none."""
    path = record_path(results_dir, record["id"])
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError where a key stands twice, or a number or a text cannot be written again."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("there is no such file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer, object_pairs_hook=_unique)
        require_writable_again(tree)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tree


def require_writable_again(tree: Any) -> None:
    """Raise ValueError where a tree holds NaN, or a text with half a character (a lone surrogate)."""
    json.dumps(tree, ensure_ascii=False, allow_nan=False).encode()


def read_record(path: Path) -> dict[str, Any]:
    """Read one record; a corrupt or foreign file raises DassError that names it."""
    with told(f"{path} is not a readable record", "delete it and run again", OSError, ValueError):
        record = read_json(path)
    if not isinstance(record, dict) or not set(RECORD_KEYS) <= set(record) or record["id"] != path.stem:
        raise DassError(f"{path} is JSON but not a record of this project: move it out of the records' folder.")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder in the order of their file names.

    A corrupt or foreign JSON file is named on stderr and left out; no record at all raises DassError.
    """
    records = []
    for path in paths_in(folder, ".json"):
        try:
            records.append(read_record(path))
        except DassError as error:
            print(f"left out: {one_line(error)}", file=sys.stderr)
    if not records:
        raise DassError(f"No records in {folder}: run `python -m experiments.prune`, or name another folder.")
    return records


def paths_in(folder: Path, suffix: str) -> list[Path]:
    """The paths of a folder that end in a suffix, by name; none where there is no folder."""
    with told(f"Cannot look into {folder}", "check the path", OSError):
        return sorted(folder.glob(f"*{suffix}"))


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {digits[:20]} is beyond 64 bits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def git_state() -> dict[str, Any]:
    """The commit of this checkout and whether its files differ, but for results; nulls outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno", "--", ":(top,exclude)results")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def code_sha256() -> str:
    """SHA-256 of this project's code as it lies on disk."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in ("dass", "experiments") for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


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
