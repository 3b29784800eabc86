"""Texts and tokens from files, damaged files, and the hub out of reach."""

import gzip

import pytest
import torch
from safetensors.torch import save_file

from dass.data.calibration import calibration_tokens
from dass.data.texts import read_c4_shard, read_documents, read_tokens, read_wikitext
from dass.errors import DassError


def test_text_files(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("w3 w4\nw5")
    lines.write_text('{"text": "w3", "url": 1}\n\n{"text": "w4 w5"}\n')
    assert read_documents(text) == ["w3 w4\nw5"]
    assert read_documents(lines) == ["w3", "w4 w5"]
    lines.write_text('{"text": "w3"}\n{"txt": "w4"}\n')
    with pytest.raises(DassError, match=r"b\.jsonl, line 2"):
        read_documents(lines)
    lines.write_text('{"text": null}\n')
    with pytest.raises(DassError, match=r"b\.jsonl, line 1"):
        read_documents(lines)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b'{"text": "w3"}\n')[:-9], gzip.compress(b"{}\n")])
def test_damaged_shards(tmp_path, content):
    shard = tmp_path / "c4.json.gz"
    shard.write_bytes(content)
    with pytest.raises(DassError, match=r"c4\.json\.gz"):
        read_c4_shard(shard)


@pytest.mark.parametrize(("content", "says"), [(None, "no file"), (b"", "no text"), (b"\xff\xfe\x00", "not UTF-8")])
def test_text_that_is_not_there(tmp_path, content, says):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DassError, match=says):
        read_documents(path)


def test_tokens_file(tmp_path):
    path = tmp_path / "tokens.safetensors"
    input_ids = torch.arange(30).view(5, 6)
    save_file({"input_ids": input_ids}, path)
    assert torch.equal(calibration_tokens("tokens_file", None, path, None, None, 0, "none", False), input_ids)
    assert torch.equal(read_tokens(path, 2, 6), input_ids[:2])
    for n_sequences, seq_len, says in [(6, None, "holds 5 sequences"), (None, 7, "sequences of 6 tokens")]:
        with pytest.raises(DassError, match=says):
            read_tokens(path, n_sequences, seq_len)
    with pytest.raises(DassError, match="used as it is"):
        calibration_tokens("tokens_file", None, path, None, None, 0, "per_sequence", False)
    for bad in ({"input_ids": input_ids.float()}, {"input_ids": input_ids[0]}, {"other": input_ids}):
        save_file(bad, path)
        with pytest.raises(DassError, match="input_ids"):
            read_tokens(path, None, None)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DassError, match="not a safetensors file"):
        read_tokens(path, None, None)


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DassError, match="no route to the hub"):
        read_c4_shard(None)
    with pytest.raises(DassError, match="no route to the hub"):
        read_wikitext(None, "test")
