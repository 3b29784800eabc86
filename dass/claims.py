"""A claim on a piece of work, so that of several processes, of one machine or many, one does it at a time.

A claim is a folder that holds one file, whose name is its owner's. Only a rename decides: the folder is made elsewhere
and put in its place, which fails where there is one already. Its owner touches the file while it lives. Who waits looks
at it as often, and where nothing changed so many times, renames the file to its own name: one of those who wait
succeeds. No clock is compared with another's, and a file system needs neither locks nor exclusive creation.
"""

import contextlib
import errno
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dass.errors import DassError, one_line

BEAT = 10.0
"""Seconds between two signs of life of an owner, and between two looks at it."""
LOOKS = 12
"""Looks without a sign of life, after which an owner is dead."""
PATIENCE = 1000
"""Attempts at a claim that nobody has."""
HELD = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What says that another process has the claim, or was just about to take it."""


@dataclass
class Claim:
    """A claim that this process has, or does without where the file system knows none."""

    path: Path
    owner: str
    lost: bool = False
    """Whether another process took it over, because this one stood still for too long."""

    def is_held(self) -> bool:
        """Whether this process still has it."""
        self.lost = self.lost or not (self.path / self.owner).exists()
        return not self.lost

    def require(self) -> None:
        """Raise DassError if the claim is lost."""
        if self.owner and not self.is_held():
            raise DassError(f"This process stood still for so long that another has taken over {self.path}: leave it.")


@contextlib.contextmanager
def claimed(path: Path, wait: bool = True) -> Iterator[Claim | None]:
    """Have the claim at a path, which is given back at the end.

    Args:
        wait: until another process has given it back, or is dead; otherwise None stands for "it has it just now".
    """
    is_new = not path.parent.exists()
    try:
        claim = _acquire(path, wait)
    except OSError as error:
        print(
            f"note: {path.parent} takes no claims, so another process can do the same at the same time: "
            f"{one_line(error)}",
            file=sys.stderr,
        )
        yield Claim(path, "")
        return
    if claim is None:
        yield None
        return
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(claim, done), daemon=True)
    heart.start()
    try:
        yield claim
    finally:
        done.set()
        heart.join(BEAT)
        with contextlib.suppress(OSError):  # it may be another's by now
            os.unlink(path / claim.owner)
            path.rmdir()
            if is_new:  # a run that failed leaves no folder; one that holds its record stays
                path.parent.rmdir()


def _acquire(path: Path, wait: bool) -> Claim | None:
    owner, seen, looks, told = f"{_life(os.getpid())}-{uuid.uuid4().hex}", None, 0, False
    while True:
        sign = _sign_of_life(path)
        looks, seen = (looks + 1 if sign == seen else 0), sign
        if sign is None:
            taken = _put(path, owner)
            if looks > PATIENCE:
                raise OSError(errno.EIO, f"{path} can neither be taken nor is it anybody's")
        elif looks >= LOOKS or _is_dead(sign[0]):
            taken = _take_over(path, sign[0], owner)
        elif not wait:
            return None
        else:
            if not told:
                print(f"note: another process has {path}: waiting for it", file=sys.stderr)
            told, taken = True, False
            time.sleep(BEAT)
        if taken:
            for left in path.parent.glob(f"{path.name}.*"):  # of killed processes; a living one tries again
                shutil.rmtree(left, ignore_errors=True)
            return Claim(path, owner)


def _sign_of_life(path: Path) -> tuple[str, int] | None:
    """The owner of a claim, and when its file was touched by its own clock; None where there is no owner."""
    try:
        owner = next(iter(sorted(os.listdir(path))), None)
        if owner is None:
            return None
        with open(path / owner, "rb") as file:  # an opened file is asked of the server, a named one of a cache
            return owner, os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _put(path: Path, owner: str) -> bool:
    """Take a claim that nobody has; whether this process was the first."""
    new = path.with_name(f"{path.name}.{owner[-32:]}")
    try:
        new.mkdir(parents=True)
        (new / owner).touch()
        with contextlib.suppress(OSError):  # what a process left that was killed while it gave its claim back
            path.rmdir()
        os.rename(new, path)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if error.errno not in HELD:
            raise
        return False
    return True


def _take_over(path: Path, dead: str, owner: str) -> bool:
    """Take the claim of a dead owner; whether this process was the first."""
    try:
        os.rename(path / dead, path / owner)
    except FileNotFoundError:
        return False
    return True


def _beat(claim: Claim, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(claim.path / claim.owner)
        except FileNotFoundError:
            claim.lost = True
            return
        except OSError:  # the file system may come back
            continue


def _is_dead(owner: str) -> bool:
    """Whether an owner is known to be dead at once, because it was a process of this machine."""
    parts, own = owner.split("-"), _life(os.getpid()).split("-")
    if len(parts) != 5 or parts[:2] != own[:2] or not parts[2].isdecimal():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it is another user's
        return False
    return _life(int(parts[2])) != "-".join(parts[:4])


def _life(pid: int) -> str:
    """What no other process is called, on any machine: boot, name space, number and start; empty where it is unknown.

    Empty, too, of a process that is dead and only waits for its parent to notice.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        space = os.stat("/proc/self/ns/pid").st_ino
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else f"{boot}-{space}-{pid}-{numbers[18]}"
    except OSError:
        return ""
