"""The mirror of a run in wandb. The record is the truth; nothing is read back from here, and no failure costs a run."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dass.errors import DassError, first_line, one_line, told

if TYPE_CHECKING:
    import pandas as pd

ROOM = 50_000_000
"""Bytes that a run's files may take."""


@dataclass
class Mirror:
    """A wandb run, until its first failure; None: nothing is kept."""

    run: Any | None

    def do(self, work: Callable[[Any], object]) -> None:
        """Let some work be done with the run; whatever goes wrong is a note, and the end of the mirror."""
        try:
            if self.run is not None:
                work(self.run)
        except Exception as error:
            import wandb

            self.run = None
            _note(error)
            with suppress(Exception):
                wandb.teardown()  # else it fails once more, with a traceback, when Python ends

    def log(self, values: dict[str, Any]) -> None:
        """The values of one step."""
        self.do(lambda run: run.log(values))


@contextmanager
def track(name: str, project: str, group: str, run_id: str, folder: str, config: dict[str, Any]) -> Iterator[Mirror]:
    """A wandb run while the block lasts; a crash inside closes it as failed. A note where wandb cannot start.

    Args:
        name: `wandb`; `none` keeps nothing.
        group: one per sweep.
        folder: where offline runs are kept.
        config: the composed config.

    Raises:
        DassError: a name that is unknown, or that wandb does not take.
    """
    if name not in ("wandb", "none"):
        raise DassError(f"The tracking {name} is unknown: choose wandb or none.", field="tracking.name")
    mirror = Mirror(None if name == "none" else _started(project, group, run_id, folder, config))
    try:
        yield mirror
    except BaseException:
        mirror.do(partial(_finish, exit_code=1))
        raise
    mirror.do(_finish)


def _finish(run: Any, exit_code: int = 0) -> None:
    run.finish(exit_code=exit_code)
    shutil.rmtree(run.settings.log_dir, ignore_errors=True)  # wandb's own, which tell where the user's folders lie


def _started(project: str, group: str, run_id: str, folder: str, config: dict[str, Any]) -> Any | None:
    import wandb

    logging.raiseExceptions = False  # else each line that a full disk takes from wandb's log is a traceback
    mode: Any = os.environ.get("WANDB_MODE") or "offline"
    advice = "correct the setting of tracking or WANDB_MODE, or use tracking=none"
    try:
        os.makedirs(folder, exist_ok=True)
        if shutil.disk_usage(folder).free < ROOM:  # its own process would fill the screen with tracebacks
            raise OSError(f"no space left for its files in {folder}")
        # without what it would look for: names of the host, the user and their folders, git's remote and e-mail
        settings = wandb.Settings(silent=True, x_disable_meta=True, disable_git=True, disable_code=True, console="off")
        with told("wandb does not take what it is given", advice, wandb.errors.UsageError):
            return wandb.init(
                project=project, group=group, name=run_id, config=config, settings=settings, mode=mode, dir=folder
            )
    except DassError:
        raise
    except Exception as error:
        _note(error)
        return None


def _note(error: Exception) -> None:
    print(f"note: wandb keeps no more of this run ({one_line(first_line(error))}); its record does", file=sys.stderr)


def log_record(mirror: Mirror, record: dict[str, Any]) -> None:
    """Metrics, sparsity and stages in the summary, and the metrics as a table."""

    def log(run: Any) -> None:
        import pandas as pd  # 30 MB that few runs need

        for metric in record["metrics"]:
            run.summary[f"{metric['dataset']}/{metric['metric']}"] = metric["value"]
        for name in ("targeted", "mlp", "linear", "total"):
            run.summary[f"sparsity/{name}"] = record["sparsity"][name]
        for name, stage in record["stages"].items():
            run.summary[f"{name}/seconds"] = stage["seconds"]
        columns = ["dataset", "metric", "value", "stderr", "n", "seq_len"]
        _log_table(run, "metrics", pd.DataFrame(record["metrics"], columns=columns))

    mirror.do(log)


def log_report(mirror: Mirror, name: str, frame: "pd.DataFrame", figures: list[Path]) -> None:
    """The numbers and the figures (PNG files) that were made of an experiment's records."""

    def log(run: Any) -> None:
        import wandb

        _log_table(run, name, frame)
        for path in figures:
            run.log({f"{name}_figure": wandb.Image(str(path))})

    mirror.do(log)


def _log_table(run: Any, name: str, frame: "pd.DataFrame") -> None:
    """A table as a file of the run; wandb's own tables lie in the user's home, and the run would tell where."""
    import wandb

    run.log({name: wandb.Html(frame.to_html(index=False))})
