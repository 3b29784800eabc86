"""Calibration sets: the reference's draws, windows, BOS, and too little text."""

import gzip
import hashlib
import importlib
import json
import linecache
import random
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from dass.data import assets, sources
from dass.data.calibration import calibration_tokens
from dass.data.sources import SOURCES, find_source, source, wikitext2
from dass.data.tokens import draw_documents, draw_joined, require_in_vocabulary
from dass.errors import DassError
from dass.evaluation.perplexity import evaluation_windows
from tests.tokenizers import tiny_tokenizer, words


def documents(lengths, seed=0):
    rng = random.Random(seed)
    return [words(rng.choices(range(3, 96), k=length)) for length in lengths]


def draws_of_the_reference(texts, tokenizer, nsamples, seqlen, seed):
    """Wanda's get_c4, from the description in the paper: the global generator, documents, then a window of each."""
    random.seed(seed)
    loader = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > seqlen:
                break
        i = random.randint(0, ids.shape[1] - seqlen - 1)
        loader.append(ids[:, i : i + seqlen])
    return torch.cat(loader)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
def test_c4_from_a_local_shard_is_drawn_as_the_reference_draws(tmp_path, adds_bos, seed):
    texts, tokenizer = documents([5, 40, 21, 20, 19, 100, 33]), tiny_tokenizer(adds_bos)
    shard = tmp_path / "a [b] *" / "c4-train.00000-of-01024.json.gz"  # a name, not a pattern
    shard.parent.mkdir()
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps({"text": text, "timestamp": "2019", "url": "x"}) + "\n" for text in texts)
    drawn = calibration_tokens("c4", tokenizer, str(shard), 9, 20, seed, "tokenizer", False)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, draws_of_the_reference(texts, tokenizer, 9, 20, seed))


def test_wikitext2_training_windows(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "wikitext2", replace(SOURCES["wikitext2"], known={}))  # any text, for the test
    path = tmp_path / "wiki.train.raw"
    path.write_text(" \n = w3 = \n \n w4 w5 w6 \n" + "".join(f" w{i} w{i} \n" for i in range(7, 30)))
    rows = wikitext2("calibration", path)
    assert rows[:4] == ["", " = w3 = \n", "", " w4 w5 w6 \n"]
    tokenizer = tiny_tokenizer()
    drawn = calibration_tokens("wikitext2", tokenizer, path, 6, 10, 3, "tokenizer", False)
    random.seed(3)
    ids = tokenizer(" ".join(rows), return_tensors="pt").input_ids
    starts = [random.randint(0, ids.shape[1] - 10 - 1) for _ in range(6)]
    assert torch.equal(drawn, torch.cat([ids[:, i : i + 10] for i in starts]))


def test_joined_windows_do_not_overlap_and_depend_on_the_seed():
    texts = documents([7, 30, 11, 2, 50])
    everything = [int(word[1:]) for text in texts for word in text.split()]
    all_windows = {tuple(everything[i : i + 8]) for i in range(0, 96, 8)}
    drawn = draw_joined(texts, tiny_tokenizer(), 12, 8, 0, "tokenizer")
    assert {tuple(row) for row in drawn.tolist()} == all_windows
    few = [draw_joined(texts, tiny_tokenizer(), 4, 8, seed, "tokenizer") for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])


@pytest.mark.parametrize("draw", [draw_documents, draw_joined])
@pytest.mark.parametrize(("bos", "per_window"), [("tokenizer", 0), ("per_sequence", 1), ("none", 0)])
def test_bos(draw, bos, per_window):
    drawn = draw(documents([60, 70, 80]), tiny_tokenizer(adds_bos=True), 5, 20, 0, bos)
    assert drawn.shape == (5, 20)
    if bos != "tokenizer":
        assert (drawn == 1).sum(1).tolist() == [per_window] * 5
    if bos == "per_sequence":
        assert (drawn[:, 0] == 1).all()
    if bos == "tokenizer":
        assert (draw_joined(documents([60, 70, 80]), tiny_tokenizer(True), 10, 21, 0, bos) == 1).sum() == 3


def test_bos_that_the_tokenizer_lacks():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(DassError, match="lacks"):
        draw_joined(documents([60]), tokenizer, 2, 20, 0, "per_sequence")


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(DassError, match=r"none of the 3 documents is longer than 50 tokens \(the longest has 33\)"):
        draw_documents(documents([20, 33, 7]), tiny_tokenizer(), 2, 50, 0, "none")
    with pytest.raises(DassError, match=r"60 tokens are 3 whole sequences of 20, and 4"):
        draw_joined(documents([20, 33, 7]), tiny_tokenizer(), 4, 20, 0, "none")


@pytest.mark.parametrize("token", [-1, 96])
def test_tokens_outside_the_vocabulary(token):
    with pytest.raises(DassError, match="vocabulary has 96"):
        require_in_vocabulary(torch.tensor([[5, token]]), 96, "The calibration tokens")


@pytest.mark.parametrize(
    ("name", "settings", "says", "field"),
    [
        ("text_file", {}, "text_file needs a file: give `path`", "path"),
        ("tokens_file", {"join": False}, "tokens_file needs a file", "path"),
        ("c4", {"n_sequences": None, "join": False}, "c4 needs n_sequences and seq_len", "n_sequences"),
        ("c4", {"n_sequences": 0, "join": False}, "n_sequences=0 must be at least 1", "n_sequences"),
        ("c4", {}, "join does not apply to c4", "join"),
        ("packaged_c4", {"path": "text.txt"}, "path does not apply to packaged_c4: use text_file", "path"),
        ("text_file", {"path": "a", "revision": "main"}, "revision does not apply to text_file", "revision"),
    ],
)
def test_settings_that_are_missing_or_do_not_apply(name, settings, says, field):
    given = {"path": None, "n_sequences": 2, "seq_len": 8, "seed": 0, "bos": "none", "join": True} | settings
    with pytest.raises(DassError, match=says) as raised:
        calibration_tokens(name, tiny_tokenizer(), **given)
    assert raised.value.field == f"calibration.{field}"


def test_windows_that_cannot_be():
    with pytest.raises(DassError, match="too short"):
        draw_joined(documents([60]), tiny_tokenizer(), 2, 1, 0, "per_sequence")
    with pytest.raises(DassError, match="bos=always"):
        draw_joined(documents([60]), tiny_tokenizer(), 2, 8, 0, "always")


# the registry


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(DassError, match=r"text wikitext is unknown: did you mean wikitext2\? Choose one of c4, wikite"):
        find_source("wikitext", "calibration")
    with pytest.raises(
        DassError, match=r"The evaluation text c4 is unknown: choose one of wikitext2, packaged_wiki, t"
    ):
        find_source("c4", "evaluation")


@pytest.fixture
def letters(monkeypatch, tmp_path):
    """A source from outside: a file whose documents stand between form feeds; its evaluation text is reversed."""
    monkeypatch.setattr("dass.data.sources.SOURCES", dict(SOURCES))

    @source("letters", evaluates=True)
    def read_letters(part, path):
        found = path.read_text().split("\f")
        return found if part == "calibration" else found[::-1]

    path = tmp_path / "post.letters"
    path.write_text("\f".join(words(range(start, start + 20)) for start in (10, 40, 70)))
    return path


def test_a_source_from_outside(letters):
    drawn = calibration_tokens("letters", tiny_tokenizer(), letters, 6, 10, 0, "none", True)
    assert sorted(row[0] for row in drawn.tolist()) == [10, 20, 40, 50, 70, 80]
    assert all(row == list(range(row[0], row[0] + 10)) for row in drawn.tolist())
    windows = evaluation_windows("letters", tiny_tokenizer(), letters, 20, None, "none")
    assert windows[:, 0].tolist() == [70, 40, 10]
    with pytest.raises(DassError, match="letters needs a file"):
        calibration_tokens("letters", tiny_tokenizer(), None, 6, 10, 0, "none", True)


@pytest.mark.parametrize("name", ["letters", "c4"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("MARK = 'a'", "MARK = 'b'"), ("page[:9]", "page[:7]"), ("return None", "return 1"), ("step=1", "step=2")],
)
def test_all_that_a_source_from_outside_uses_is_in_its_identity(tmp_path, monkeypatch, name, before, after):
    """Its constants and helpers, how its sequences are drawn, and what that is given; not the comments."""
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "import functools\nfrom dass.data.sources import source\n\nMARK = 'a'\n\n\n"
        "def pages(text):\n    return [page[:9] for page in text.split(MARK)]\n\n\n"
        "def drawn(*given, step):\n    return None\n\n\nby_step = functools.partial(drawn, step=1)\n\n\n"
        f"def letters(path):\n    return pages(path.read_text())\n\n\nsource('{name}', draw=by_step)(letters)\n"
    )
    (tmp_path / "a.letters").write_text("w3")
    seen = []
    for one in (text, text + "# words\n", text.replace(before, after)):
        (tmp_path / "strange_letters.py").write_text(one)
        monkeypatch.delitem(sys.modules, "strange_letters", raising=False)
        linecache.clearcache()
        importlib.invalidate_caches()
        importlib.import_module("strange_letters")
        seen.append(find_source(name, "calibration").identity(tmp_path / "a.letters", None))
    assert seen[0] == seen[1] != seen[2]


def test_identities_are_of_what_a_name_hides(letters, tmp_path, monkeypatch):
    found = find_source("letters", "calibration").identity(letters, None)
    digest = hashlib.sha256(letters.read_bytes()).hexdigest()
    assert (found["sha256"], found["suffix"]) == (digest, ".letters") and len(found["code"]) == 16
    monkeypatch.setattr(find_source("letters", "calibration").read, "__module__", sources.__name__)  # README: in there
    assert "code" in find_source("letters", "calibration").identity(letters, None)
    text = find_source("text_file", "evaluation")
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("w3")
    other.write_text("w3")
    lines = shutil.copy(one, tmp_path / "a.jsonl")
    assert text.identity(one, None) == text.identity(other, None) != text.identity(lines, None)
    other.write_text("w4")
    assert text.identity(one, None) != text.identity(other, None)
    hub, packaged = find_source("c4", "calibration"), find_source("packaged_wiki", "calibration")
    assert hub.identity(None, "abc") == {"revision": "abc"} and "revision" not in hub.identity(one, "abc")
    assert packaged.identity(None, None) == {"sha256": assets.find("wiki", assets.TEXTS).sha256}
    with pytest.raises(DassError, match="There is no file"):
        text.identity(tmp_path / "nowhere.txt", None)


def test_packaged_articles_are_held_out(monkeypatch):
    articles = [words([3 + i % 90] * 4) for i in range(120)]
    monkeypatch.setattr(assets, "wiki_articles", lambda: articles)
    read = find_source("packaged_wiki", "evaluation").documents
    assert read("evaluation", None, None) == articles[:100] and read("calibration", None, None) == articles[100:]
