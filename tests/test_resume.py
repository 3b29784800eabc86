"""A run that was killed goes on, and ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dass import resume
from dass.errors import DassError
from dass.evaluation.zero_shot import TASKS
from dass.pruning.layout import find_blocks
from dass.resume import STATE, Kept
from experiments import training, walked
from tests.evaluation.test_zero_shot import any_items, write
from tests.experiments.test_prune import ROOT, records, run, setting  # noqa: F401  (a fixture)
from tests.models import VOCABULARY, tiny_model
from tests.tokenizers import tiny_tokenizer

OBS = ("method=sparsegpt", "sparsity=2of4")


@pytest.fixture
def always(monkeypatch):
    """Keep how far the run has come after every block and every batch."""
    monkeypatch.setattr(resume, "EVERY", 0.0)
    monkeypatch.setattr(resume, "SHARE", float("inf"))


def killed_at(monkeypatch, what, name, at):
    """Let the `at`-th call of a function be the last thing that a run does; returns what puts it back."""
    original, calls = getattr(what, name), []

    def once_more(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            raise SystemExit(143)
        return original(*arguments, **keywords)

    monkeypatch.setattr(what, name, once_more)
    return lambda: monkeypatch.setattr(what, name, original)


def ended(tmp_path, where):
    """What a run has left, times aside."""
    (record,) = records(where)
    names = ("id", "identity", "windows", "metrics", "sparsity", "calibration", "failed")
    model = AutoModelForCausalLM.from_pretrained(where / "model").state_dict()
    return {name: record[name] for name in names}, model, load_file(where / "masks" / "masks.safetensors")


def overrides(where):
    return [f"results_dir={where / 'runs'}", f"save_model={where / 'model'}", f"masks={where / 'masks'}"]


def same(one, other):
    return one[0] == other[0] and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one[1:], other[1:], strict=True)
    )


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("method", [OBS, ("method=dass", "targets=all"), ("method=adaptive", "method.order=random")])
def test_a_run_that_was_killed_between_blocks_ends_the_same(
    setting,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    always,
    method,
    memory,
):
    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *method, *overrides(one))
    for at in (2, 2, 1):  # in the second block; then, after that one, in the third; then at its first
        back = killed_at(monkeypatch, walked, "note", at)
        with pytest.raises(SystemExit):
            run(*setting, *method, f"memory={memory}", *overrides(other))
        back()
        capsys.readouterr()
    run(*setting, *method, f"memory={memory}", *overrides(other))
    assert "goes on behind block 2 of 3" in capsys.readouterr().err
    assert same(ended(tmp_path, one), ended(tmp_path, other))
    assert not [path for path in (other / "runs").iterdir() if path.name.startswith(".")]


def test_a_model_in_16_bits_killed_before_its_training(setting, tmp_path, monkeypatch, always):  # noqa: F811
    """It computes in fp32, and its pruned weights are rounded behind the training, not before it."""
    path = tmp_path / "model"  # of the setting
    half = shutil.copytree(path, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(half)
    own = [*setting, *OBS, f"model.path={half}", "finetune.steps=1", "finetune.every=1", "finetune.n_sequences=6"]
    own += ["finetune.batch=2", "model.dtype=auto", f"results_dir={tmp_path / 'runs'}"]
    run(*own)
    (whole,) = records(tmp_path)
    (tmp_path / "runs" / f"{whole['id']}.json").unlink()
    back = killed_at(monkeypatch, training, "judged", 1)
    with pytest.raises(SystemExit):
        run(*own)
    back()
    run(*own)
    (again,) = records(tmp_path)
    assert again["training"] == whole["training"] and again["windows"] == whole["windows"]


def test_an_evaluation_goes_on_behind_the_last_batch(setting, tmp_path, monkeypatch, always):  # noqa: F811
    from dass.evaluation import perplexity

    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *OBS, *overrides(one), "batch_size=2")
    back = killed_at(monkeypatch, perplexity, "window_losses", 3)
    with pytest.raises(SystemExit):
        run(*setting, *OBS, *overrides(other), "batch_size=2")
    back()
    calls = []
    original = perplexity.window_losses
    monkeypatch.setattr(perplexity, "window_losses", lambda *a: (calls.append(1), original(*a))[1])
    run(*setting, *OBS, *overrides(other), "batch_size=2")
    assert same(ended(tmp_path, one), ended(tmp_path, other))
    assert len(calls) == -(-len(records(one)[0]["windows"]) // 2) - 2


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_zero_shot_goes_on_behind_the_last_task(setting, tmp_path, monkeypatch, always, memory):  # noqa: F811
    from dass.evaluation import likelihood

    (items := tmp_path / "items").mkdir()
    evaluation = ["evaluation=zero_shot_folder", f"evaluation.path={write(items, any_items(4))}", "batch_size=100"]
    settings = [*(one for one in setting if not one.startswith("evaluation")), *evaluation, "method=wanda"]
    one, other = tmp_path / "one", tmp_path / "other"
    run(*settings, f"results_dir={one / 'runs'}")
    back = killed_at(monkeypatch, likelihood._Batch, "score", 3)  # one batch for each task
    with pytest.raises(SystemExit):
        run(*settings, f"results_dir={other / 'runs'}", f"memory={memory}")
    back()
    calls, original = [], likelihood._Batch.score
    monkeypatch.setattr(likelihood._Batch, "score", lambda batch: (calls.append(1), original(batch))[1])
    run(*settings, f"results_dir={other / 'runs'}", f"memory={memory}")
    assert len(calls) == len(TASKS) - 2
    assert records(one)[0]["metrics"] == records(other)[0]["metrics"]
    assert not [path for path in (other / "runs").iterdir() if path.name.startswith(".")]


def left_behind(setting, where, monkeypatch):  # noqa: F811
    """The folder of a run that was killed in its third block."""
    back = killed_at(monkeypatch, walked, "note", 3)
    with pytest.raises(SystemExit):
        run(*setting, *OBS, *overrides(where))
    back()
    (folder,) = (path for path in (where / "runs").iterdir() if path.name.startswith("."))
    return folder


def test_a_record_that_was_half_written_goes(setting, tmp_path, monkeypatch):  # noqa: F811
    """Its own, and that of another run that nobody is at."""
    runs = tmp_path / "other" / "runs"
    run(*setting, *OBS, *overrides(tmp_path / "other"))
    (path,) = runs.iterdir()
    name = path.name
    path.unlink()
    for left in (f".{name}.dypvlnv_", ".00112233aabbccdd.json.abcdefgh"):
        (runs / left).write_text("{")
    run(*setting, *OBS, *overrides(tmp_path / "other"))
    assert [path.name for path in runs.iterdir()] == [name]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "state"])
def test_what_is_damaged_is_not_believed(setting, tmp_path, monkeypatch, capsys, always, damage):  # noqa: F811
    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *OBS, *overrides(one))
    folder = left_behind(setting, other, monkeypatch)
    path = folder / STATE if damage == "state" else sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    run(*setting, *OBS, *overrides(other))
    told = capsys.readouterr().err
    assert "damaged, so it begins anew" in told and "goes on" not in told
    assert same(ended(tmp_path, one), ended(tmp_path, other))


def test_another_batch_size_begins_anew(setting, tmp_path, monkeypatch, capsys, always):  # noqa: F811
    left_behind(setting, tmp_path / "other", monkeypatch)
    run(*setting, *OBS, *overrides(tmp_path / "other"), "batch_size=3")
    assert "goes on" not in capsys.readouterr().err
    assert records(tmp_path / "other")[0]["config"]["resolved"]["batch_size"] == 3


def test_masks_that_the_first_attempt_did_not_keep_are_all_there(setting, tmp_path, monkeypatch, capsys, always):  # noqa: F811
    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *OBS, *overrides(one))
    back = killed_at(monkeypatch, walked, "note", 3)
    with pytest.raises(SystemExit):
        run(*setting, *OBS, *overrides(other)[:2])
    back()
    run(*setting, *OBS, *overrides(other))
    assert "no masks: begins anew" in capsys.readouterr().err
    assert same(ended(tmp_path, one), ended(tmp_path, other))


@pytest.mark.parametrize("what", ["code", "machine"])
def test_another_machine_or_code_begins_anew_with_its_losses_too(setting, tmp_path, monkeypatch, capsys, always, what):  # noqa: F811
    from dass.evaluation import perplexity
    from experiments import prune

    back = killed_at(monkeypatch, perplexity, "window_losses", 3)
    with pytest.raises(SystemExit):
        run(*setting, *OBS, *overrides(tmp_path / "other"), "batch_size=2")
    back()
    original, calls, scores = prune.machine_description, [], perplexity.window_losses
    if what == "code":
        monkeypatch.setattr(prune, "code_sha256", lambda: "edited")
    else:
        monkeypatch.setattr(prune, "machine_description", lambda device: original(device) | {"threads": 77})
    monkeypatch.setattr(perplexity, "window_losses", lambda *a: (calls.append(1), scores(*a))[1])
    run(*setting, *OBS, *overrides(tmp_path / "other"), "batch_size=2")
    assert "another machine or version, so it begins anew" in capsys.readouterr().err
    assert len(calls) == -(-len(records(tmp_path / "other")[0]["windows"]) // 2)


def test_a_short_run_keeps_nothing_and_a_failed_one_leaves_nothing(setting, tmp_path, monkeypatch):  # noqa: F811
    kept = []
    monkeypatch.setattr(Kept, "_write", lambda *_: kept.append(1))
    run(*setting, *OBS, *overrides(tmp_path / "other"))
    assert not kept
    monkeypatch.setattr(walked, "note", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*setting, "method=wanda", f"results_dir={tmp_path / 'runs'}")
    assert not list(tmp_path.glob("runs/.*"))


def test_writing_takes_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "perf_counter", lambda: now[0])
    kept, written = Kept(tmp_path, "me"), []

    def write(*_):
        written.append(now[0])
        now[0] += 10

    monkeypatch.setattr(kept, "_write", write)
    for _ in range(100):
        now[0] += 7
        if kept.is_due():
            kept.keep(1, [], dict, dict, lambda name, tensor: tensor)
    assert written[0] >= 60 and 10 * len(written) <= 0.05 * now[0] + 10 and len(written) > 2


@pytest.mark.parametrize("what", ["write_tensors", "_write_checked"])
def test_a_disk_that_is_full_costs_no_run(setting, tmp_path, monkeypatch, capsys, always, what):  # noqa: F811
    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *OBS, *overrides(one))

    def full(*_):
        raise DassError("Cannot write: free space.")

    monkeypatch.setattr(resume, what, full)
    run(*setting, *OBS, *overrides(other))
    assert "could not be kept: Cannot write" in capsys.readouterr().err
    assert same(ended(tmp_path, one), ended(tmp_path, other))


def test_what_failed_goes_on_from_what_was_kept(setting, tmp_path, monkeypatch, capsys, always):  # noqa: F811
    one, other = tmp_path / "one", tmp_path / "other"
    run(*setting, *OBS, *overrides(one))
    original = walked.note
    monkeypatch.setattr(
        walked, "note", lambda walked, step, *rest: original(walked, step, *rest) if step.index < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(*setting, *OBS, *overrides(other))
    monkeypatch.setattr(walked, "note", original)
    run(*setting, *OBS, *overrides(other))
    assert "goes on behind block 2 of 3" in capsys.readouterr().err
    assert same(ended(tmp_path, one), ended(tmp_path, other))


def test_blocks_that_share_state_are_never_gone_on_with(setting, tmp_path, monkeypatch, capsys, always):  # noqa: F811
    model = tmp_path / "model"
    tiny_model("gemma4_text", vocab_size=VOCABULARY).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    back = killed_at(monkeypatch, walked, "note", 2)
    given = [one for one in setting if not one.startswith("evaluation")] + ["evaluation=none", "method=wanda"]
    with pytest.raises(SystemExit):
        run(*given, f"results_dir={tmp_path / 'runs'}")
    back()
    assert not list(tmp_path.glob("runs/.*/state.json"))
    run(*given, f"results_dir={tmp_path / 'runs'}")
    assert "goes on" not in capsys.readouterr().err and len(records(tmp_path)) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_state_or_none(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    (tmp_path / resume.LOSSES).write_bytes(content)
    kept = Kept(tmp_path, "me")
    assert kept.state is None and kept.losses(1) == {}


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_state_that_is_whole_and_means_nothing_is_a_start_or_one_sentence(tmp_path, data):
    """Its checksums fit, and its entries are of other types, or not there."""
    for path in tmp_path.iterdir():
        path.unlink()
    blocks, kept = find_blocks(tiny_model(num_hidden_layers=2)), Kept(tmp_path, "me")
    names = [p.name for block in blocks for p in block.projections]
    facts = walked._facts(walked.Walked({name: {"axis": "in"} for name in names}, {"an expert": 3}, batch_size=2))
    tensors = {"batch 0": torch.ones(2, 3, 32), "mask x": torch.ones(2, dtype=torch.uint8)}
    kept._write(data.draw(st.integers(1, 2)), blocks, tensors, facts, lambda _, tensor: tensor)
    tree = json.loads(resume._checked(tmp_path / STATE))
    values = st.none() | st.integers(-1, 99) | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({})
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from([tree, tree["facts"], tree["files"]]).filter(bool))
        name = data.draw(st.sampled_from(sorted(part)))
        part[name] = data.draw(values)
        if data.draw(st.booleans()):
            del part[name]
        if not isinstance(tree.get("facts"), dict) or not isinstance(tree.get("files"), dict):
            break
    resume._write_checked(tmp_path / STATE, json.dumps(tree))
    found, left = Kept(tmp_path, "me"), walked.Walked(batch_size=2)
    try:
        start, batches = walked._goes_on(left, blocks, None, found, False)
    except DassError as error:
        assert "cannot be gone on with" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert 0 <= start <= 2 and all(isinstance(batch, torch.Tensor) for batch in batches)


@pytest.mark.slow
def test_kill_9_at_thirty_moments_changes_nothing(setting, tmp_path):  # noqa: F811
    code = "import dass.resume as r; r.EVERY, r.SHARE = 0.0, float('inf'); import runpy, sys; "
    code += "sys.argv[0] = 'prune'; runpy.run_module('experiments.prune', run_name='__main__')"
    command = [sys.executable, "-c", code, *setting, *OBS, "batch_size=1"]
    one, other = tmp_path / "one", tmp_path / "other"
    started = time.monotonic()
    subprocess.run([*command, *overrides(one)], cwd=ROOT, check=True)
    whole, draws = time.monotonic() - started, random.Random(0)
    for i in range(30):
        memory = ("resident", "stream")[i % 2]
        process = subprocess.Popen(
            [*command, f"memory={memory}", *overrides(other)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(whole * draws.uniform(0.5, 1.0))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, *overrides(other)], cwd=ROOT, check=True)
    assert same(ended(tmp_path, one), ended(tmp_path, other))
    assert json.loads((other / "model" / "dass.json").read_text())
