"""Folders that appear whole or not at all, and are known by their seal.

The seal, `dass.json`, holds the fingerprint of what a folder is of and the SHA-256 of every other file in it. A folder
is ours by its seal alone; one that was changed since, or that holds anything else, is never touched.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dass.errors import DassError, told
from dass.records import file_sha256, read_json, write_atomically

SEAL, LOCK = "dass.json", "lock"


def is_saved(folder: Path, fingerprint: str) -> bool:
    """Whether a folder is of this fingerprint, and all that was written into it is still there and unchanged."""
    held = read_seal(folder)
    return held is not None and held[0] == fingerprint and _fits(folder, held[1])


def read_seal(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The fingerprint of a folder and the SHA-256 of its files by name, unchecked; None where it has no seal."""
    try:
        held = read_json(folder / SEAL)
        return str(held["fingerprint"]), dict(held["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_seal(folder: Path, fingerprint: str, files: dict[str, str]) -> None:
    """Seal a folder with these checksums."""
    write_atomically(folder / SEAL, json.dumps({"fingerprint": fingerprint, "files": files}, indent=1) + "\n")


def seal(folder: Path, fingerprint: str) -> dict[str, str]:
    """Seal a folder with the checksums of all that it holds, by name, for everybody to read; returns them."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that nobody else may read
    files = {name: file_sha256(folder / name) for name in _contents(folder)}
    write_seal(folder, fingerprint, files)
    return files


def require_own_folder(folder: Path) -> None:
    """Raise DassError if a folder is there and is not one of ours as we wrote it; an empty one will do."""
    with told(f"Nothing can be written to {folder}", "choose another folder", OSError):
        with contextlib.suppress(FileNotFoundError):
            os.stat(_unfinished(folder))  # its name is longer
        why = _why_foreign(folder)
    if why:
        raise DassError(f"{folder} would be replaced, but it {why}: choose another folder, or remove it yourself.")


@contextlib.contextmanager
def whole_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """A new folder to write into, which takes its place at the end, where there may be one of ours.

    It is sealed then, unless it is already. The new one is complete before the old one goes, and an interruption leaves
    one of them under the name. DassError if something else is there, or another process is writing it.
    """
    folder = folder.absolute()
    with temporary_beside(folder, wait=False) as temporary:
        require_own_folder(folder)
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if read_seal(new) is None:
            seal(new, fingerprint)
        if not folder.exists():
            os.rename(new, folder)
            return
        _replace(folder, new, old)
        if why := _why_foreign(old):
            _replace(folder, old, new)
            raise DassError(f"{folder} would be replaced, but it {why} meanwhile: choose another folder.")


@contextlib.contextmanager
def temporary_beside(path: Path, wait: bool = True) -> Iterator[Path]:
    """A temporary folder on the file system of a path, for one process at a time, removed at the end.

    What a killed process left there is removed first, but for the folder that it had moved aside, which is put back.

    Args:
        wait: until another process is done; otherwise DassError says that there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _unfinished(path)
    with _locked(folder, wait) as free:
        if not free:
            raise DassError(f"Another process is writing {path} just now: wait for it, or choose another place.")
        try:
            _clear(folder, path)
            yield folder
        finally:
            _clear(folder, path)


def _unfinished(path: Path) -> Path:
    return path.parent / f".{path.name}.unfinished"


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """A folder that is there while this process has it; False if another one does. A lock ends with its process."""
    while True:
        with contextlib.suppress(FileExistsError):  # even if the folder is gone again by now
            os.mkdir(folder)
        try:
            file = open(folder / LOCK, "ab")  # noqa: SIM115  (it is closed below)
        except FileNotFoundError:  # another process was done with the folder, and has just removed it
            continue
        with file:
            if not _lock(file, wait):
                yield False
                return
            if not _is_at(file, folder / LOCK):
                continue
            try:
                yield True
            finally:
                with contextlib.suppress(OSError):  # the next process may have it already
                    os.unlink(folder / LOCK)
                    folder.rmdir()
            return


def _lock(file: IO[bytes], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise  # else a file system without locks, as some clusters have: no reason to lose a model
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path, path: Path) -> None:
    """Empty a temporary folder; what stood under the name before comes back if nothing took its place."""
    old = folder / "old"
    if old.exists() and not os.path.lexists(path):
        os.rename(old, path)
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != LOCK:
            left.unlink()


def _replace(folder: Path, new: Path, old: Path) -> None:
    """Put a new folder under the name of one that goes aside: at once, where the system can."""
    if _exchange(new, folder):
        os.rename(new, old)
    else:
        os.rename(folder, old)
        os.rename(new, folder)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step (Linux, most file systems); whether it was done."""
    try:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    except AttributeError:
        return False


def _why_foreign(folder: Path) -> str | None:
    """Why a folder is not ours to replace; None where it is, or is empty, or is not there."""
    linked = folder.is_symlink()
    if not linked and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        return None
    held = None if linked else read_seal(folder)
    if held is None or not _fits(folder, held[1]):
        return "is not one that this project wrote, or was changed since"
    foreign = [name for name in _contents(folder) if name not in held[1]]
    return f"also holds {foreign[0]}" if foreign else None


def _contents(folder: Path) -> list[str]:
    """The names of all files in a folder but the seal, relative to it."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name for name in names if name != SEAL]


def _fits(folder: Path, files: dict[str, str]) -> bool:
    try:
        return all((folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in files.items())
    except OSError:
        return False
