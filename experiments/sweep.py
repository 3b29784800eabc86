"""The manifest of a sweep: which runs it consists of, written beside their records before and after they run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dass.errors import DassError
from dass.manifests import Manifest, PlannedRun, write_manifest
from dass.records import identity_of
from experiments.app import sentence
from experiments.resolve import check, resolve

ROUTINE: tuple[str, ...] = (
    "experiment",
    "scale",
    "results_dir",
    "tracking",
    "device",
    "batch_size",
    "save_model",
    "masks",
    "rerun",
)
ROUTINE += ("debug", "hydra")
"""Settings that change nothing of what a sweep is."""
KEPT = ("model", "method", "sparsity", "calibration", "evaluation", "targets", "exclude", "seed")
"""The parts of a config that say what a run was to do."""


def plan_sweep(config: DictConfig, jobs: list[list[str]], arguments: list[str]) -> Manifest | None:
    """The manifest of a sweep of `experiments.prune`; None of other apps, and where nothing is run.

    Args:
        config: what was composed for the sweep as a whole.
        jobs: the overrides of each run.
        arguments: those of the command line.
    """
    if "results_dir" not in config or config.get("dry_run"):
        return None
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    experiment = given.get("experiment")
    scale = None if experiment is None else str(config.scale)
    changed = [a for a in arguments if a.lstrip("+~").split("=")[0].split(".")[0] not in ROUTINE]
    name = f"{experiment or 'sweep'}{'' if scale is None else '-' + scale}"
    if changed or experiment is None:
        name += f"-{identity_of({'changed': sorted(changed)})[:8]}"
    runs = [_planned(compose("prune", job)) for job in jobs]
    return Manifest(name, experiment, scale, str(config.get("report") or "perplexity"), arguments, runs)


def finish_sweep(folder: Path, manifest: Manifest, results: Sequence[JobReturn]) -> Path:
    """Write the manifest once more, with what the runs said of themselves: their identities, or why they failed."""
    runs = []
    for planned, result in zip(manifest.runs, results, strict=True):
        done = result.status == JobStatus.COMPLETED
        why = None if done else str(result._return_value) or type(result._return_value).__name__
        fingerprint = result._return_value if done else planned.fingerprint
        runs.append(PlannedRun(fingerprint, planned.config, planned.calibrates, why))
    return write_sweep(folder, Manifest(**vars(manifest) | {"runs": runs}))


def write_sweep(folder: Path, manifest: Manifest) -> Path:
    """Write a manifest, each run once: several may be the same, as dense runs with another calibration."""
    unique = {run.fingerprint or str(index): run for index, run in reversed(list(enumerate(manifest.runs)))}
    runs = [run for index, run in enumerate(manifest.runs) if unique[run.fingerprint or str(index)] is run]
    return write_manifest(folder, Manifest(**vars(manifest) | {"runs": runs}))


def _planned(config: DictConfig) -> PlannedRun:
    """What a run is to do; without an identity where it cannot be told here, as on a machine that lacks the model."""
    try:
        checked = check(config)
    except DassError as error:
        return PlannedRun(None, {}, False, sentence(error))
    kept: dict[str, Any] = {key: checked.composed[key] for key in KEPT}
    kept["model"] = {key: value for key, value in kept["model"].items() if key != "architecture"}
    try:
        return PlannedRun(resolve(config).run_id, kept, checked.calibrates, None)
    except DassError as error:
        return PlannedRun(None, kept, checked.calibrates, sentence(error))
