"""Hydra's sweep over several grids in turn, so that one experiment is exactly the runs that its table needs.

Hydra finds plugins in a namespace package of this name only. An experiment in `conf/experiment` sets

    hydra:
      sweeper:
        scales:
          small: [{model: smollm2_135m}]
          paper: [{model: "llama2_7b,llama2_13b"}]
        grids:
          - {method: dense}
          - {method: "wanda,dass", sparsity: "4of8,2of4"}

Each grid is the Cartesian product of its comma-separated values; it is swept once for each of the scale's entries,
which add to it or replace its values. Of values that are listed the command line chooses (`method=wanda`); others take
the place of what is listed (`method=ria`, `evaluation.n_windows=99`). What then has no place in a run is left out,
and told. Without grids it is Hydra's basic sweep.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

Grid = dict[str, Any]
Settings = dict[str, str]
"""Of a job: each override by its key."""
WHOLE = {"experiment", "scale"}
"""What a sweep as a whole is of."""


@dataclass
class GridsConf:
    """The node `hydra.sweeper`."""

    _target_: str = "hydra_plugins.grids_sweeper.GridsSweeper"
    grids: list[Any] = field(default_factory=lambda: [{}])
    scales: dict[str, list[Any]] = field(default_factory=dict)
    scale: str | None = "${scale}"


ConfigStore.instance().store(group="hydra/sweeper", name="grids", node=GridsConf, provider="grids_sweeper")


class GridsSweeper(Sweeper):
    """Launches all the jobs of all the grids together, lets every one run, and lists those that failed.

    What another process is at comes once more at the end, and waits then.
    """

    def __init__(self, grids: list[Grid], scales: dict[str, list[Grid]], scale: str | None) -> None:
        """The values of `GridsConf`."""
        self.grids, self.scales, self.scale = grids, scales, scale
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook: bring the launcher."""
        self.hydra_context = hydra_context
        self.config: DictConfig = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run all jobs; then list the failed ones on stderr and raise the first one's error."""
        assert self.launcher is not None
        for argument in arguments:
            if argument.partition("=")[0] in WHOLE and "," in argument:
                raise HydraException(f"{argument}: one experiment at one scale is a sweep; give one after the other.")
        from dass.distributed import first, together, world  # late: Hydra scans all plugins
        from experiments.scratch import LATER
        from experiments.sweep import begin_sweep, finish_sweep, misfit

        arguments = [re.sub(r"=choice\(([^,()]*)\)$", r"=\1", one) for one in arguments]  # as they were given
        jobs = jobs_of(self.grids, self.scales.get(self.scale or "", [{}]), arguments, misfit)
        self.validate_batch_is_legal(jobs)
        if world() > 1 and not isinstance(self.launcher, BasicLauncher):
            raise HydraException("Several processes do one run after the other: leave out hydra/launcher.")
        folder = Path(self.config.get("results_dir", "."))
        with together():
            manifest = first(partial(begin_sweep, folder, self.config, jobs, arguments))
        results = list(self.launcher.launch(jobs, initial_job_idx=0))
        if manifest is not None:
            busy = [
                i for i, one in enumerate(results) if one.status == JobStatus.COMPLETED and one.return_value is None
            ]
            again = [[*jobs[index], f"+hydra.job.env_set.{LATER}=1"] for index in busy]
            for index, result in zip(busy, self.launcher.launch(again, len(jobs)) if again else [], strict=True):
                results[index] = result
            with together():
                path = first(partial(finish_sweep, folder, manifest, results))
            print(f"report: python -m experiments.report manifest={path}", flush=True)
        failed = [result for result in results if result.status != JobStatus.COMPLETED]
        if failed:
            print(f"{len(failed)} of {len(jobs)} runs failed:", file=sys.stderr)
            for result in failed:
                print(f"  {' '.join(result.overrides or [])}: {result._return_value}", file=sys.stderr)
            raise failed[0]._return_value
        return results


def jobs_of(
    grids: list[Grid],
    variants: list[Grid],
    arguments: list[str],
    misfit: Callable[[list[str]], str | None] = lambda job: None,
) -> list[list[str]]:
    """The overrides of every job, each job once, in the order of the grids.

    Args:
        grids: from a key of the config to its value, or to several of them separated by commas.
        variants: more of the same; each is merged into every grid.
        arguments: the command line's overrides. Of the jobs that set the same key those with one of these values are
            left, and of a part of the method no others; a value that none of them has takes the place of theirs.
        misfit: see `_fitted`.
    """
    parser = OverridesParser.create()
    grid_jobs: dict[frozenset[str], Settings] = {}
    for grid, variant in itertools.product(grids, variants):
        for job in _split(parser.parse_overrides([f"{key}={value}" for key, value in {**grid, **variant}.items()])):
            grid_jobs.setdefault(frozenset(job.values()), job)
    jobs = [(job, job) for job in grid_jobs.values()]
    keys = list(dict.fromkeys(key for job in grid_jobs.values() for key in job))  # whatever order they are given in
    overrides = [(one.get_key_element(), one) for one in parser.parse_overrides(arguments)]
    for key, override in sorted(overrides, key=lambda one: keys.index(one[0]) if one[0] in keys else len(keys)):
        values, taken = [job[key] for job in _split([override])], {job.get(key) for _, job in jobs}
        chooses = key.startswith(("update", "method.")) and taken.issuperset(values)
        jobs = [
            (own, {**job, key: value})
            for own, job in jobs
            for value in values
            if value == job.get(key) or (value not in taken if key in job else not chooses)
        ]
    changed = {key for key, _ in overrides} - WHOLE
    fitted = [_fitted(own, job, misfit) if own and changed else job for own, job in jobs]
    pairs = [({*job.values()}, {*other.values()}) for (_, job), other in zip(jobs, fitted, strict=True)]
    left_out = Counter(one for job, other in pairs for one in job - other)
    given = {one for own, job in jobs for one in {*job.values()} - {*own.values()}}
    if not given <= {one for job in fitted for one in job.values()}:
        fitted, left_out = [job for _, job in jobs], Counter()  # it has a place in none: their errors say why
    for one, count in sorted(left_out.items()):
        print(f"note: {one} has no place in {count} of {len(jobs)} runs, which go without it", file=sys.stderr)
    unique: dict[frozenset[str], list[str]] = {}
    for job in fitted:
        unique.setdefault(frozenset(job.values()), list(job.values()))
    return list(unique.values())


def _split(overrides: list[Override]) -> list[Settings]:
    """The Cartesian product of their values."""
    keys = dict.fromkeys(one.get_key_element() for one in overrides)
    return [dict(zip(keys, job, strict=True)) for job in BasicSweeper.split_arguments(overrides, None)[0]]


def _fitted(own: Settings, job: Settings, misfit: Callable[[list[str]], str | None]) -> Settings:
    """A job without what the arguments have left without a place in it.

    It is what the experiment says of a value that is no longer there, as the seed of a model; or an argument that some
    of its runs cannot take, as an update of the dense model.

    Args:
        own: what the experiment says.
        misfit: None where a job means something; else the key of a setting that is not there, or "".
    """
    found, is_replaced = job, any(job[key] != one for key, one in own.items())
    while (key := misfit(list(found.values()))) is not None:
        settings = [one for one in found if found[one] != own.get(one) and one not in WHOLE]
        if is_replaced:
            settings = [one for one in found if found[one] == own.get(one) and "." in one] + settings
        if key not in settings:
            key = next((one for one in settings if misfit(list(_without(found, own, one).values())) is None), None)
        if key is None:
            return job
        found = _without(found, own, key)
    return found


def _without(found: Settings, own: Settings, key: str) -> Settings:
    """Settings with the experiment's own in the place of an argument, or without its own."""
    rest = {one: value for one, value in found.items() if one != key}
    return rest | ({key: own[key]} if key in own and own[key] != found[key] else {})
