"""What no setting may be, what is given to no avail, and what a record says of its machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dass.errors import DassError
from experiments import app, notes, prune
from experiments.bounds import require_plain
from experiments.public import public
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
        ('calibration.path="a\tb"', "calibration.path=a b holds a line break or a control character"),
    ],
)
def test_values_that_can_be_nothing_that_is_meant(override, says):
    with pytest.raises(DassError, match=says) as found:
        check(composed(override))
    assert len(str(found.value)) < 300 and "\n" not in str(found.value)


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda one: st.dictionaries(st.text(), one)))
def test_any_config_is_plain_or_one_sentence(value):
    try:
        require_plain({"model": value if isinstance(value, dict) else {"path": value}})
    except DassError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.path=~/m", 'model.path="~/m"'),
        ("save_model=/a [b]/c", 'save_model="/a [b]/c"'),
        ("model.path=a,b", "model.path=a,b"),  # a sweep
        ('model.path="~/m"', 'model.path="~/m"'),
        ("method.axis={gate: in}", "method.axis={gate: in}"),
    ],
)
def test_paths_that_the_grammar_would_take_apart_are_quoted(argument, expected):
    assert app.quoted(argument) == expected


@pytest.mark.parametrize("argument", ["scale=smal", "experiment=table1_perplexit", "+experiment=nothing"])
def test_an_experiment_or_scale_that_is_not_there(argument):
    with pytest.raises(DassError, match=r"is unknown: .*hoose one of"):
        app.quoted(argument)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["method=magnitude", "calibration.n_sequences=3"],
            "calibration.n_sequences has no effect: magnitude",
        ),
        (["evaluation.limit=3"], "evaluation.limit has no effect"),
        (["evaluation=zero_shot_packaged", "evaluation.n_windows=3"], "evaluation.n_windows has no effect"),
        (["method=dense", "sparsity=4of8"], "sparsity has no effect: dense prunes nothing"),
        (["method.order_seed=3"], "method.order_seed has no effect"),
        (["evaluation=none", "evaluation.seq_len=9"], "evaluation.seq_len has no effect: nothing is evaluated"),
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
        (f"{Path.cwd()}/results/runs", "results/runs"),
    ],
)
def test_paths_are_relative_or_a_name(text, expected):
    assert public(text) == expected


def test_the_flag_may_stand_anywhere_and_a_reader_may_leave():
    command = [sys.executable, "-m", "experiments.prune", "dry_run=true", "-m", "method=wanda,dass", "evaluation=none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    report = f"{sys.executable} -m experiments.report experiment=diagnostics output=/dev/null/x | head -c 0"
    done = subprocess.run(report, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
