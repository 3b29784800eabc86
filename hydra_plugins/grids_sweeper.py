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
which add to it or replace its values. Of values that a grid lists the command line chooses (`method=wanda`); others
take the place of what is listed (`method=ria`, `evaluation.n_windows=99`), in those runs that have such a setting.
Without grids it is Hydra's basic sweep.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

Grid = dict[str, Any]


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
            if argument.startswith(("experiment=", "scale=")) and "," in argument:
                raise HydraException(f"{argument}: one experiment at one scale is a sweep; give one after the other.")
        jobs = jobs_of(self.grids, self.scales.get(self.scale or "", [{}]), arguments)
        if not jobs:
            raise HydraException(f"No run of the experiment has all of {' '.join(arguments)}: leave some of them out.")
        jobs = self.composable(jobs)
        from dass.distributed import first, together, world  # late: Hydra scans all plugins
        from experiments.scratch import LATER
        from experiments.sweep import begin_sweep, finish_sweep

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

    def composable(self, jobs: list[list[str]]) -> list[list[str]]:
        """The jobs whose settings exist; raises what Hydra says where there is none, or no experiment lists them."""
        fitting: list[list[str]] = []
        misfits: dict[str, Exception] = {}
        for job in jobs:
            try:
                self.validate_batch_is_legal([job])
                fitting.append(job)
            except (HydraException, AssertionError) as error:  # OmegaConf's, of a part that is null
                misfits[" ".join(one for one in job if one.startswith(("model=", "method=", "update=")))] = error
        if misfits and (not fitting or self.grids == [{}]):
            raise next(iter(misfits.values()))
        if misfits:
            left_out = f"{len(jobs) - len(fitting)} of {len(jobs)} runs of the experiment are left out"
            print(f"note: {left_out}, which have no such setting: {', '.join(misfits)}", file=sys.stderr)
        return fitting


def jobs_of(grids: list[Grid], variants: list[Grid], arguments: list[str]) -> list[list[str]]:
    """The overrides of every job, each job once, in the order of the grids.

    Args:
        grids: from a key of the config to its value, or to several of them separated by commas.
        variants: more of the same; each is merged into every grid.
        arguments: the command line's overrides. One all of whose values are listed in grids chooses: of a grid that
            lists its key those values, and nothing of one that leaves this part of the method as it is. Any other one
            is no longer taken from a grid.
    """
    parser = OverridesParser.create()

    def one_by_one(overrides: list[str]) -> list[list[str]]:
        return BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)[0]

    def values(overrides: list[str]) -> dict[str, set[str]]:
        return {one.split("=", 1)[0]: {job[0] for job in one_by_one([one])} for one in overrides}

    merged = [[f"{key}={value}" for key, value in {**a, **b}.items()] for a, b in itertools.product(grids, variants)]
    listed = set().union(*(own for grid in merged for own in values(grid).values()))
    choosing = [key for key, given in values(arguments).items() if given <= listed]
    jobs: dict[frozenset[str], list[str]] = {}
    for grid in merged:
        own = values(grid)
        for job in one_by_one(grid + arguments):
            chosen = (own[key] & {*job} if key in own else not _is_of_method(key) for key in choosing)
            if all(chosen):
                jobs.setdefault(frozenset(job), job)
    return list(jobs.values())


def _is_of_method(key: str) -> bool:
    return key == "update" or key.startswith("method.")
