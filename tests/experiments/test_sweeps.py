"""Sweeps by every launcher: the same records, a killed run that is told, and two sweeps over the same runs."""

import importlib.util
import os
import subprocess
import sys
import venv
from functools import partial

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from dass.claims import claimed
from dass.manifests import read_manifest
from experiments import prune
from experiments.app import CONF
from experiments.resolve import check
from hydra_plugins.launchers import JoblibLauncher, RayLauncher, SlurmLauncher
from tests.experiments.test_prune import ROOT, composed, records, setting  # noqa: F401  (a fixture)

DRIVER = """
import os
from experiments import prune
from experiments.app import run_app

def main(config):
    if config.method.name == "wanda":
        os.abort()
    return prune.main(config)

run_app(main, "prune")
"""
KILLED = partial(os.abort)


def settings_of(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("prune", [f"hydra/launcher={name}"], return_hydra_config=True).hydra.launcher


def without_circumstances(record):
    config = {key: value for key, value in record["config"].items() if key != "results_dir"}
    return {key: record[key] for key in record if key not in ("stages", "machine", "git", "command")} | {
        "config": config
    }


@pytest.mark.parametrize("name", ["joblib", "slurm", "slurm_local", "ray"])
def test_hydra_finds_every_launcher(name):
    settings = settings_of(name)
    assert Plugins.instance().class_name_to_class[settings._target_].__name__ in str(settings._target_)


def test_joblib_runs_share_the_cores_and_a_killed_one_is_only_its_own_failure(monkeypatch):
    from joblib import cpu_count

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = partial(os.getenv, "OMP_NUM_THREADS")
    assert list(JoblibLauncher(n_jobs=1).outcomes([threads])) == [str(cpu_count())]
    first, killed, last = JoblibLauncher(n_jobs=2).outcomes([threads, KILLED, partial(int, "3")])
    assert first in {str(max(1, cpu_count() // n)) for n in (1, 2)} and isinstance(killed, Exception) and last == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert list(JoblibLauncher(n_jobs=1).outcomes([threads])) == ["1"]


def test_a_killed_job_of_submitit_is_only_its_own_failure(tmp_path):
    settings = dict(settings_of("slurm_local"), submitit_folder=str(tmp_path))
    settings.pop("_target_")
    killed, last = SlurmLauncher(**settings).outcomes([KILLED, partial(int, "3")])
    assert last == 3 and isinstance(killed, Exception)


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    """By an `sbatch` that only keeps what it is given."""
    for name, script in {"sbatch": f'cp "$1" {tmp_path}/asked; echo Submitted batch job 7', "srun": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("submitit.core.core.Job.result", lambda self: self.job_id)
    settings = dict(settings_of("slurm"), submitit_folder=str(tmp_path / "%j"), partition="gpu", array_parallelism=1)
    settings.pop("_target_")
    assert list(SlurmLauncher(**settings).outcomes([partial(int, "1"), partial(int, "2")])) == ["7_0", "7_1"]
    asked = set((tmp_path / "asked").read_text().splitlines())
    options = ["partition=gpu", "gpus-per-node=1", "cpus-per-task=8", "time=720", "mem=64GB", "array=0-1%1", "requeue"]
    assert {f"#SBATCH --{option}" for option in options} <= asked


def test_a_launcher_whose_package_is_not_there_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(HydraException, match="make setup-ray"):
        list(RayLauncher().outcomes([]))


def sweep(results_dir, setting, *overrides, python=sys.executable, code=DRIVER):  # noqa: F811
    rest = [one for one in setting if not one.startswith("results_dir=")]
    folders = [f"results_dir={results_dir}/runs", f"hydra.sweep.dir={results_dir}/multirun"]
    command = [python, "-c", code, "-m", *rest, *folders, *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def launched_alike(setting, tmp_path, name, *overrides, python=sys.executable):  # noqa: F811
    """A sweep of three runs, of which one is killed: the others are as they are one by one."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for method in ("dense", "sparsegpt"):
            prune.main(compose("prune", [*setting, f"method={method}"]))
    done = sweep(
        tmp_path / name, setting, "method=dense,wanda,sparsegpt", f"hydra/launcher={name}", *overrides, python=python
    )
    assert done.returncode == 1 and "1 of 3 runs failed:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    alone, together = records(tmp_path), records(tmp_path / name)
    assert list(map(without_circumstances, together)) == list(map(without_circumstances, alone)) and len(alone) == 2
    (path,) = (tmp_path / name / "runs" / "manifests").iterdir()
    first, killed, last = read_manifest(path).runs
    assert {first.fingerprint, last.fingerprint} == {record["id"] for record in alone}
    assert first.why is last.why is None and "ended before the run did" in killed.why


def test_a_sweep_does_what_another_process_is_at_when_the_others_are_through(setting, tmp_path):  # noqa: F811
    run_id = check(composed(*setting, "method=wanda")).pinned().run_id
    code = "from dass import claims\nclaims.BEAT = 0.2\n" + DRIVER.replace("wanda", "none of them")
    command = [sys.executable, "-c", code, "-m", *setting, f"hydra.sweep.dir={tmp_path}", "method=wanda,dass"]
    with claimed(tmp_path / "runs" / f".{run_id}.claim"):
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "another process is at it" in other.stdout.readline() and "dass" in other.stdout.readline()
        assert "waiting for it" in other.stderr.readline()
        assert len(records(tmp_path)) == 1
    stdout, stderr = other.communicate(timeout=120)
    assert other.returncode == 0 and stderr == "" and "wanda" in stdout
    (path,) = (tmp_path / "runs" / "manifests").iterdir()
    first, second = read_manifest(path).runs
    assert first.fingerprint == run_id
    assert {record["id"] for record in records(tmp_path)} == {run_id, second.fingerprint}
    assert not any("DASS" in record["command"] for record in records(tmp_path))
    assert [name for name in os.listdir(tmp_path / "runs") if name.startswith(".")] == []


@pytest.mark.slow
def test_two_sweeps_at_once_do_every_run_once(setting, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "experiments.prune", "-m", *setting, "method=dense,wanda,dass"]
    command.append(f"hydra.sweep.dir={tmp_path}")
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(one.communicate(timeout=300)[0] for one in both)
    assert [one.returncode for one in both] == [0, 0] and said.count("of the targeted weights") == 3
    assert said.count("already done, skipping") == 3 and len(records(tmp_path)) == 3


@pytest.mark.slow
def test_joblib(setting, tmp_path):  # noqa: F811
    launched_alike(setting, tmp_path, "joblib")


@pytest.mark.slow
def test_submitit(setting, tmp_path):  # noqa: F811
    launched_alike(setting, tmp_path, "slurm_local", f"hydra.launcher.submitit_folder={tmp_path}/logs")


@pytest.mark.slow
def test_ray(setting, tmp_path):  # noqa: F811
    """In an environment of its own, which sees the packages of this one."""
    python = sys.executable
    if importlib.util.find_spec("ray") is None:
        venv.create(tmp_path / "ray", with_pip=True)
        python = str(tmp_path / "ray" / "bin" / "python")
        (site,) = (tmp_path / "ray" / "lib").glob("python*/site-packages")
        (site / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "ray"], check=True)
    once = "hydra.launcher.ray.remote.max_retries=0"
    launched_alike(setting, tmp_path, "ray", "hydra.launcher.ray.init.address=local", once, python=python)
