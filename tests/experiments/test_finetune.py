"""Masked continued training from end to end, on a tiny model: masks or a pruned folder, kill and resume, bad input."""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dass.claims import claimed
from dass.errors import DassError
from dass.sparsity import read_masks
from dass.training import masked
from experiments import finetune as app
from tests.experiments.test_prune import ROOT, composed, run, setting  # noqa: F401  (a fixture)
from tests.models import tiny_model

STEPS = ["finetune.steps=4", "finetune.every=2", "finetune.batch=3", "finetune.warmup=1", "finetune.learning_rate=0.01"]


@pytest.fixture
def tuning(setting, tmp_path):  # noqa: F811
    """The overrides of a training of a tiny model, whose masks are there."""
    run(*setting, "method=wanda", f"masks={tmp_path / 'masks'}", f"save_model={tmp_path / 'pruned'}")
    kept = [one for one in setting if not one.startswith("results_dir")]
    return [*kept, "calibration.n_sequences=6", *STEPS, f"save_model={tmp_path / 'tuned'}"]


def tune(*overrides):
    app.main(composed(*overrides, name="finetune"))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_text_is_as_long_as_the_file_says_whatever_its_source():
    assert composed(name="finetune").calibration.n_sequences == 256
    assert composed("calibration=packaged_wiki", name="finetune").calibration.n_sequences == 256
    assert composed("calibration.n_sequences=7", name="finetune").calibration.n_sequences == 7


def test_masks_or_a_pruned_folder_give_the_same_and_keep_their_zeros(tuning, tmp_path, capsys):
    tune(*tuning, f"masks={tmp_path / 'masks'}")
    said = capsys.readouterr().out
    assert "step 0: " in said and "step 4: " in said and "before" in said
    tuned = weights(tmp_path / "tuned")
    masks, _ = read_masks(tmp_path / "masks")
    assert len(masks) == 9
    for name, mask in masks.items():
        weight = tuned[f"{name}.weight"]
        assert (weight[~mask.keep] == 0).all() and (weight[mask.keep] != 0).float().mean() > 0.99
    tune(*tuning, f"model.path={tmp_path / 'pruned'}", f"save_model={tmp_path / 'again'}")
    again = weights(tmp_path / "again")
    assert all(torch.equal(one, again[name]) for name, one in tuned.items())
    assert "loss after 4 steps" in (tmp_path / "tuned" / "README.md").read_text()
    assert not list(tmp_path.glob(".*training"))
    capsys.readouterr()
    tune(*tuning, f"masks={tmp_path / 'masks'}")
    assert "already done" in capsys.readouterr().out


def test_killed_it_goes_on_to_the_same_weights(tuning, tmp_path, monkeypatch, capsys):
    given = [*tuning, f"masks={tmp_path / 'masks'}"]
    tune(*given)
    original = masked._step
    seen = []

    def killed(*arguments):
        seen.append(1)
        return original(*arguments) if len(seen) < 4 else sys.exit(1)

    monkeypatch.setattr(masked, "_step", killed)
    other = [f"save_model={tmp_path / 'other'}"]
    with pytest.raises(SystemExit):
        tune(*given, *other)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(masked, "_step", original)
    tune(*given, *other)
    assert "goes on behind step 2" in capsys.readouterr().err
    one, two = weights(tmp_path / "tuned"), weights(tmp_path / "other")
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_distillation_needs_a_dense_model(tuning, tmp_path):
    tune(*tuning, f"masks={tmp_path / 'masks'}", "finetune.loss=distill")
    pruned = [f"model.path={tmp_path / 'pruned'}", "finetune.loss=distill", f"save_model={tmp_path / 'again'}"]
    with pytest.raises(DassError, match="needs the dense model: give `teacher=DIR`"):
        tune(*tuning, *pruned)
    tune(*tuning, *pruned, f"teacher={tmp_path / 'model'}")
    one, two = weights(tmp_path / "tuned"), weights(tmp_path / "again")
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["finetune.steps=0"], "steps=0 trains nothing"),
        (["finetune.batch=7"], "shorter than one batch of 7"),
        (
            ["finetune.learning_rate=1e30"],
            r"lower finetune\.learning_rate; what it was at step 0 is kept in .*\.tuned\.training",
        ),
        (["finetune.loss=kl"], "loss=kl must be one of next, distill"),
        (["evaluation=none"], "no loss to judge by"),
        (["masks=null"], "No matrix of the model is pruned"),
        (["save_model=null"], "give `save_model=DIR`"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_no_model(tuning, tmp_path, changes, says):
    before = {path for path in tmp_path.iterdir() if "training" not in path.name}
    with pytest.raises(DassError, match=says) as raised:
        tune(*tuning, f"masks={tmp_path / 'masks'}", *changes)
    assert len(str(raised.value).splitlines()) == 1
    assert {path for path in tmp_path.iterdir() if "training" not in path.name} == before


@pytest.mark.parametrize("given", ["6", "null"])
def test_too_little_text_is_told_before_the_model_is_loaded(tuning, tmp_path, monkeypatch, given):
    monkeypatch.setattr(app, "load_model", None)
    with pytest.raises(DassError, match="The text is 6 sequences, shorter than one batch of 7"):
        tune(*tuning, f"masks={tmp_path / 'masks'}", f"calibration.n_sequences={given}", "finetune.batch=7")


def test_what_diverges_late_leaves_a_model_beside_which_no_training_replaces(tuning, tmp_path, monkeypatch, capsys):
    given, original, seen = [*tuning, f"masks={tmp_path / 'masks'}"], masked._step, []

    def broken(*arguments):
        seen.append(original(*arguments))
        return seen[-1] if len(seen) % 4 else float("nan")

    def diverges(*overrides):
        seen.clear()
        shutil.rmtree(tmp_path / ".tuned.training", ignore_errors=True)
        monkeypatch.setattr(masked, "_step", broken)
        with pytest.raises(DassError, match=r"lower finetune\.learning_rate; .*, and as a model in .*-step2") as raised:
            tune(*given, *overrides)
        monkeypatch.setattr(masked, "_step", original)
        return Path(str(raised.value).rpartition(" ")[2][:-1])

    first = diverges()
    assert first == tmp_path / "tuned-step2" and not (tmp_path / "tuned").exists()
    card = (first / "README.md").read_text()
    assert "for 2 of 4 steps, behind which it diverged" in card and "loss after 2 steps" in card
    saved, (masks, _) = weights(first), read_masks(tmp_path / "masks")
    assert all((saved[f"{name}.weight"][~mask.keep] == 0).all() for name, mask in masks.items())
    assert diverges() == first
    second = diverges("finetune.learning_rate=0.009")
    assert second.name.startswith("tuned-step2-") and all(
        torch.equal(one, weights(first)[name]) for name, one in saved.items()
    )
    tune(*given)
    assert all(torch.equal(one, weights(first)[name]) for name, one in saved.items())
    again = capsys.readouterr().out.split("step 2: ")
    assert len(again) == 5 and again[1].splitlines()[0] == again[-1].splitlines()[0]
    tune(*given, f"model.path={first}", "masks=null", f"save_model={tmp_path / 'lower'}")  # as the model that it is


def test_a_model_that_cannot_be_set_aside_hides_no_divergence(tuning, tmp_path, monkeypatch, capsys):
    original, seen = masked._step, []
    monkeypatch.setattr(masked, "_step", lambda *a: float("nan") if seen.append(1) or len(seen) > 2 else original(*a))

    def full(*_, **__):
        raise DassError("Cannot write the model: free space.")

    monkeypatch.setattr(app, "save_model", full)
    with pytest.raises(DassError, match=r"what it was at step 2 is kept in .*\.tuned\.training\.$"):
        tune(*tuning, f"masks={tmp_path / 'masks'}")
    assert "note: what the training was at step 2 is not saved as a model: Cannot write" in capsys.readouterr().err
    assert not (tmp_path / "tuned-step2").exists()


def test_masks_of_another_model(tuning, tmp_path):
    tiny_model(intermediate_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(DassError, match=r"fits no projection of this model"):
        tune(*tuning, f"masks={tmp_path / 'masks'}")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("name", ["pruned", "model", "masks"])
def test_what_is_read_is_never_replaced(tuning, tmp_path, name):
    read = {"pruned": f"model.path={tmp_path / 'pruned'}", "model": f"teacher={tmp_path / 'model'}"}
    given = [read.get(name, f"masks={tmp_path / 'masks'}"), f"save_model={tmp_path / name}"]
    before = sorted((tmp_path / name).iterdir())
    with pytest.raises(DassError, match=f"save_model=.*{name} would replace .*choose another folder"):
        tune(*tuning, *given)
    assert sorted((tmp_path / name).iterdir()) == before


def test_another_teacher_is_another_run(tuning, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(tmp_path / "model", teacher)
    given = [*tuning, f"masks={tmp_path / 'masks'}", "finetune.loss=distill", f"teacher={teacher}"]
    tune(*given)
    tune(*given)
    assert "already done" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(teacher)
    tune(*given)
    assert "already done" not in capsys.readouterr().out
    tiny_model(vocab_size=90).save_pretrained(teacher)
    with pytest.raises(DassError, match="The teacher knows 90 tokens, and the model 96"):
        tune(*given)


def test_masks_of_a_part_of_the_model_are_told(tuning, tmp_path, capsys):
    run(
        *[
            one
            for one in tuning
            if one.startswith(("model", "calibration.path", "calibration=", "evaluation", "tracking"))
        ],
        "method=wanda",
        r"exclude=layers\.2",
        f"masks={tmp_path / 'few'}",
        f"results_dir={tmp_path / 'runs'}",
    )
    tune(*tuning, f"masks={tmp_path / 'few'}")
    assert "note: 1 of 3 MLPs have no mask, such as model.layers.2.mlp: dense" in capsys.readouterr().err


def test_what_was_left_at_the_very_end_goes_with_the_next_start(tuning, tmp_path, monkeypatch):
    given = [*tuning, f"masks={tmp_path / 'masks'}"]
    monkeypatch.setattr(app.shutil, "rmtree", lambda *_, **__: None)
    tune(*given)
    assert (tmp_path / ".tuned.training").exists()
    monkeypatch.undo()
    tune(*given)
    assert not (tmp_path / ".tuned.training").exists()


def test_of_two_processes_with_one_command_one_trains(tuning, tmp_path, monkeypatch, capsys):
    """The other waits, and finds the model; what a training goes on from is removed before it may look."""
    given, seen = [*tuning, f"masks={tmp_path / 'masks'}"], []

    @contextmanager
    def waited(path, wait=True):
        """A claim that another process has: it is given back once its model is there."""
        monkeypatch.undo()
        tune(*given)
        monkeypatch.setattr(app, "tune", lambda *_: seen.append("trained"))
        with claimed(path, wait) as claim:
            yield claim

    monkeypatch.setattr(app, "claimed", waited)
    tune(*given)
    assert not seen and capsys.readouterr().out.count("already done, skipping") == 1
    original = shutil.rmtree
    monkeypatch.setattr(
        app.shutil, "rmtree", lambda path, **kw: seen.append((path, claim.exists())) or original(path, **kw)
    )
    claim = tmp_path / ".other.claim"
    monkeypatch.setattr(app, "tune", lambda *_: None)
    tune(*given, f"save_model={tmp_path / 'other'}")
    assert (tmp_path / ".other.training", True) in seen and not claim.exists()


def test_a_sweep_has_a_folder_for_each_run(tuning, tmp_path):
    command = [sys.executable, "-m", "experiments.finetune", "-m", *tuning, f"masks={tmp_path / 'masks'}"]
    subprocess.run([*command, "finetune.seed=0,1"], check=True, cwd=ROOT, capture_output=True)
    one, two = (weights(folder) for folder in (tmp_path / "tuned").iterdir() if folder.name[0] != ".")
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], two["model.layers.0.mlp.up_proj.weight"])
