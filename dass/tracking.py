"""The mirror of a run in wandb. The record is the truth; nothing is read back from here."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from dass.errors import DassError, first_line

ROOM = 50_000_000
"""Bytes that a run's files may take."""


@contextmanager
def track(name: str, project: str, group: str, run_id: str, folder: str, config: dict[str, Any]) -> Iterator[Any]:
    """A wandb run while the block lasts; a crash inside closes it as failed.

    Args:
        name: `wandb`; `none` gives a run that keeps nothing.
        group: one per sweep.
        folder: where offline runs are kept.
        config: the composed config.

    Raises:
        DassError: wandb cannot start.
    """
    if name not in ("wandb", "none"):
        raise DassError(f"The tracking {name} is unknown: choose wandb or none.", field="tracking.name")
    import wandb

    mode = os.environ.get("WANDB_MODE") or "offline"
    kept = {"mode": "disabled"} if name == "none" else {"mode": mode, "dir": folder}
    try:
        if name == "wandb":
            os.makedirs(folder, exist_ok=True)
            if shutil.disk_usage(folder).free < ROOM:  # its own process would fill the screen with tracebacks
                raise OSError(f"no space left for its files in {folder}")
        settings = wandb.Settings(silent=True)
        run = wandb.init(project=project, group=group, name=run_id, config=config, settings=settings, **kept)
    except (wandb.errors.Error, OSError) as error:
        raise DassError(
            f"wandb cannot start ({first_line(error)}): use WANDB_MODE=offline or tracking=none."
        ) from error
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def log_record(run: Any, record: dict[str, Any]) -> None:
    """Metrics, sparsity and stages in the summary, and the metrics as a table."""
    import wandb

    for metric in record["metrics"]:
        run.summary[f"{metric['dataset']}/{metric['metric']}"] = metric["value"]
    for name in ("targeted", "mlp", "linear", "total"):
        run.summary[f"sparsity/{name}"] = record["sparsity"][name]
    for name, stage in record["stages"].items():
        run.summary[f"{name}/seconds"] = stage["seconds"]
    columns = ["dataset", "metric", "value", "stderr", "n", "seq_len"]
    rows = [[metric[column] for column in columns] for metric in record["metrics"]]
    run.log({"metrics": wandb.Table(columns=columns, data=rows)})


def log_report(run: Any, name: str, frame: pd.DataFrame, figures: list[Path]) -> None:
    """The numbers and the figures (PNG files) that were made of an experiment's records."""
    import wandb

    rows = [[None if pd.isna(value) else value for value in row] for row in frame.to_numpy(dtype=object)]
    run.log({name: wandb.Table(columns=list(frame.columns), data=rows, allow_mixed_types=True)})
    for path in figures:
        run.log({f"{name}_figure": wandb.Image(str(path))})
