"""Texts and tokens from files, damaged files, and the hub out of reach."""

import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from safetensors.torch import save_file

from dass.data.calibration import calibration_tokens
from dass.data.sources import SOURCES, c4, find_source, text_file
from dass.errors import DassError


def test_text_files(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("w3 w4\nw5")
    lines.write_text('{"text": "w3", "url": 1}\n\n{"text": "w4 w5"}\n')
    assert text_file(text) == ["w3 w4\nw5"]
    assert text_file(lines) == ["w3", "w4 w5"]
    lines.write_text('{"text": "w3"}\n{"txt": "w4"}\n')
    with pytest.raises(DassError, match=r"b\.jsonl, line 2"):
        text_file(lines)
    lines.write_text('{"text": null}\n')
    with pytest.raises(DassError, match=r"b\.jsonl, line 1"):
        text_file(lines)


DAMAGED = {
    "empty": b"",
    "no gzip": b"no gzip",
    "cut off": gzip.compress(b'{"text": "w3"}\n')[:-9],
    "no text": gzip.compress(b"{}\n"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_shards(tmp_path, content):
    shard = tmp_path / "c4.json.gz"
    shard.write_bytes(content)
    with pytest.raises(DassError, match=r"c4\.json\.gz"):
        c4(shard)


@pytest.mark.parametrize(("content", "says"), [(None, "no file"), (b"", "no text"), (b"\xff\xfe\x00", "not UTF-8")])
def test_text_that_is_not_there(tmp_path, content, says):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DassError, match=says):
        text_file(path)


def test_tokens_file(tmp_path):
    def read(n_sequences=None, seq_len=None, bos="none"):
        return calibration_tokens("tokens_file", None, path, n_sequences, seq_len, 0, bos, False)

    path = tmp_path / "tokens.safetensors"
    input_ids = torch.arange(30).view(5, 6)
    save_file({"input_ids": input_ids}, path)
    assert torch.equal(read(), input_ids) and torch.equal(read(2, 6), input_ids[:2])
    for settings, says in [((6, None), "These are 5 sequences"), ((None, 7), "sequences of 6 tokens")]:
        with pytest.raises(DassError, match=says):
            read(*settings)
    with pytest.raises(DassError, match="used as it is"):
        read(bos="per_sequence")
    for bad in ({"input_ids": input_ids.float()}, {"input_ids": input_ids[0]}, {"other": input_ids}):
        save_file(bad, path)
        with pytest.raises(DassError, match="input_ids"):
            read()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DassError, match="not a safetensors file"):
        read()


def test_a_damaged_shard_of_c4(tmp_path):
    (tmp_path / "c4.json.gz").write_bytes(b"")
    with pytest.raises(DassError, match=r"c4\.json\.gz"):
        c4(tmp_path / "c4.json.gz")


WIKI = " \n = w3 = \n \n w4 w5 \n w6 w7 \n \n"


@pytest.fixture
def known_wiki(monkeypatch):
    """WikiText-2 as if each part were the text above."""
    known = dict.fromkeys(("calibration", "evaluation"), hashlib.sha256(WIKI.encode()).hexdigest())
    monkeypatch.setitem(SOURCES, "wikitext2", replace(SOURCES["wikitext2"], known=known))


def test_a_file_of_any_form_is_wikitext2_where_it_is_the_known_split(tmp_path, known_wiki):
    rows = ["", " = w3 = \n", "", " w4 w5 \n", " w6 w7 \n", ""]
    (tmp_path / "a.raw").write_text(WIKI)
    (tmp_path / "b.txt").write_bytes(("\ufeff" + WIKI.replace("\n", "\r\n")).encode())
    (tmp_path / "c.raw.gz").write_bytes(gzip.compress(WIKI[:-1].encode()))
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    pandas.DataFrame({"text": rows}).to_parquet(tmp_path / "e.parquet")
    for path in tmp_path.iterdir():
        assert find_source("wikitext2", "evaluation").documents("evaluation", path, None) == rows, path.name


@pytest.mark.parametrize("other", [WIKI[:9], WIKI + " w3 \n", WIKI.replace("w6", "w8"), WIKI.replace(" \n", "\n")])
def test_another_text_is_not_wikitext2(tmp_path, known_wiki, other):
    path = tmp_path / "wiki.test.raw"
    path.write_text(other)
    with pytest.raises(
        DassError, match=r"wiki\.test\.raw is not the text, whole and un.*: use text_file for a"
    ) as raised:
        find_source("wikitext2", "evaluation").documents("evaluation", str(path), None)
    assert raised.value.field == "evaluation.path"
    assert find_source("text_file", "evaluation").documents("evaluation", path, None) == [other]


def test_the_shipped_settings_pin_the_hub():
    for file in ("calibration/c4", "calibration/wikitext2", "evaluation/wikitext2"):
        settings = yaml.safe_load((Path(__file__).parents[2] / "conf" / f"{file}.yaml").read_text())
        assert re.fullmatch("[0-9a-f]{40}", settings["revision"])
        part = file.split("/")[0]
        assert find_source(settings["name"], part).identity(None, settings["revision"]) == {
            "revision": settings["revision"]
        }
