"""The hub, in the place of which a stand-in answers: online, offline, and all that it may refuse."""

import gzip
import io
import json
import re
import sys
import time
from pathlib import Path

import httpx2
import huggingface_hub
import lm_eval.tasks
import pandas
import pytest
from huggingface_hub import constants

from dass import hub
from dass.data.sources import find_source
from dass.errors import DassError
from dass.evaluation.zero_shot import REPOSITORIES, STOCK, TASKS, zero_shot_tasks
from dass.models import load_model, load_tokenizer, resolve_device
from tests.evaluation.test_zero_shot import any_items
from tests.hub_server import etag, serving
from tests.models import tiny_model
from tests.tokenizers import tiny_tokenizer

CPU = resolve_device("cpu")
OLD, NEW = "a" * 40, "b" * 40
MODEL = "somebody/gated-no-token-503"  # a name that tells nothing


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The files of a LLaMA-like and a Gemma-like model, in shards."""
    found = {}
    for kind in ("llama", "gemma"):
        folder = tmp_path_factory.mktemp(kind)
        tiny_model(kind).save_pretrained(folder, max_shard_size="40KB")
        tiny_tokenizer().save_pretrained(folder)
        found[kind] = files_of(folder)
        assert sum(name.endswith(".safetensors") for name in found[kind]) > 1
    return found


def aim(monkeypatch, cache, url):
    """Let huggingface_hub, which reads the environment once, speak to this address and use this cache."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "_down", {})
    monkeypatch.setattr(hub, "PATIENCE", (0, 0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()


@pytest.fixture
def stand_in(monkeypatch, tmp_path, models):
    with serving() as stand_in:
        aim(monkeypatch, tmp_path / "cache", stand_in.url)
        stand_in.add(MODEL, models["llama"], OLD)
        yield stand_in


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def refused(match, name=MODEL, revision="main", load=load_model):
    hub._down.clear()
    arguments = ("float32", CPU) if load is load_model else ()
    with pytest.raises(DassError, match=match) as error:
        load(name, revision, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_model_is_fetched_once_and_then_needs_no_network(stand_in, monkeypatch, models, kind):
    formats = {"original/params.json": b"{}", "pytorch_model.bin": b"never", "consolidated.safetensors": b"never"}
    stand_in.add("a/model", models[kind] | formats, OLD)
    model = load_model("a/model", "main", "float32", CPU)
    assert load_tokenizer("a/model", "main")("w7").input_ids == [7]
    assert all((a == b).all() for a, b in zip(model.parameters(), tiny_model(kind).parameters(), strict=True))
    assert not any(name in asked for asked in stand_in.asked for name in formats)
    asked = len(stand_in.asked)
    load_model("a/model", OLD, "float32", CPU)
    assert len(stand_in.asked) == asked  # a commit is never asked for again
    go_offline(monkeypatch)
    load_model("a/model", "main", "float32", CPU)
    assert len(stand_in.asked) == asked
    refused("the model a/other at main, and HF_HUB_OFFLINE", "a/other")


def test_a_branch_is_the_commit_where_it_stands(stand_in, models):
    stand_in.add(MODEL, models["llama"], OLD, branch="v1")
    assert hub.commit_of(MODEL, "main") == hub.commit_of(MODEL, None) == hub.commit_of(MODEL, "v1") == OLD
    stand_in.add(MODEL, models["llama"], NEW)
    assert hub.commit_of(MODEL, "main") == NEW and hub.commit_of(MODEL, "v1") == OLD
    asked = len(stand_in.asked)
    assert hub.commit_of(MODEL, "c" * 40) == "c" * 40 and len(stand_in.asked) == asked


def test_refusals_are_told_apart(stand_in, monkeypatch, models):
    refused("is not the model a/b, or it is private", "a/b")
    refused("is not the model a/b, or it is private", "a/b", OLD)
    for load in (load_model, load_tokenizer):
        refused("no revision nowhere of the model", revision="nowhere", load=load)
        refused(f"no revision {NEW} of the model", revision=NEW, load=load)
    refused("no folder .* /nowhere/at/all", "/nowhere/at/all")
    stand_in.gated = {MODEL}
    refused("is gated: accept its licence")
    monkeypatch.setenv("HF_TOKEN", "good")
    refused("is gated: accept its licence")
    refused("is not the model a/b, or it is private", "a/b")
    stand_in.token = "another"
    refused("refuses the token .* log in anew")
    refused("refuses the token .* log in anew", revision=OLD)
    monkeypatch.delenv("HF_TOKEN")
    stand_in.gated = set()
    pickles = {name: body for name, body in models["llama"].items() if ".safetensors" not in name}
    stand_in.add("a/pickles", pickles | {"pytorch_model.bin": b"never"}, OLD)
    refused(r"only as pickles \(pytorch_model.bin\)", "a/pickles")
    stand_in.add("a/nothing", pickles, OLD)
    refused("holds no weights model.safetensors", "a/nothing")
    for index in (b"[]", b"{", b'{"weight_map": 3}'):
        stand_in.add("a/index", pickles | {hub.INDEX: index}, etag(index))
        refused(f"{hub.INDEX} of the model a/index is none", "a/index")
    stand_in.add("a/bare", {}, OLD)
    refused("no file config.json in the model a/bare", "a/bare", load=hub_config)
    assert not any("never" in asked for asked in stand_in.asked)


def hub_config(name, revision):
    return hub.fetch(name, "config.json", revision)


def test_a_hub_in_trouble_is_asked_again_and_then_it_is_said(stand_in, capsys):
    stand_in.trouble = 2
    load_model(MODEL, "main", "float32", CPU)
    assert capsys.readouterr().err.count("the hub answers 503: again") == 2
    stand_in.trouble = 10**6
    refused("in trouble .*503", "a/b")
    refused("in trouble .*503", "a/b", OLD)
    assert hub.commit_of(MODEL, "main") == OLD  # what the cache knows


def test_a_hub_that_is_down_is_asked_once(stand_in, monkeypatch, tmp_path):
    asked = []

    def refuse(*_, timeout, **__):
        asked.append(timeout)
        raise httpx2.ConnectTimeout("timed out")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    for load, revision in ((hub.commit_of, "main"), (hub.model_files, OLD), (load_tokenizer, None)):
        with pytest.raises(DassError, match=rf"the model a/b at {revision or 'main'}.* \(timed out\)"):
            load("a/b", revision)
    assert asked == [constants.HF_HUB_ETAG_TIMEOUT]
    later = time.monotonic() + hub.MEMORY
    monkeypatch.setattr(hub.time, "monotonic", lambda: later)
    with pytest.raises(DassError, match="does not answer"):
        hub.commit_of("a/b", "main")
    assert len(asked) == 2


def test_a_cut_download_goes_on_and_one_that_cannot_ends(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda _: None)
    stand_in.cut = 3
    load_model(MODEL, "main", "float32", CPU)
    stand_in.cut, stand_in.ranges = 10**6, False
    aim(monkeypatch, tmp_path / "other", stand_in.url)
    refused("The download of the model .* was cut short")
    stand_in.cut = 0
    load_model(MODEL, "main", "float32", CPU)


def test_texts_of_the_hub(stand_in, monkeypatch):
    c4, wikitext = find_source("c4", "calibration"), find_source("wikitext2", "evaluation")
    documents = [{"text": f"w{i} w4", "url": ""} for i in range(5)]
    shard = gzip.compress("\n".join(map(json.dumps, documents)).encode())
    stand_in.add(c4.repository, {c4.files["calibration"]: shard}, OLD, "dataset")
    rows = ["", " = Title = \n", " w5 <unk> w6 \n"]
    parquet = pandas.DataFrame({"text": rows}).to_parquet()
    stand_in.add(wikitext.repository, {wikitext.files["evaluation"]: parquet}, OLD, "dataset")
    for offline in (False, True):
        if offline:
            go_offline(monkeypatch)
        assert list(c4.documents("calibration", None, "main")) == [document["text"] for document in documents]
        assert wikitext.documents("evaluation", None, OLD) == rows
    with pytest.raises(DassError, match="data set Salesforce/wikitext at main, and HF_HUB_OFFLINE"):
        wikitext.documents("calibration", None, None)


def test_zero_shot_sets_of_the_hub_are_those_of_lm_eval(stand_in, monkeypatch):
    items = any_items()
    names = {"winogrande": "winogrande_xl", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
    for repository in set(REPOSITORIES.values()):
        files, card = {}, "---\nconfigs:"
        for task in (task for task in TASKS if REPOSITORIES[task] == repository):
            name, commit = names.get(task, "default"), STOCK[task][1]
            card += f"\n- config_name: {name}\n  data_files:"
            splits = {"validation": items[task]} | ({"test": items[task][::-1]} if "arc" in task else {})
            for split, rows in splits.items():
                files[f"{name}/{split}-0.parquet"] = pandas.DataFrame(rows).to_parquet()
                card += f"\n  - {{split: {split}, path: {name}/{split}-*}}"
        stand_in.add(repository, files | {"README.md": f"{card}\n---\n".encode()}, commit, "dataset")
    for offline in (False, True):
        if offline:
            go_offline(monkeypatch)
        for name, task in zero_shot_tasks("hub", None, None).items():
            rows = [{key: row[key] for key in items[name][0]} for row in task.eval_docs]
            assert rows == (items[name][::-1] if "arc" in name else items[name])  # ARC is scored on its test split
    tasks = Path(lm_eval.tasks.__file__).parent
    for name in set(TASKS) - {"arc_challenge"}:  # which includes arc_easy's
        assert f"dataset_path: {REPOSITORIES[name]}\n" in (tasks / STOCK[name][0]).read_text()


def test_a_download_shows_the_time_that_is_left(stand_in, monkeypatch):
    class Terminal(io.StringIO):
        isatty = staticmethod(lambda: True)

    monkeypatch.setattr("sys.stderr", Terminal())
    hub.model_files(MODEL, "main")
    shown = sys.stderr.getvalue()
    assert re.search(r"download: .*%.*\[\d+:\d+<", shown) and "Fetching" not in shown and "Reconstructing" not in shown
