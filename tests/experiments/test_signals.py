"""Signals to stop: one line, nothing half-written, and the exit code that says so; at every stage of a run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dass.folders import is_saved
from dass.manifests import read_manifest
from tests.experiments.test_prune import ROOT, records, run, setting  # noqa: F401  (a fixture)

DRIVER = """
import os, sys, time
from transformers import PreTrainedModel
from experiments import prune, walked
number, stage = int(sys.argv.pop(1)), sys.argv.pop(1)

def save_pretrained(self, folder, **_):
    (folder / "model.safetensors").write_bytes(b"half")
    stop()

def stop(*_, **__):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # as `timeout` sends it
    time.sleep(60)

if stage == "save":
    PreTrainedModel.save_pretrained = save_pretrained
else:
    setattr(*{"walk": (walked, "note"), "evaluation": (prune, "score")}[stage], stop)
prune.run_app(prune.main, "prune")
"""


def stopped(number, stage, *overrides):
    arguments = [sys.executable, "-c", DRIVER, str(int(number)), stage, *overrides]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("number", "stage"), [(signal.SIGTERM, "walk"), (signal.SIGINT, "evaluation")])
def test_a_sweep_is_stopped(setting, tmp_path, number, stage):  # noqa: F811
    before = sorted(os.listdir(tmp_path))
    done = stopped(number, stage, "-m", *setting, "method=wanda,dass")
    assert done.returncode == 128 + number
    assert done.stderr == f"stopped by {number.name}: the same command goes on with what is not done yet\n"
    assert set(os.listdir(tmp_path)) == {*before, "runs"} and records(tmp_path) == []
    (manifest,) = (tmp_path / "runs" / "manifests").iterdir()
    assert len(read_manifest(manifest).runs) == 2


def test_a_saved_model_outlives_the_stop_of_its_successor(setting, tmp_path):  # noqa: F811
    saved = f"save_model={tmp_path / 'saved'}"
    run(*setting, saved)
    (first,) = records(tmp_path)
    done = stopped(signal.SIGTERM, "save", *setting, saved, "rerun=true")
    assert done.returncode == 143 and len(done.stderr.splitlines()) == 1
    assert records(tmp_path) == [first] and is_saved(tmp_path / "saved", first["id"])
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_while_python_imports(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.prune", f"results_dir={tmp_path}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and len(stderr.splitlines()) == 1 and os.listdir(tmp_path) == []
