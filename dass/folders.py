"""Folders that appear whole or not at all, and are known by their seal.

The seal, `dass.json`, holds the fingerprint of what a folder is of and the SHA-256 of every other file in it. A folder
is ours by its seal alone; one that was changed since, or that holds anything else, is never touched.
"""

import contextlib
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dass.errors import DassError
from dass.records import file_sha256, write_atomically

SEAL = "dass.json"


def is_saved(folder: Path, fingerprint: str) -> bool:
    """Whether a folder is of this fingerprint, and all that was written into it is still there and unchanged."""
    held = read_seal(folder)
    return held is not None and held[0] == fingerprint and _fits(folder, held[1])


def read_seal(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The fingerprint of a folder and the SHA-256 of its files by name, unchecked; None where it has no seal."""
    try:
        held = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return str(held["fingerprint"]), dict(held["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_seal(folder: Path, fingerprint: str, files: dict[str, str]) -> None:
    """Seal a folder with these checksums."""
    write_atomically(folder / SEAL, json.dumps({"fingerprint": fingerprint, "files": files}, indent=1) + "\n")


def require_own_folder(folder: Path) -> None:
    """Raise DassError if a folder is there and is not one of ours as we wrote it; an empty one will do."""
    linked = folder.is_symlink()
    if not linked and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        return
    held = None if linked else read_seal(folder)
    if held is None or not _fits(folder, held[1]):
        why = "is not one that this project wrote, or was changed since"
    elif foreign := [name for name in _contents(folder) if name not in held[1]]:
        why = f"also holds {foreign[0]}"
    else:
        return
    raise DassError(f"{folder} would be replaced, but it {why}: choose another folder, or remove it yourself.")


@contextlib.contextmanager
def whole_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """A new folder to write into, which is sealed and takes its place at the end, where there may be one of ours.

    The new one is complete before the old one goes, and an interruption leaves one of them under the name.
    """
    folder = folder.absolute()
    require_own_folder(folder)
    with temporary_beside(folder) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that nobody else may read
        write_seal(new, fingerprint, {name: file_sha256(new / name) for name in _contents(new)})
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            _put_back(old, folder)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of a path, removed at the end, as is what killed processes left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        if not _runs(leftover.name.removeprefix(prefix).split(".")[0]):
            _put_back(leftover / "old", path)
            shutil.rmtree(leftover, ignore_errors=True)
    prefix += f"{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def _contents(folder: Path) -> list[str]:
    """The names of all files in a folder but the seal, relative to it."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name for name in names if name != SEAL]


def _fits(folder: Path, files: dict[str, str]) -> bool:
    return all((folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in files.items())


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def _runs(pid: str) -> bool:
    """Whether a process of this machine runs, as far as one can tell."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True
