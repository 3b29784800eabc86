"""Loading and refusing models."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig

from dass import models
from dass.checkpoint import model_contents
from dass.errors import DassError
from dass.models import (
    batch_size_for,
    load_model,
    load_tokenizer,
    require_supported,
    resolve_device,
    resolve_dtype,
)
from dass.streaming import load_streamed
from tests.models import ARCHITECTURES, LAYOUTS, SIZES, tiny_model
from tests.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}}
COMPRESSED |= {"sparsity_config": {"format": "sparse-24-bitmask"}}


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load(folder):
    model = load_model(str(folder), None, "float32", CPU)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for loaded, saved in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(loaded, saved)
    assert load_model(str(folder), None, "bfloat16", CPU).dtype == torch.bfloat16
    assert load_tokenizer(str(folder), None)("w5 w6").input_ids == [5, 6]
    assert resolve_dtype("auto", str(folder), None) == "float32"


def test_a_model_is_spread_over_what_is_there(folder, monkeypatch):
    spread = load_model(str(folder), None, "float32", CPU, "auto")
    assert all(torch.equal(a, b) for a, b in zip(spread.parameters(), tiny_model().parameters(), strict=True))

    def offloaded(*arguments):
        model, loading = original(*arguments)
        model.lm_head.to("meta")
        return model, loading

    original = models.from_folder
    monkeypatch.setattr(models, "from_folder", offloaded)
    with pytest.raises(DassError, match="does not fit the GPUs"):
        load_model(str(folder), None, "float32", CPU, "auto")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DassError, match="holds no weights"):
        load_model(str(folder), None, "float32", CPU)


def test_a_folder_with_pickles_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DassError, match="holds no weights"):
        load_model(str(folder), None, "float32", CPU)


def test_weights_cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(DassError, match="Cannot load"):
        load_model(str(folder), None, "float32", CPU)


def test_a_missing_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DassError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), None, "float32", CPU)


def test_nan_in_the_weights(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(DassError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        load_model(str(tmp_path), None, "float32", CPU)


@pytest.mark.parametrize("load", [load_model, load_streamed])
def test_nan_in_a_buffer_that_decides(tmp_path, load):
    """A router's bias is in the checkpoint, and no parameter."""
    model = tiny_model("deepseek_v3")
    name, bias = next(one for one in model.named_buffers() if "correction_bias" in one[0])
    bias[1] = torch.nan
    model.save_pretrained(tmp_path / "model")
    more = [tmp_path / "scratch"] if load is load_streamed else []
    with pytest.raises(DassError, match=rf"{re.escape(name)}.*NaN"):
        load(str(tmp_path / "model"), None, "float32", CPU, *more)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "abc"}, "Cannot load"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantised"),
        (
            {"quantization_config": COMPRESSED},
            "llama are stored compressed, as sparse-24-bitmask, and not quantised: .* save_compressed=False",
        ),
        ({"quantization_config": COMPRESSED | {"config_groups": {"group_0": {}}}}, "is quantised"),
        ({"model_type": "nosuch"}, "Cannot load"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "nosuch"}, "Cannot load"),
    ],
    ids=["broken", "quantised", "compressed", "both", "unknown", "remote-code"],
)
def test_configs_that_are_refused(folder, change, says):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DassError, match=says):
        load_model(str(folder), None, "float32", CPU)


def test_no_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(DassError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mamba", "has no attention"),
        ("mamba2", "has no attention"),
        ("falcon_mamba", "has no attention"),
        ("rwkv", "has no attention"),
        ("xlstm", "has no attention"),
        ("gemma3n_text", "several streams"),
        ("gemma3n", "several streams"),
        ("nemotron_h", "attention or an MLP, not both"),
        ("t5", "an encoder and a decoder"),
        ("bart", "an encoder and a decoder"),
    ],
)
def test_architectures_that_the_config_refuses(tmp_path, model_type, says):
    config = CONFIG_MAPPING[model_type]()
    with pytest.raises(DassError, match=f"{model_type}.* {says}"):
        require_supported(config)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(DassError, match=says):
        load_model(str(tmp_path), None, "float32", CPU)


@pytest.mark.parametrize("model_type", [*LAYOUTS, *ARCHITECTURES, "jamba", "bamba", "qwen3_next", "lfm2", "xglm"])
def test_architectures_that_the_config_does_not_refuse(model_type):
    if model_type in ARCHITECTURES:
        config = ARCHITECTURES[model_type][1](**SIZES)
    else:
        config = CONFIG_MAPPING[LAYOUTS.get(model_type, (model_type,))[0]]()
    require_supported(config)


# identity


def test_contents_are_an_identity_whatever_the_place_and_the_card(folder, tmp_path):
    before = model_contents(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    for beside in ("README.md", "LICENSE.txt", "dass.json", ".gitattributes", "pytorch_model.bin"):
        (moved / beside).write_text("{}")
    assert model_contents(moved) == before and len(before) == 16
    with pytest.raises(DassError, match="no model folder"):
        model_contents(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_contents_that_count(folder, name):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    before = model_contents(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = model_contents(folder)
    (folder / name).unlink()
    if name == "model.safetensors":
        with pytest.raises(DassError, match="holds no weights"):
            model_contents(folder)
        assert changed != before
    else:
        assert len({before, changed, model_contents(folder)}) == 3


def test_shards_in_a_folder_of_their_own_count(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    (tmp_path / "shards").mkdir()
    for shard in set(weight_map.values()):
        (tmp_path / shard).rename(tmp_path / "shards" / shard)
    index.write_text(json.dumps({"weight_map": {key: f"shards/{shard}" for key, shard in weight_map.items()}}))
    before = model_contents(tmp_path)
    last = tmp_path / "shards" / max(weight_map.values())
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_contents(tmp_path) != before
    last.unlink()
    with pytest.raises(DassError, match=f"lacks .*{last.name}, which its index names"):
        model_contents(tmp_path)


def test_devices_and_dtypes():
    assert resolve_device("cpu") == CPU
    for bad in ("tpu9", "cuda:99"):
        with pytest.raises(DassError, match="cannot be used here"):
            resolve_device(bad)
    with pytest.raises(DassError, match=r"dtype=int8 is unknown"):
        resolve_dtype("int8", "unused", None)
    assert [batch_size_for(tiny_model(), seq_len) for seq_len in (2048, 512, 128)] == [1, 1, 4]


@pytest.mark.parametrize(("hidden", "intermediate", "size"), [(4096, 11008, 16), (8192, 28672, 4), (2**17, 2**19, 1)])
def test_the_batch_on_a_gpu_is_that_of_the_shapes(hidden, intermediate, size):
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate)
    model = SimpleNamespace(device=torch.device("cuda"), config=config)
    assert batch_size_for(model, 2048) == size
