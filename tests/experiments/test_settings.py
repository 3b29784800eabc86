"""What no setting may be, what is given to no avail, and what a record says of its machine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dass import tracking
from dass.errors import DassError
from dass.terminal import printing
from experiments import app, notes, prune
from experiments.app import CONF
from experiments.arguments import prepared
from experiments.bounds import require_plain
from experiments.public import public, public_override, public_text
from experiments.resolve import check
from tests.experiments.test_prune import composed, records, setting  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"batch_size={10**30}", "batch_size has 31 digits"),
        (f"calibration.seq_len={-(10**25)}", "calibration.seq_len has 26 digits"),
        (f"method.alpha={10**20}", "method.alpha has 21 digits"),
        ("method.damping=inf", "method.damping=inf is not a finite number"),
        ("method.alpha=nan", "method.alpha=nan is not a finite number"),
        ("method.name=7", "method.name=7 is not a name"),
        ("model.name=' '", "model.name=  is not a name"),
        ("model.path=" + "a" * 5000, "model.path=a.*… cannot be a path here"),
        ("results_dir=" + "a/" * 5000, "results_dir=.*cannot be a path here"),
        ("save_model=''", "save_model= cannot be a path here .it is empty"),
        ("masks='~nobody_at_all/x'", "masks=~nobody_at_all/x cannot be a path here"),
        ("device=meta", "device=meta cannot be used here"),
        ("exclude='(?i)x'", "exclude=.*i.x is not a regular expression .global flags"),
        ("exclude='x{99999999999}'", "exclude=x.* is not a regular expression .the repetition number is too large"),
        ('calibration.path="a\tb"', "calibration.path=a b holds a line break or a control character"),
    ],
)
def test_values_that_can_be_nothing_that_is_meant(override, says):
    with pytest.raises(DassError, match=says) as found:
        assert check(composed(override)).device is None
    assert len(str(found.value)) < 300 and "\n" not in str(found.value)


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda one: st.dictionaries(st.text(), one)))
def test_any_config_is_plain_or_one_sentence(value):
    try:
        require_plain({"model": value if isinstance(value, dict) else {"path": value}})
    except DassError as error:
        assert "\n" not in str(error)


ODD = ["~/m", "a b", "a,b", "a=b", "a[1]{2}(3)", "it's", 'say "hi"', "ü", "a#b&c", "a\\", " a"]


@pytest.mark.parametrize("path", ODD)
def test_paths_are_what_was_typed(path):
    (argument,) = prepared([f"model.path={path}"], CONF)
    assert composed(argument).model.path == path
    assert prepared([argument], CONF) == [argument]  # who quotes himself is understood, too


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.path=/a b,~/c", "-m"], ["-m", 'model.path="/a b","~/c"']),  # a sweep
        (["model.path=m/x,glob(*)", "-m"], ["-m", "model.path=m/x,glob(*)"]),
        (["seed=1", "~exclude", "--config-dir", "d", "-m"], ["--config-dir", "d", "-m", "seed=1", "~exclude"]),
        (["seed=1", "experiment=reproduce"], ["--multirun", "seed=1", "experiment=reproduce"]),
        (["experiment=reproduce", "--cfg", "job"], ["--cfg", "job", "experiment=reproduce"]),
        (["method.axis={gate: in}", "model.path=m-1/x"], ["method.axis={gate: in}", "model.path=m-1/x"]),
        (["method=mine", "--config-dir=d"], ["--config-dir=d", "method=mine"]),
    ],
)
def test_arguments_as_hydra_wants_them(arguments, expected):
    assert prepared(arguments, CONF) == expected


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("scale=smal", "small"),
        ("experiment=table1_perplexit", "table1_perplexity"),
        ("+experiment=reproduc", "reproduce"),
        ("model=llama2", "llama2_7b"),
        ("method=dense,wandaa", "wanda"),
        ("sparsity=2of5", "2of4"),
        ("calibration=null", None),
        ("method=7", None),
    ],
)
def test_an_option_that_is_not_there(argument, near):
    hint = f"did you mean {near}. Choose" if near else "choose"
    with pytest.raises(DassError, match=rf"is unknown: {hint} one of"):
        prepared([argument], CONF)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: [a", "expected ',' or ']'"),
        (b"name: caf\xe9", "can't decode byte 0xe9"),
        (b"name: a\nname: b", "duplicate key name"),
        (b"7", "Invalid loaded object type"),
        (b"null: x", "Incompatible key type"),
        (b"name: " + b"[" * 2000 + b"]" * 2000, "recursion"),
        (b"- a", "list is not a subclass of ModelConfig"),
        (b"seed: " + b"9" * 5000, "4300 digits"),
        (b"name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys, content, says):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["prune", f"--config-dir={tmp_path}", "model=mine"])
    monkeypatch.setattr(app, "exit_on_signals", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        app.run_app(prune.main, "prune")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith("error: ") and says in line and "model/mine" in line


@pytest.mark.parametrize(("debug", "full"), [([], "0"), (["debug=true"], "0"), ([], "1")])
def test_an_error_is_one_line_unless_all_of_it_is_asked_for(tmp_path, monkeypatch, capsys, debug, full):
    given = ["model=local", "model.path=/nowhere", f"results_dir={tmp_path}", *debug]
    monkeypatch.setattr(sys, "argv", ["prune", *given])
    monkeypatch.setattr(app, "exit_on_signals", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    with pytest.raises(DassError if debug or full == "1" else SystemExit) as ended:
        app.run_app(prune.main, "prune")
    if isinstance(ended.value, SystemExit):
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1 and "/nowhere" in line
    else:
        assert "/nowhere" in str(ended.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["method=magnitude", "calibration.n_sequences=3"],
            "calibration.n_sequences has no effect: magnitude",
        ),
        (["evaluation.limit=3"], "evaluation.limit has no effect"),
        (["seed=1", "method=magnitude"], "seed has no effect: no calibration tokens are drawn"),
        (["method=wanda", "method.damping=0.5"], "method.damping has no effect: neither the criterion wanda"),
        (["method=sparsegpt", "method.block_size=64"], "method.block_size has no effect: it is the group of an un"),
        (["method=sparsegpt", "method.block_size=64", "sparsity=unstructured", "method.damping=0.1"], ""),
        (["method=dass", "method.update=obs", "method.damping=0.1", "method.alpha=1"], ""),
        (["model.revision=main"], "model.revision has no effect: the model is not read from the hub"),
        (["tracking=none", "tracking.project=x"], "tracking.project has no effect: nothing is tracked"),
        (["method=dense", "model.projections={up: x}"], "model.projections has no effect: dense prunes nothing"),
        (["evaluation=zero_shot_packaged", "evaluation.field=x"], "evaluation.field has no effect: zero-shot tasks"),
        (
            ["evaluation=wikitext2", "evaluation.path=x", "evaluation.revision=main"],
            "evaluation.revision has no effect: the text is not read from the hub",
        ),
        (["evaluation=zero_shot_packaged", "evaluation.n_windows=3"], "evaluation.n_windows has no effect"),
        (["method=dense", "sparsity=4of8"], "sparsity has no effect: dense prunes nothing"),
        (["method=dense", "masks=m"], "masks has no effect: dense prunes nothing"),
        (["method.order_seed=3"], "method.order_seed has no effect"),
        (["evaluation=none", "evaluation.seq_len=9"], "evaluation.seq_len has no effect: nothing is evaluated"),
        (["finetune.batch=9"], "finetune.batch has no effect: nothing is trained on: set finetune.steps"),
        (
            [
                "method=wanda",
                "calibration.n_sequences=3",
                "sparsity=4of8",
                "method.order=random",
                "method.order_seed=1",
            ],
            "",
        ),
    ],
)
def test_a_setting_without_an_effect_is_a_note(capsys, monkeypatch, given, told):
    monkeypatch.setattr(notes, "_said", set())
    plan = check(composed(*given))
    for _ in range(2):  # of a sweep: said once
        notes.note_idle(plan, given)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and (not told or told in lines[0])


def test_a_record_says_no_place_of_a_machine(setting, tmp_path):  # noqa: F811
    prune.main(composed(*setting, "method=wanda"))
    (record,) = records(tmp_path)
    assert str(tmp_path) not in json.dumps(record) and record["config"]["model"]["path"] == "…/model"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/models/x", "…/x"),
        ("model.path=~/x/y z", "model.path=…/y z"),
        ("'/tmp/a b'", "'…/a b'"),
        ("https://host/a/b and a/b and 4/8", "https://host/a/b and a/b and 4/8"),
        ("Cannot read ~nobody_at_all/x/y: check it.", "Cannot read …/y: check it."),
        ("Cannot read /data/a=b/(me)/y: check it.", "Cannot read …/y: check it."),
        (f"Cannot read {Path.home()}/my models/x.", "Cannot read …/my models/x."),
        (f"{Path.cwd()}/results/runs", "results/runs"),
    ],
)
def test_paths_are_relative_or_a_name(text, expected):
    assert public_text(text) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "seed=1"),
        ("model.path=/home/me/x", "model.path=…/x"),
        ('model.path="/home/Jane Doe/x, y/m"', 'model.path="…/m"'),
        ("model.path=/home/me/x,~/y", "model.path=…/x,…/y"),
        ("save_model=out/x", "save_model=out/x"),
    ],
)
def test_overrides_and_settings_say_no_place(override, expected):
    assert public_override(override) == expected
    assert public({"path": ["/home/Jane Doe/x: y/m"]}) == {"path": ["…/m"]}


def test_a_home_inside_the_working_folder_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    for text in (f"{tmp_path}/me/x", "~/x"):
        assert public(text) == "…/x" and public_text(f"see {text}") == "see …/x"
    assert public(f"{tmp_path}/other/x") == "other/x"
    for text in ("s3://key:secret@bucket/a/x", "gs://bucket/x?sig=1", "S3A://bucket/x", "ssh://me@host/x"):
        assert public(text) == "…/x" and public_text(f"see {text} there") == "see …/x there"
    assert public_text("at https://me:token@host/x?sig=1, y") == "at https://host/x y"
    assert public_text("at https://huggingface.co/a/b") == "at https://huggingface.co/a/b"


@pytest.mark.parametrize("command", ["prune dry_run=true", "report output={}"])
def test_a_reader_may_leave(tmp_path, command):
    """Of buffered output Python would complain at the very end, of other at once."""
    left = f"{sys.executable} -m experiments.{command.format(tmp_path)} | true"
    done = subprocess.run(left, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert done.stderr == ""


def test_a_terminal_without_a_character_shows_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with printing():
        print("5 µs")
        assert written.getvalue() == b"5 ?s\n"  # at once


@pytest.mark.parametrize("how", ["start", "log", "finish"])
def test_tracking_never_costs_a_run(setting, tmp_path, monkeypatch, capsys, how):  # noqa: F811
    """Whatever wandb raises is one note."""
    import wandb

    def fail(*_, **__):
        raise OSError(28, "No space left\non device")

    if how == "start":
        monkeypatch.setattr(tracking, "ROOM", 10**18)
    else:
        monkeypatch.setattr(wandb.sdk.wandb_run.Run, how, fail)
    given = [*(one for one in setting if one != "tracking=none"), f"tracking.folder={tmp_path}"]
    prune.main(composed(*given))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: wandb keeps no more")]
    assert len(notes) == 1 and len(records(tmp_path)) == 1
    monkeypatch.undo()
    prune.main(composed(*given, "rerun=true"))  # the next run of a sweep is mirrored again
    assert "wandb" not in capsys.readouterr().err and wandb.run is None


def test_tracking_with_a_name_that_wandb_does_not_take_is_refused(setting):  # noqa: F811
    with pytest.raises(DassError, match="wandb does not take what it is given"):
        prune.main(composed(*setting, "tracking=wandb", "tracking.project='a/b'"))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["method=magnitude_released", "exclude=nosuch"], "exclude=nosuch"),
        (["method=dass", "+method.exclude=nosuch", "exclude=up_proj"], "method.exclude=nosuch"),
        (["method=dass", "exclude=q_proj"], "exclude=q_proj"),  # no target
    ],
)
def test_an_exclude_that_matches_nothing(setting, given, key):  # noqa: F811
    with pytest.raises(DassError, match=f"^{key} matches none"):
        prune.main(composed(*setting, *given))


def test_a_threshold_for_experts_without_experts_is_a_note(setting, capsys):  # noqa: F811
    prune.main(composed(*setting, "calibration.min_expert_tokens=3", "evaluation=none", "evaluation.path=null"))
    assert "note: calibration.min_expert_tokens has no effect: the model has no experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["model.device_map=cuda"], "model.device_map=cuda is unknown: choose auto or null"),
        (["model.device_map=auto", "memory=stream"], "takes all GPUs and no disk"),
        (["model.device_map=auto", "device=cpu"], "takes all GPUs and no disk"),
        (["method=dense", "method.name=mine"], "The method mine has no criterion"),
        (["method=wanda", "method.name=dense"], "method.name=dense is the name of what is not pruned"),
        (["method=compare", "method.methods=7"], "at least two"),
        (["method=compare", "method.methods=wanda"], "at least two"),
        (["method=compare", "method.methods=[" + "a" * 300 + ",wanda]"], "is unknown"),
        (["method=compare", "method.methods=[wandaa,dass]"], "did you mean wanda"),
        (["method=adaptive", "method.candidates=[wanda,[dass]]"], "is unknown"),
        (["method=adaptive", "method.candidates=[dass,{name: wanda, alpha: 1}]"], "alpha has no effect on wanda"),
    ],
)
def test_methods_and_places_that_are_named_wrongly(given, says):
    with pytest.raises(DassError, match=says):
        check(composed(*given, "evaluation=none"))
