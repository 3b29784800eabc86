"""The mirror of a run in wandb. The record is the truth; nothing is read back from here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from dass.errors import DassError, first_line


class Tracker(Protocol):
    """What a run tells while it goes on, and at its end."""

    def log_block(self, index: int, seconds: float, sparsity: float) -> None:
        """One finished block: its index, the seconds it took, the share of zeros in its targeted projections."""

    def log_record(self, record: dict[str, Any]) -> None:
        """The finished record."""

    def log_report(self, name: str, frame: pd.DataFrame, figures: list[Path]) -> None:
        """The numbers and the figures (PNG files) that were made of an experiment's records."""


class NoTracker:
    """Tracks nothing."""

    def log_block(self, index: int, seconds: float, sparsity: float) -> None:
        """See `Tracker`."""

    def log_record(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""

    def log_report(self, name: str, frame: pd.DataFrame, figures: list[Path]) -> None:
        """See `Tracker`."""


class WandbTracker:
    """Tracks into one wandb run."""

    def __init__(self, run: Any) -> None:
        """`run`: what `wandb.init` returned."""
        self.run = run

    def log_block(self, index: int, seconds: float, sparsity: float) -> None:
        """See `Tracker`."""
        self.run.log({"block": index, "block/seconds": seconds, "block/sparsity": sparsity})

    def log_record(self, record: dict[str, Any]) -> None:
        """Metrics, sparsity and stages in the summary, and the metrics as a table."""
        import wandb

        for metric in record["metrics"]:
            self.run.summary[f"{metric['dataset']}/{metric['metric']}"] = metric["value"]
        for name in ("targeted", "linear", "total"):
            self.run.summary[f"sparsity/{name}"] = record["sparsity"][name]
        for name, stage in record["stages"].items():
            self.run.summary[f"{name}/seconds"] = stage["seconds"]
        columns = ["dataset", "metric", "value", "stderr", "n", "seq_len"]
        rows = [[metric[column] for column in columns] for metric in record["metrics"]]
        self.run.log({"metrics": wandb.Table(columns=columns, data=rows)})

    def log_report(self, name: str, frame: pd.DataFrame, figures: list[Path]) -> None:
        """See `Tracker`."""
        import wandb

        rows = [[None if pd.isna(value) else value for value in row] for row in frame.to_numpy(dtype=object)]
        self.run.log({name: wandb.Table(columns=list(frame.columns), data=rows, allow_mixed_types=True)})
        for path in figures:
            self.run.log({f"{name}_figure": wandb.Image(str(path))})


@contextmanager
def track(name: str, project: str, group: str, run_id: str, folder: str, config: dict[str, Any]) -> Iterator[Tracker]:
    """Track a run while the block lasts; a crash inside closes the wandb run as failed.

    Args:
        name: `wandb` or `none`.
        group: one per sweep.
        folder: where offline runs are kept.
        config: the composed config.

    Raises:
        DassError: wandb cannot start.
    """
    if name == "none":
        yield NoTracker()
        return
    if name != "wandb":
        raise DassError(f"tracking={name} is unknown: choose wandb or none.")
    import wandb

    try:
        os.makedirs(folder, exist_ok=True)
        run = wandb.init(
            project=project,
            group=group,
            name=run_id,
            config=config,
            dir=folder,
            mode=os.environ.get("WANDB_MODE") or "offline",
            settings=wandb.Settings(silent=True),
        )
    except (wandb.errors.Error, OSError) as error:
        raise DassError(
            f"wandb cannot start ({first_line(error)}): use WANDB_MODE=offline or tracking=none."
        ) from error
    try:
        yield WandbTracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
