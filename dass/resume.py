"""What a run that was killed goes on from: finished blocks, what enters the next one, and what is known so far.

A run keeps it in a folder of its own while it prunes, at most once a minute and for at most a twentieth of its time.
Everything in it has a checksum: where one does not fit, the run begins anew, which loses time and nothing else.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import Tensor

from dass.errors import DassError, one_line
from dass.pruning.blocks import Block
from dass.records import file_sha256, write_atomically
from dass.shards import write_tensors
from dass.streaming import block_path, weights_of

STATE, LOSSES, TENSORS = "state.json", "losses.json", "beside-{}.safetensors"
EVERY = 60.0
"""Seconds between two writes, at least; so shorter runs write none."""
SHARE = 0.05
"""Of a run's time, that writing may take."""


class State(BaseModel):
    """How far a run has come."""

    model_config = ConfigDict(extra="forbid", strict=True)

    next: int = Field(ge=1)
    """Index of the block to go on with; the number of blocks where all are done."""
    seconds: float = Field(ge=0)
    """Of the walk, so far."""
    facts: dict[str, Any]
    """Of the caller."""
    files: dict[str, str]
    """SHA-256 by name."""
    by: str
    """What it was computed by; see `Kept`."""


class Losses(BaseModel):
    """How far an evaluation has come."""

    model_config = ConfigDict(extra="forbid", strict=True)

    size: int
    """Windows or choices at a time."""
    losses: dict[str, list[float]]
    """Of windows by the text's name, or log-likelihoods of choices by the task's [nats]."""
    by: str
    """As in `State`."""


@dataclass
class Kept:
    """The folder of a run, and when it was written last."""

    folder: Path
    by: str
    """What computes here: machine, packages, code. What another has computed is not gone on with."""
    state: State | None = None
    """What was found there, whole."""
    _since: float = field(default_factory=lambda: time.perf_counter())
    _cost: float = 0.0
    _files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look for what an earlier process left."""
        self.state = _read(self.folder, self.by)
        if self.state is None and (self.folder / STATE).is_file():
            self.forget()
            return
        self._started = self._since - (self.state.seconds if self.state is not None else 0.0)
        self._files = {} if self.state is None else dict(self.state.files)

    def tensors(self, state: State) -> dict[str, Tensor]:
        """What lies beside the blocks."""
        name = TENSORS.format(state.next)
        return load_file(self.folder / name) if name in state.files else {}

    def losses(self, size: int) -> dict[str, list[float]]:
        """Of the windows, or of the tasks, that an earlier process scored, so many at a time."""
        try:
            found = Losses.model_validate_json(_checked(self.folder / LOSSES))
            return found.losses if (found.size, found.by) == (size, self.by) else {}
        except (OSError, ValueError):
            return {}

    def keep_losses(self, size: int, losses: dict[str, list[float]]) -> None:
        """Write the losses of the windows, or of the tasks, that are scored, if it is time to."""
        if time.perf_counter() - self._since >= EVERY:
            with contextlib.suppress(OSError, DassError):
                self.folder.mkdir(parents=True, exist_ok=True)
                _write_checked(self.folder / LOSSES, Losses(size=size, losses=losses, by=self.by).model_dump_json())
            self._since = time.perf_counter()

    def forget(self) -> None:
        """Begin anew: what is there does not fit this process, nor do the losses of what came of it."""
        self.state, self._files, self._started = None, {}, self._since
        for name in (STATE, LOSSES):
            (self.folder / name).unlink(missing_ok=True)

    def restore(self, block: Block) -> None:
        """Give a finished block, in memory, the weights that it had."""
        weights = load_file(block_path(self.folder, block))
        for name, parameter in block.module.named_parameters():
            parameter.data.copy_(weights[f"{block.name}.{name}"])

    def is_due(self) -> bool:
        """Whether it is time to write how far the run has come."""
        return time.perf_counter() - self._since >= max(EVERY, self._cost / SHARE)

    def keep(
        self,
        index: int,
        blocks: list[Block],
        tensors: Callable[[], dict[str, Tensor]],
        facts: Callable[[], dict[str, Any]],
        stored: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Write how far the run has come.

        Args:
            index: of the next block; those before it are finished.
            blocks: of the model; those that lie on disk already are only looked at.
            tensors, facts: give what else is to be known.
            stored: how a weight, by its name, is written.
        """
        started = time.perf_counter()
        found = tensors()
        try:
            self._write(index, blocks, found, facts(), stored)
        except (OSError, DassError) as error:  # a full disk, say: the run itself can go on
            print(f"note: how far the run has come could not be kept: {one_line(error)}", file=sys.stderr)
        self._since = time.perf_counter()
        self._cost = self._since - started

    def _write(
        self,
        index: int,
        blocks: list[Block],
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        stored: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {name: sha256 for name, sha256 in self._files.items() if not fnmatch(name, TENSORS.format("*"))}
        for block in blocks[:index]:
            path = block_path(self.folder, block)
            if path.name not in files:
                if not all(p.is_meta for p in block.module.parameters()):
                    write_tensors(path, weights_of(block, stored))
                files[path.name] = file_sha256(path)
        if tensors:
            path = self.folder / TENSORS.format(index)
            write_tensors(path, tensors)
            files[path.name] = file_sha256(path)
        state = State(next=index, seconds=time.perf_counter() - self._started, facts=facts, files=files, by=self.by)
        _write_checked(self.folder / STATE, state.model_dump_json())
        self._files = files
        for path in self.folder.glob(TENSORS.format("*")):
            if path.name not in files:
                path.unlink()


def _read(folder: Path, by: str) -> State | None:
    """How far a run has come, or None where nothing can be gone on with; a note where something was there."""
    path, why = folder / STATE, "is damaged"
    try:
        if not path.is_file():
            return None
        state = State.model_validate_json(_checked(path))
        if all(Path(name).name == name and file_sha256(folder / name) == of for name, of in state.files.items()):
            if state.by == by:
                return state
            why = "is of another machine or version"
    except (OSError, ValueError, DassError):  # any bytes may be there
        pass
    print(f"note: what an earlier run left in {folder} {why}, so it begins anew", file=sys.stderr)
    return None


def _write_checked(path: Path, text: str) -> None:
    write_atomically(path, hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def _checked(path: Path) -> str:
    """A text as `_write_checked` wrote it; ValueError where it is another."""
    checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
    if checksum != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError("damaged")
    return text
