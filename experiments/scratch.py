"""What a run has for itself while it is at work: the claim that nobody else does it, and a folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from glob import escape
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dass.claims import Claim, claimed
from dass.distributed import rank
from dass.records import record_path
from dass.resume import LOSSES, STATE
from dass.training import checkpoint

LATER = "DASS_LATER"
"""A variable of the environment of those runs of a sweep that are launched once more, when the others are through."""


def claimed_run(results_dir: Path, run_id: str) -> AbstractContextManager[Claim | None]:
    """The claim on a run, waited for; None where a sweep can do its other runs before. The first process has it."""
    if rank() > 0:
        return nullcontext(Claim(_claim_path(results_dir, run_id), ""))
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return claimed(_claim_path(results_dir, run_id), wait=not sweeping or LATER in os.environ)


@contextmanager
def scratch_folder(results_dir: Path, run_id: str, claim: Claim) -> Iterator[Path]:
    """Where a run keeps what it goes on from if it is killed, and what is too large for the memory.

    It goes when the run is done, or has nothing to go on from; so do those of other runs that nobody is at. Of several
    processes the first one sees to it.
    """
    if rank() > 0:
        yield results_dir / f".{run_id}"
        return
    for other in {path.name[1:].partition(".")[0] for path in results_dir.glob(".*")} - {run_id}:
        with claimed(_claim_path(results_dir, other), wait=False) as free:
            if free is not None and free.owner:
                _clear(results_dir / f".{other}", is_done=record_path(results_dir, other).is_file())
                _drop_unfinished(results_dir, other)
    if claim.owner:
        _drop_unfinished(results_dir, run_id)
    # without claims another process may be at the same run
    folder, is_done = results_dir / (f".{run_id}" if claim.owner else f".{run_id}.{os.getpid()}"), False
    try:
        yield folder
        is_done = True
    finally:
        if not claim.owner or claim.is_held():
            _clear(folder, is_done)


def _clear(folder: Path, is_done: bool) -> None:
    """Remove the folder of a run that is done, or that has nothing to go on from."""
    if is_done or not any((folder / name).is_file() for name in (STATE, LOSSES, checkpoint.STATE)):
        shutil.rmtree(folder, ignore_errors=True)


def _drop_unfinished(results_dir: Path, run_id: str) -> None:
    """Remove what a process that was killed had written of a record, see `write_atomically`."""
    for path in results_dir.glob(f".{escape(record_path(results_dir, run_id).name)}.*"):
        path.unlink(missing_ok=True)


def _claim_path(results_dir: Path, run_id: str) -> Path:
    return results_dir / f".{run_id}.claim"
