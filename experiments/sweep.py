"""The manifest of a sweep: which runs it consists of, written beside their records before and after they run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dass.errors import DassError
from dass.manifests import Manifest, PlannedRun, write_manifest
from dass.records import identity_of
from experiments.app import sentence
from experiments.methods import name_by_file
from experiments.public import public, public_override, public_text
from experiments.resolve import check
from report.kinds import find_kind

ROUTINE = {"experiment", "scale", "results_dir", "tracking", "device", "memory", "batch_size", "save_model", "masks"}
ROUTINE |= {"rerun", "debug", "hydra", "model.device_map"}
"""Settings that change nothing of what a sweep is."""
KEPT = ("model", "method", "sparsity", "calibration", "evaluation", "targets", "exclude", "seed")
"""The parts of a config that say what a run was to do."""


def plan_sweep(config: DictConfig, jobs: list[list[str]], arguments: list[str]) -> Manifest | None:
    """The manifest of a sweep of `experiments.prune`; None of other apps, and where nothing is run.

    `config` was composed for the sweep as a whole; `jobs` are the overrides of each run, `arguments` those given.
    """
    if "results_dir" not in config or config.get("dry_run"):
        return None
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    experiment = given.get("experiment")
    scale = None if experiment is None else str(config.scale)
    keys = {argument: argument.lstrip("+~").split("=")[0] for argument in arguments}
    changed = [argument for argument, key in keys.items() if not ROUTINE & {key, key.split(".")[0]}]
    name = f"{experiment or 'sweep'}{'' if scale is None else '-' + scale}"
    if changed or experiment is None:
        name += f"-{identity_of({'changed': sorted(changed)})[:8]}"
    report = str(config.get("report") or "perplexity")
    find_kind(report)
    runs = [_planned(compose("prune", job), job) for job in jobs]
    return Manifest(name, experiment, scale, report, [public_override(one) for one in arguments], runs)


def begin_sweep(folder: Path, config: DictConfig, jobs: list[list[str]], arguments: list[str]) -> Manifest | None:
    """Write the manifest of a sweep into the folder of its records, see `plan_sweep`."""
    manifest = plan_sweep(config, jobs, arguments)
    if manifest is not None:
        write_sweep(folder, manifest)
    return manifest


def finish_sweep(folder: Path, manifest: Manifest, results: Sequence[JobReturn]) -> Path:
    """Write the manifest once more, with what the runs said of themselves: their identities, or why they failed."""
    runs = []
    for planned, result in zip(manifest.runs, results, strict=True):
        told = result._return_value
        if result.status == JobStatus.COMPLETED:
            runs.append(replace(planned, fingerprint=told, why=None))
        else:
            runs.append(replace(planned, why=public_text(str(told)) or type(told).__name__))
    return write_sweep(folder, replace(manifest, runs=runs))


def write_sweep(folder: Path, manifest: Manifest) -> Path:
    """Write a manifest, each run once: several may be the same, as dense runs with another calibration."""
    unique: dict[str | int, PlannedRun] = {}
    for index, run in enumerate(manifest.runs):
        unique.setdefault(run.fingerprint or index, run)
    return write_manifest(folder, replace(manifest, runs=list(unique.values())))


def _planned(config: DictConfig, job: list[str]) -> PlannedRun:
    """What a run is to do; without an identity where it cannot be told here, as on a machine that lacks the model."""
    kept, calibrates = {}, False
    try:
        name_by_file(config, job)
        plan = check(config)
        kept, calibrates = {key: plan.composed[key] for key in KEPT}, plan.calibrates
        kept["model"] = {key: value for key, value in kept["model"].items() if key != "architecture"}
        return PlannedRun(plan.run_id, public(kept), calibrates, None)
    except DassError as error:
        return PlannedRun(None, public(kept), calibrates, public_text(sentence(error)))
