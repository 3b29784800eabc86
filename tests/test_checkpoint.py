"""What a model's folder holds: weights that do not match their configuration, adapters, quantised and damaged files."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dass import checkpoint
from dass.checkpoint import model_contents, require_contents, stored_tensors
from dass.errors import DassError
from dass.models import load_model
from tests.models import tiny_model

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def store(folder, weights=None, config=None, without=()):
    """Add to the weights and the configuration of a folder."""
    kept = {name: t for name, t in load_file(folder / "model.safetensors").items() if name not in without}
    save_file(kept | (weights or {}), folder / "model.safetensors", {"format": "pt"})
    whole = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(whole))


def load(folder, dtype="float32"):
    return load_model(str(folder), None, dtype, CPU)


@pytest.mark.parametrize(
    ("weights", "config", "says"),
    [
        ({"model.extra.weight": torch.ones(3)}, {}, r"hold model\.extra\.weight, for which its config"),
        ({}, {"num_hidden_layers": 2}, r"hold model\.layers\.2\.input_layernorm\.weight \(and 8 more\), for which"),
        ({}, {"num_hidden_layers": 4}, r"lack model\.layers\.3\.input_layernorm\.weight \(and 8 more\)"),
        ({}, {"intermediate_size": 80}, r"layers\.0\.mlp\.down_proj\.weight as \(32, 64\) where .* \(32, 80\)"),
        ({}, {"tie_word_embeddings": True}, r"hold lm_head\.weight with values of its own"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, {}, "q_proj.bias, for which"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}, {}, "lora_A.*: merge the adapter"),
        ({UP: torch.ones(64, 32, dtype=torch.int8), f"{UP}_scale": torch.ones(64)}, {}, f"{UP} as I8, so it is"),
        ({UP: torch.ones(64, 32).to(torch.float8_e4m3fn)}, {}, f"{UP} as F8_E4M3, so it is quantised"),
        ({UP.replace("weight", "qweight"): torch.ones(4, 64, dtype=torch.int32)}, {}, "qweight as I32, so it is"),
        ({f"{UP}_scale": torch.ones(64)}, {}, f"{UP}_scale, for which"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_configuration(folder, capfd, weights, config, says):
    store(folder, weights, config)
    with pytest.raises(DassError, match=says) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize("head", ["left out", "the same"])
def test_a_tied_head_may_be_stored_too(folder, head):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    more = {"lm_head.weight": embedding.clone()} if head == "the same" else {}
    store(folder, more, {"tie_word_embeddings": True}, without=["lm_head.weight"])
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, embedding)


@pytest.mark.parametrize(
    ("architecture", "buffers"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        ("gpt2", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
    ],
)
def test_buffers_of_old_checkpoints_do_no_harm(tmp_path, architecture, buffers):
    tiny_model(architecture).save_pretrained(tmp_path)
    store(tmp_path, buffers)
    assert load(tmp_path) is not None


def test_a_weight_beyond_float16_is_told_before_the_work(folder):
    up = load_file(folder / "model.safetensors")[UP]
    up[0, 0] = 7e4
    store(folder, {UP: up})
    with pytest.raises(DassError, match=f"{UP} .* whose largest is 65504: choose model.dtype=bfloat16"):
        load(folder, "float16")
    assert load(folder, "bfloat16") is not None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("read", [load, model_contents])
def test_an_adapter_beside_the_weights(folder, name, read):
    (folder / name).write_text("{}")
    with pytest.raises(DassError, match=f"{name} is an adapter .LoRA. that is not merged"):
        read(folder)


# files


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="50KB")
    return folder


def first(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def dangling(folder):
    path = first(folder)
    path.unlink()
    path.symlink_to("nowhere")


def lacking(folder):
    first(folder).unlink()


def a_folder(folder):
    path = first(folder)
    path.unlink()
    path.mkdir()


def a_pipe(folder):
    path = first(folder)
    path.unlink()
    os.mkfifo(path)


def outside(folder):
    rename(folder, lambda shard: f"../{shard}")


def absolute(folder):
    rename(folder, lambda shard: f"/etc/{shard}")


def rename(folder, name):
    index = folder / checkpoint.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {key: name(shard) for key, shard in weight_map.items()}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dangling, "model-00001-of-.* is a link to nothing"),
        (lacking, "lacks model-00001-of-.*, which its index names"),
        (a_folder, "model-00001-of-.* is no file"),
        (a_pipe, "model-00001-of-.* is no file"),
        (outside, r"names \.\./model-.*, which is not in its folder"),
        (absolute, "names /etc/model-.*, which is not in its folder"),
    ],
)
@pytest.mark.parametrize("read", [load, model_contents])
def test_files_that_cannot_be_read(shards, change, says, read):
    change(shards)
    with pytest.raises(DassError, match=says):
        read(shards)


def test_a_file_that_may_not_be_read(shards, monkeypatch):
    allowed, shut = os.access, str(first(shards))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != shut and allowed(path, mode))  # root may all
    for read in (load, model_contents):
        with pytest.raises(DassError, match=f"{first(shards).name} may not be read"):
            read(shards)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 10**5, "\xff"]
)
def test_an_index_that_is_none(shards, index):
    (shards / checkpoint.INDEX).write_bytes(index.encode("latin-1"))
    for read in (load, model_contents):
        with pytest.raises(DassError, match=checkpoint.INDEX) as caught:
            read(shards)
        assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_the_weights_is_one_sentence(shards, data):
    path = first(shards)
    content = path.read_bytes()
    damaged = bytearray(content[: data.draw(st.integers(0, len(content) - 1))])
    if damaged and data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, min(len(damaged), 400) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        with pytest.raises(DassError, match=path.name) as caught:
            stored_tensors(shards)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        path.write_bytes(content)


# identity


def test_contents_are_hashed_again_only_where_a_file_was_touched(folder, monkeypatch):
    hashed, sha256 = [], checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: hashed.append(path.name) or sha256(path))
    before, path = model_contents(folder), folder / "model.safetensors"
    require_contents(folder, before)
    assert len(hashed) == len(set(hashed))
    stamp = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # hides nothing
    with pytest.raises(DassError, match="was changed while it was in use"):
        require_contents(folder, before)


def test_a_file_that_is_written_while_it_is_hashed(folder, monkeypatch):
    sha256 = checkpoint.file_sha256

    def meanwhile(path):
        (folder / "config.json").touch()
        return sha256(path)

    monkeypatch.setattr(checkpoint, "file_sha256", meanwhile)
    with pytest.raises(DassError, match="is being written to"):
        model_contents(folder)
