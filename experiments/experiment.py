"""The runs that an experiment consists of, from its file in `conf/experiment`, and their records."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dass.errors import DassError
from dass.records import identity_of
from experiments.app import CONF
from experiments.identity import determinants
from experiments.resolve import check
from hydra_plugins.grids_sweeper import jobs_of


@dataclass(frozen=True)
class Experiment:
    """One file of `conf/experiment` at one scale."""

    name: str
    kind: str
    """Of its report: a name in `report.kinds.KINDS`."""
    runs: list["PlannedRun"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    design: str
    """What it is to do, in 16 hex digits."""
    config: dict[str, Any]
    calibrates: bool


def experiment_names() -> list[str]:
    """All experiments."""
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def load_experiment(name: str, scale: str, overrides: list[str]) -> Experiment:
    """Every run that `python -m experiments.prune -m experiment=NAME scale=SCALE OVERRIDES` would launch, each once.

    To be called where Hydra is initialised: in an app, or inside `hydra.initialize_config_dir`.

    Raises:
        DassError: there is no such experiment.
    """
    if name not in experiment_names():
        raise DassError(f"There is no experiment {name}: choose one of {', '.join(experiment_names())}.")
    arguments = [f"experiment={name}", f"scale={scale}", *overrides]
    runs: dict[str, PlannedRun] = {}
    whole = compose("prune", arguments, return_hydra_config=True)
    sweeper: dict[str, Any] = OmegaConf.to_container(whole.hydra.sweeper, resolve=True)  # type: ignore[assignment]
    base = compose("prune", arguments)
    for job in jobs_of(sweeper["grids"], sweeper["scales"].get(scale, [{}]), arguments):
        config = _compose(job, base, scale)
        checked = check(config)
        design = identity_of(determinants(checked.config, checked.pruners, contents=False))
        runs.setdefault(design, PlannedRun(design, checked.composed, checked.calibrates))
    return Experiment(name, str(whole.report), list(runs.values()))


def _compose(job: list[str], base: DictConfig, scale: str) -> DictConfig:
    """What Hydra composes from a job's overrides, sooner: an option is composed once for all jobs and experiments.

    This is right as long as an option writes under its group's own key only, and no experiment's file sets a value of a
    group that it sweeps; a test compares with Hydra.
    """
    config = copy.deepcopy(base)
    values = []
    for override in OverridesParser.create().parse_overrides(job):
        key = override.get_key_element()
        if not (CONF / key).is_dir():
            values.append((key, override.value()))
        elif key not in ("experiment", "scale"):
            config[key] = copy.deepcopy(_option(scale, str(override.input_line))[key])
    for key, value in values:  # as in Hydra, whatever their order among the options
        OmegaConf.update(config, key, value)
    return config


@functools.cache
def _option(scale: str, choice: str) -> DictConfig:
    return compose("prune", [f"scale={scale}", choice])
