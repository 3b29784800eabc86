"""Saved models: reloaded bit for bit in the source's dtype, with all that the source had, and with their card."""

import errno
import json
import os
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dass import hub
from dass.errors import DassError
from dass.folders import is_saved
from dass.models import DTYPES
from dass.saving import model_card, round_to, save_model, source_licence, write_card
from tests.models import LAYOUTS, random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer

CARD: dict[str, Any] = dict(
    name="tiny by dass",
    base_model="someone/tiny",
    licence="Apache-2.0",
    command="python -m experiments.prune model=tiny save_model=DIR",
    facts={"pattern": "2:4", "axis": "gate: out, down: in", "order": "released", "fingerprint": "abc123"},
    metrics=[
        {"dataset": "wikitext2", "metric": "perplexity", "value": 7.25, "stderr": 0.5, "n": 40, "seq_len": 512},
        {"dataset": "piqa", "metric": "acc", "value": 0.75, "stderr": 0.1, "n": 20, "seq_len": None},
    ],
)


def pruned(architecture: str = "llama", dtype: torch.dtype = torch.float32):
    """A tiny model with every other element of its matrices zero."""
    model = tiny_model(architecture).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.flatten()[::2] = 0
    return model


def save(model, folder, dtype="float32", **more):
    return save_model(model, folder, "# a card", "abc123", dtype, **more)


# weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", *LAYOUTS])
@torch.no_grad()
def test_what_is_scored_is_what_is_reloaded(tmp_path, architecture, dtype):
    model = pruned(architecture)
    save(model, tmp_path / "saved", dtype, max_shard_size="30KB")
    assert (
        model.dtype == torch.float32 and json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == dtype
    )
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert stored.dtype == DTYPES[dtype]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() == stored.state_dict().keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]) and torch.equal(weight, stored.state_dict()[name].to(weight.dtype)), (
            name
        )
        if weight.ndim > 1:
            assert not weight.flatten()[::2].any(), name
    tokens = random_tokens(2, 9)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_every_tensor_on_disk_has_the_dtype_but_those_that_the_class_keeps_in_fp32(tmp_path):
    checksums = save(pruned("deepseek_v3"), tmp_path / "saved", "bfloat16")
    assert list(checksums) == ["model.safetensors"]
    wide = [
        name for name, t in load_file(tmp_path / "saved" / "model.safetensors").items() if t.dtype != torch.bfloat16
    ]
    assert wide and all(name.endswith("e_score_correction_bias") for name in wide)


def test_rounding_keeps_zeros_buffers_of_the_code_and_the_dtype_of_the_computing():
    model = pruned()
    original = {name: p.clone() for name, p in model.named_parameters()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    round_to(model, "float16")
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, original[name].half().float())
        assert not p[original[name] == 0].any()
    assert not torch.equal(model.lm_head.weight, original["lm_head.weight"])
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_a_weight_beyond_the_dtype_is_an_error_that_names_it(tmp_path):
    model = pruned()
    model.model.layers[1].input_layernorm.weight.data[3] = 7e4
    for act in (lambda: round_to(model, "float16"), lambda: save(model, tmp_path / "saved", "float16")):
        with pytest.raises(
            DassError,
            match=r"model\.layers\.1\.input_layernorm\.weight, rounded to float16, .* set model\.dtype=bfloat16",
        ):
            act()
    assert os.listdir(tmp_path) == []
    round_to(model, "bfloat16")
    assert model.model.layers[1].input_layernorm.weight[3] == 70144  # bfloat16 has 8 bits


def test_checksums_are_those_of_all_shards(tmp_path):
    checksums = save(pruned(), tmp_path / "saved", max_shard_size="50KB")
    assert set(checksums) == {path.name for path in (tmp_path / "saved").glob("*.safetensors")} and len(checksums) > 2
    assert is_saved(tmp_path / "saved", "abc123")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "saved").iterdir())
    shard = tmp_path / "saved" / max(checksums)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not is_saved(tmp_path / "saved", "abc123")


# what lies beside the weights


KEPT = (
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "LICENSE",
    "LICENSE-APACHE",
    "MODEL_LICENSE",
    "licence.pdf",
    "Notice",
    "tokenizer.model.v3",
    "merges.txt",
)
LEFT = (
    "pytorch_model.bin",
    "model.gguf",
    "remote.py",
    "weights.pkl",
    "model-00001-of-00002.safetensors",
    "x.index.json",
)


@pytest.fixture
def source(tmp_path):
    """A folder with everything that may lie beside the weights."""
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    for name in (*KEPT, *LEFT):
        (folder / name).write_text(f"the {name}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\nits own card")
    config = json.loads((folder / "config.json").read_text())
    foreign = {"sparsity_config": {"format": "dense"}, "auto_map": {"AutoModel": "remote.Model"}}
    (folder / "config.json").write_text(json.dumps(config | foreign))
    generation = {"temperature": 0.5, "do_sample": False, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def check_beside(source, saved):
    for name in (*KEPT, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes(), name
    assert not any((saved / name).exists() for name in (*LEFT, "model.safetensors.index.json"))
    assert (saved / "SOURCE_README.md").read_text().endswith("its own card")
    assert (saved / "README.md").read_text() == "# a card"
    config = json.loads((saved / "config.json").read_text())
    assert not {"sparsity_config", "auto_map"} & set(config) and config["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(saved)("w9").input_ids == [9]


def test_all_but_weights_and_code_is_copied(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, config=AutoConfig.from_pretrained(source))
    save(model, tmp_path / "saved", source=str(source))
    check_beside(source, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    save(again, tmp_path / "again", source=str(tmp_path / "saved"))  # a saved model is a source, too
    assert (tmp_path / "again" / "SOURCE_README.md").read_text() == "# a card"


def test_a_hub_models_files_come_from_its_snapshot(source, tmp_path, monkeypatch):
    asked = []

    def model_files(name, revision, weights):
        asked.append((name, revision, weights))
        return source

    monkeypatch.setattr(hub, "model_files", model_files)
    save(tiny_model(), tmp_path / "saved", source="someone/tiny", revision="abc")
    check_beside(source, tmp_path / "saved")
    assert source_licence("someone/tiny", "abc") == "mit" and asked == [("someone/tiny", "abc", False)] * 2


def test_a_hub_out_of_reach_does_not_lose_the_weights(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(hub, "model_files", refuse)
    save(tiny_model(), tmp_path / "saved", source="someone/tiny", tokenizer=tiny_tokenizer())
    assert "note: the files beside the weights of someone/tiny are out of reach" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("w9").input_ids == [9]
    assert source_licence("someone/tiny", None) is None


def test_the_licence_of_a_packaged_model_is_in_its_provenance(tmp_path):
    assert source_licence(str(tmp_path), None) is None
    (tmp_path / "provenance.json").write_text('{"licence": "CC0-1.0"}')
    assert source_licence(str(tmp_path), None) == "CC0-1.0"


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("license:\n- apache-2.0\n- mit", "apache-2.0, mit"),
        ("license: 1.0", "1.0"),
        ("license: other\nlicense_name: deepseek", "deepseek"),
        ("license: other", "other"),
        ("license: [", None),
    ],
)
@pytest.mark.parametrize("provenance", ["{}", "[", "[]", "7"])  # another tool's
def test_no_licence_stops_a_model_from_being_saved(tmp_path, header, licence, provenance):
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# m\n")
    (tmp_path / "provenance.json").write_text(provenance)
    found = source_licence(str(tmp_path), None)
    assert found == licence
    card = model_card("m", "a/b", found, "command", {})
    assert licence is None or licence in card


# the folder


def test_a_full_disk_leaves_nothing_and_the_model_as_it_was(tmp_path, monkeypatch):
    model = pruned()

    def full(folder, **_):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(DassError, match="No space left on device"):
        save(model, tmp_path / "saved", "bfloat16")
    assert os.listdir(tmp_path) == [] and model.dtype == torch.float32


def test_a_saved_model_is_replaced_and_nothing_else(tmp_path):
    save(pruned(), tmp_path / "saved", tokenizer=tiny_tokenizer())
    save(pruned(), tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.json").exists() and os.listdir(tmp_path) == ["saved"]
    (tmp_path / "saved" / "NOTES.md").write_text("mine")
    with pytest.raises(DassError, match=r"also holds NOTES\.md"):
        save(pruned(), tmp_path / "saved")


# the card


def test_the_card_tells_the_hub_and_people():
    card = ModelCard(model_card(**CARD))
    assert (card.data.base_model, card.data.license) == ("someone/tiny", "apache-2.0")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    found = [(r.dataset_name, r.metric_type, r.metric_value, r.metric_args) for r in card.data.eval_results]
    assert found == [
        ("wikitext2", "perplexity", 7.25, {"stderr": 0.5, "n": 40, "seq_len": 512}),
        ("piqa", "acc", 0.75, {"stderr": 0.1, "n": 20}),
    ]
    for said in (*CARD["facts"].values(), CARD["command"], "perplexity: 7.2500 (n = 40)"):
        assert said in card.text
    assert card.data.to_dict()["pruning"] == CARD["facts"]
    other = ModelCard(model_card("a", "b", "Gemma Terms of Use, https://x", "c", {})).data
    assert other.base_model is None  # "b" is no model of the hub
    assert (other.license, other.license_name) == ("other", "Gemma Terms of Use, https://x")
    assert ModelCard(model_card("a", "b", None, "c", {})).data.license is None


def test_a_card_with_metrics_comes_after_the_evaluation(tmp_path):
    save(pruned(), tmp_path / "saved")
    with pytest.raises(DassError, match="the model of another run by now"):
        write_card(tmp_path / "saved", "# another", "def456")
    write_card(tmp_path / "saved", model_card(**CARD), "abc123")
    assert "7.2500" in (tmp_path / "saved" / "README.md").read_text() and is_saved(tmp_path / "saved", "abc123")
    (tmp_path / "saved" / "README.md").write_text("mine")
    for folder in (tmp_path / "saved", tmp_path):
        with pytest.raises(DassError, match="holds no saved model, or its card was changed"):
            write_card(folder, "# another", "abc123")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"
