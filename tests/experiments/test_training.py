"""The stage of training in a run: what the record holds, another identity, kill and resume, bad input, the report."""

import json
import sys

import pytest
import torch

from dass.errors import DassError
from dass.records import read_records
from dass.sparsity import read_masks
from experiments import prune as app
from experiments.report import ReportConfig, report
from report.kinds import KINDS
from report.reading import runs_of
from tests.experiments.test_prune import composed, identity, records, run, setting  # noqa: F401  (a fixture)
from tests.report.test_kinds import drawn, material

TRAINED = ["finetune.steps=4", "finetune.every=2", "finetune.batch=2", "finetune.n_sequences=6"]
TRAINED += ["finetune.learning_rate=0.01", "method=wanda"]


def test_a_run_that_is_trained_on(setting, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Its record follows loss and mask; killed in the middle, it goes on to the same numbers."""
    run(*setting, "method=wanda")
    run(*setting, *TRAINED)
    plain, trained = sorted(records(tmp_path), key=lambda record: "training" in record)
    history = trained["training"]
    assert [one["step"] for one in history] == [0, 2, 4] and history[0]["overlap"] == 1
    assert history[0]["windows"] == pytest.approx(plain["windows"], rel=1e-5)
    assert history[-1]["windows"] == pytest.approx(trained["windows"], rel=1e-5)
    assert history[-1]["loss"] < history[0]["loss"] and trained["sparsity"]["targeted"] == 0.5
    assert trained["determinants"]["method"]["training"]["steps"] == 4 and "training" in trained["stages"]
    (tmp_path / "runs" / f"{trained['id']}.json").unlink()
    original, seen = torch.nn.utils.clip_grad_norm_, []  # not a function of ours, whose code the identity holds

    def killed(*arguments):
        seen.append(1)
        return original(*arguments) if len(seen) < 4 else sys.exit(1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
    with pytest.raises(SystemExit):
        run(*setting, *TRAINED)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", original)
    (state,) = (tmp_path / "runs").glob(".*/training.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"seconds": 1000.0}))
    run(*setting, *TRAINED)
    assert "goes on behind step 2" in capsys.readouterr().err
    again = json.loads((tmp_path / "runs" / f"{trained['id']}.json").read_text())
    assert again["stages"]["training"]["seconds"] > 1000  # of both processes
    assert again["training"] == history and not list((tmp_path / "runs").glob(".*/training.json"))
    made = KINDS["stability"](material(*read_records(tmp_path / "runs")))
    frame = made.grids[0].frame
    assert list(frame.Step) == ["0", "2", "4", "—"] and frame.Overlap[0] == "1.000"
    assert frame.Loss[0].startswith(f"{history[0]['loss']:.4f}") and frame.Exchanged[0].startswith("≈")
    assert len(drawn(made).axes) == 2
    report(ReportConfig(records=str(tmp_path / "runs"), output=str(tmp_path / "out")))
    assert len(runs_of(read_records(tmp_path / "runs"))) == 2


def test_training_is_part_of_the_identity(setting):  # noqa: F811
    same = [[], ["finetune.steps=0"], ["finetune.batch=9"]]
    assert len({identity(setting, "method=wanda", *one) for one in same}) == 1
    other = [[], TRAINED, [*TRAINED, "finetune.learning_rate=0.02"], [*TRAINED, "finetune.n_sequences=5"]]
    assert len({identity(setting, "method=wanda", *one) for one in other}) == 4
    magnitude = [[*TRAINED, "method=magnitude"], [*TRAINED, "method=magnitude", "calibration.n_sequences=3"]]
    assert len({identity(setting, *one) for one in magnitude}) == 2  # the text is read, to train on


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["method=dense"], "finetune.steps=4 has no mask to train under"),
        (["evaluation=none"], "finetune.steps=4 is judged by a text: give one"),
        (["memory=stream"], "needs the whole model in memory"),
        (["method.order=spread"], "in the released order"),
        (["finetune.loss=distill"], "for experiments.finetune"),
        (["finetune.batch=7"], "shorter than one batch of 7"),
        (["finetune.every=0"], "every=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(setting, tmp_path, changes, says):  # noqa: F811
    with pytest.raises(DassError, match=says):
        run(*setting, *TRAINED, *changes)
    assert not records(tmp_path)


def test_too_little_text_is_told_before_the_model_is_loaded(setting, monkeypatch):  # noqa: F811
    monkeypatch.setattr(app, "load", None)
    with pytest.raises(DassError, match="The text is 6 sequences, shorter than one batch of 7"):
        run(*setting, *TRAINED, "finetune.batch=7")


def test_a_training_that_diverges_leaves_the_masks(setting, tmp_path):  # noqa: F811
    """They are those of the same pruning without a training; there is no model, and no record."""
    asked = [f"masks={tmp_path / 'masks'}", f"save_model={tmp_path / 'saved'}"]
    with pytest.raises(DassError, match=r"lower finetune\.learning_rate"):
        run(*setting, *TRAINED, "finetune.learning_rate=1e30", *asked)
    assert not records(tmp_path) and not (tmp_path / "saved").exists()
    masks, _ = read_masks(tmp_path / "masks")
    run(*setting, "method=wanda", f"masks={tmp_path / 'plain'}")
    plain, _ = read_masks(tmp_path / "plain")
    assert len(masks) == 9 and all(torch.equal(one.keep, plain[name].keep) for name, one in masks.items())
    run(*setting, *TRAINED, *asked)  # its own masks may be replaced
    (trained,) = [record for record in records(tmp_path) if "training" in record]
    assert set(trained["files"]) == {"masks.safetensors", "model.safetensors"} and not trained["failed"]
