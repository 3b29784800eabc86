"""Loading, refusing and saving models."""

import errno
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dass.errors import DassError
from dass.models import (
    batch_size_for,
    card_id,
    folder_fingerprint,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    save_model,
)
from tests.models import tiny_model
from tests.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")
CARD = "---\ndass_run: abc123\n---\n"


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "abc"}, "Cannot load"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantised"),
        ({"model_type": "nosuch"}, "Cannot load"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "nosuch"}, "Cannot load"),
    ],
    ids=["broken", "quantised", "unknown", "remote-code"],
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
    ("raised", "says"),
    [
        ("You are trying to access a gated repo.\nMake sure to have access to it", "is gated: accept its licence"),
        ("We couldn't connect to 'https://huggingface.co'", "and the network"),
    ],
)
def test_hub_models_out_of_reach(monkeypatch, raised, says):
    from transformers import AutoConfig

    def refuse(*_, **__):
        raise OSError(raised)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(DassError, match=f"meta-llama/Llama-2-7b-hf.*{says}"):
        load_model("meta-llama/Llama-2-7b-hf", "main", "float32", CPU)


def test_fingerprint_is_of_contents(folder, tmp_path):
    before = folder_fingerprint(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert folder_fingerprint(moved) == before
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(moved)
    assert folder_fingerprint(moved) != before
    with pytest.raises(DassError, match="no model folder"):
        folder_fingerprint(tmp_path / "nowhere")


def test_save(tmp_path):
    target = tmp_path / "deep" / "saved"
    save_model(tiny_model(), tiny_tokenizer(), target, CARD)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.model.layers[2].mlp.up_proj.weight, tiny_model().model.layers[2].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(target)("w9").input_ids == [9]
    assert card_id(target) == "abc123"
    save_model(tiny_model(), None, target, CARD.replace("abc123", "def456"))
    assert card_id(target) == "def456" and not (target / "tokenizer.json").exists()
    assert os.listdir(target.parent) == ["saved"]


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DassError, match="choose another folder"):
        save_model(tiny_model(), None, tmp_path, CARD)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    save_model(tiny_model(), None, tmp_path / "saved", CARD)
    (tmp_path / "saved" / "NOTES.md").write_text("mine")
    with pytest.raises(DassError, match=r"NOTES\.md"):
        save_model(tiny_model(), None, tmp_path / "saved", CARD)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model()

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(DassError, match="No space left on device"):
        save_model(model, None, tmp_path / "saved", CARD)
    assert os.listdir(tmp_path) == []


def test_devices_and_dtypes():
    assert resolve_device("cpu") == CPU
    for bad in ("tpu9", "cuda:99"):
        with pytest.raises(DassError, match="cannot be used here"):
            resolve_device(bad)
    with pytest.raises(DassError, match=r"model\.dtype=int8"):
        resolve_dtype("int8", "unused", None)
    assert [batch_size_for(tiny_model(), seq_len) for seq_len in (2048, 512, 128)] == [1, 1, 4]
