"""Hydra's launchers of a sweep whose runs are side by side: on this machine, as jobs of Slurm, on a Ray cluster.

Hydra finds plugins in a namespace package of this name only. What is wanted here, and not of the launchers that are to
be had: a run whose process is killed is a failed run, and the others go on.
"""

import os
import signal
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

SWEEP = "DASS_SWEEP"
"""The variable of the environment that holds a sweep's name; machines of a cluster do not inherit it."""
GENERIC = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout")
"""Submitit's parameters that mean something to all of its executors."""


@dataclass
class Job:
    """One run, to be called in another process, perhaps on another machine."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig  # of the sweep
    overrides: list[str]
    number: int

    def __post_init__(self) -> None:
        """Note what the other process does not know of this one."""
        self.folder, self.arguments, self.sweep = os.getcwd(), sys.argv, os.environ.get(SWEEP)
        self.singletons = Singleton.get_state()

    def __call__(self) -> JobReturn:
        """Run; what the run raises is in the result."""
        os.chdir(self.folder)
        sys.argv = self.arguments
        os.environ.update({} if self.sweep is None else {SWEEP: self.sweep})
        setup_globals()
        Singleton.set_state(self.singletons)
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(self.number), self.number
        HydraConfig.instance().set_config(config)
        from dass.terminal import printing  # late: Hydra scans all plugins

        with printing():
            return run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)

    def checkpoint(self) -> Any:
        """Submitit's hook: the same once more, where Slurm takes the machine away; the run goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SideBySide(Launcher):
    """What the launchers share; each says how jobs are run."""

    def __init__(self, **settings: Any) -> None:
        """The values of the launcher's file in `conf/hydra/launcher`."""
        self.settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)  # type: ignore

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's hook: the result of each job, in order; of one that was killed, that it failed."""
        given = (self.hydra_context, self.task_function, self.config)
        jobs = [Job(*given, list(one), initial_job_idx + index) for index, one in enumerate(job_overrides)]
        results = []
        for job, outcome in zip(jobs, self.outcomes(jobs), strict=True):
            if isinstance(outcome, Exception):
                advice = "its memory or its time may not have sufficed; run it again"
                why = HydraException(f"The run's process ended before the run did ({type(outcome).__name__}): {advice}")
                outcome = JobReturn(overrides=job.overrides, status=JobStatus.FAILED, _return_value=why)
            results.append(outcome)
        return results

    @abstractmethod
    def outcomes(self, jobs: Sequence[Callable[[], JobReturn]]) -> Iterator[JobReturn | Exception]:
        """The result of each job, in order, or what befell its process."""


class JoblibLauncher(SideBySide):
    """Runs in processes of this machine, by joblib's loky, which share its cores.

    Where one is killed, mostly for its memory, those that are left go on with half as many at a time; one that is
    killed while it runs alone has failed.
    """

    def outcomes(self, jobs: Sequence[Callable[[], JobReturn]]) -> Iterator[JobReturn | Exception]:
        """The result of each job, in order, or that its process was killed."""
        from joblib import cpu_count, effective_n_jobs
        from joblib.externals.loky import ProcessPoolExecutor
        from joblib.externals.loky.process_executor import BrokenProcessPool

        n_jobs, done = min(effective_n_jobs(self.settings["n_jobs"]), len(jobs)), 0
        # the same throughout, as other threads round otherwise and would begin a run anew that was killed
        share, given = max(1, cpu_count() // n_jobs), os.environ.get("OMP_NUM_THREADS", "")
        threads = str(min(share, int(given)) if given.isdecimal() else share)
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        while done < len(jobs):
            # Ctrl-C is for this process, which ends the others
            pool = ProcessPoolExecutor(
                n_jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN), env=variables
            )
            try:
                for future in [pool.submit(job) for job in jobs[done:]]:
                    outcome = _outcome(future.result)
                    broken = isinstance(outcome, BrokenProcessPool)
                    if not broken or n_jobs == 1:
                        yield outcome
                        done += 1
                    if broken:
                        n_jobs = max(1, n_jobs // 2)
                        break
            finally:
                pool.shutdown(kill_workers=done < len(jobs))


class SlurmLauncher(SideBySide):
    """Runs as jobs of Slurm, in one array, by submitit."""

    def outcomes(self, jobs: Sequence[Callable[[], JobReturn]]) -> Iterator[JobReturn | Exception]:
        """The result of each job, in order, or why there is none."""
        submitit = _package("submitit", "slurm")
        settings = dict(self.settings)
        cluster, folder = settings.pop("cluster"), settings.pop("submitit_folder")
        timeouts = settings.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{k if k in GENERIC else f"slurm_{k}": v for k, v in settings.items()})
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        for one in submitted:
            yield _outcome(one.result)


class RayLauncher(SideBySide):
    """Runs as tasks of a Ray cluster whose machines have this folder and this environment at the same places."""

    def outcomes(self, jobs: Sequence[Callable[[], JobReturn]]) -> Iterator[JobReturn | Exception]:
        """The result of each job, in order, or why there is none."""
        ray = _package("ray", "ray")
        try:
            ray.init(ignore_reinit_error=True, **self.settings["ray"]["init"])
        except ConnectionError:
            advice = "start one by `ray start --head`, or set hydra.launcher.ray.init.address=local"
            raise HydraException(f"There is no Ray cluster: {advice}.") from None  # the cause would be told instead
        run = ray.remote(**self.settings["ray"]["remote"])(_call)
        for one in [run.remote(job) for job in jobs]:
            yield _outcome(partial(ray.get, one))


def _call(job: Callable[[], JobReturn]) -> JobReturn:
    return job()


def _outcome(result: Callable[[], JobReturn]) -> JobReturn | Exception:
    try:
        return result()
    except Exception as error:
        return error


def _package(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise HydraException(f"hydra/launcher={extra} needs the package {name}: `make setup-{extra}`.") from None
