"""Packed models: the same tensors again, fewer bytes, loaded by transformers; kernels are never given a wrong mask."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from dass.audit import audit
from dass.checkpoint import PACKED
from dass.errors import DassError
from dass.folders import SEAL, read_seal
from dass.kernels import require_executable, semi_structured, speed_up
from dass.packed_model import load_packed, pack_model, unpack_model
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured, select_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from experiments import pack as command
from experiments.plain import run_plain
from tests.models import random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer

DASS = {"gate": "out", "up": "out", "down": "in"}


def save_pruned(folder, architecture="llama", pattern=NM(2, 4), axes=DASS, dtype=torch.bfloat16, **saving):  # noqa: B008
    model = tiny_model(architecture)
    prune_model(model, BlockPruner(Method("magnitude", axes, pattern)), random_tokens())
    model.to(dtype).save_pretrained(folder, **saving)
    tiny_tokenizer().save_pretrained(folder)


def require_same(one, other):
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        theirs = load_file(other / name)
        for key, tensor in load_file(one / name).items():
            assert tensor.dtype == theirs[key].dtype
            assert torch.equal(tensor.flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8)), key


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma3"])
def test_a_model_comes_back_bit_for_bit(tmp_path, architecture, pattern):
    """Separate matrices, transposed ones, experts in three dimensions, a tied head."""
    save_pruned(tmp_path / "model", architecture, pattern)
    sums = pack_model(tmp_path / "model", tmp_path / "packed")
    assert {"in", "out"} <= set(sums) or isinstance(pattern, Unstructured)
    assert len(sums) > 1 and sum(after for _, _, after in sums.values()) < sum(before for _, before, _ in sums.values())
    unpack_model(tmp_path / "packed", tmp_path / "again")
    require_same(tmp_path / "model", tmp_path / "again")
    for name in ("config.json", "tokenizer.json"):
        content = (tmp_path / "model" / name).read_bytes()
        assert content == (tmp_path / "packed" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert "sparsity_config" not in (tmp_path / "packed" / "config.json").read_text()


def test_it_is_smaller_and_loads_into_transformers(tmp_path):
    """The MLP of 2:4 in bf16; in shards, with their index."""
    save_pruned(tmp_path / "model", max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sums = pack_model(tmp_path / "model", tmp_path / "packed")
    before, after = (sums["in"][i] + sums["out"][i] for i in (1, 2))
    assert before == 9 * 2 * 2048 and after <= 0.57 * before
    on_disk = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert on_disk < after + sums["dense"][2] + 20_000
    loaded = load_packed(tmp_path / "packed")
    tokens = random_tokens(2, 8)
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(tokens).logits, model(tokens).logits)
    unpack_model(tmp_path / "packed", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert load_packed(tmp_path / "packed", "float32").dtype == torch.float32


def test_shards_of_one_name_in_several_folders(tmp_path):
    """As an index may name them: each keeps its own folder, packed and unpacked."""
    save_pruned(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    shards = {"a/model.safetensors": {}, "b/c/model.safetensors": {}, "model-2.safetensors": {}}
    places = {name: list(shards)[i % 3] for i, name in enumerate(sorted(tensors))}
    for name, shard in places.items():
        shards[shard][name] = tensors[name]
    for shard, held in shards.items():
        (tmp_path / "model" / shard).parent.mkdir(parents=True, exist_ok=True)
        save_file(held, tmp_path / "model" / shard, {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    pack_model(tmp_path / "model", tmp_path / "packed")
    unpack_model(tmp_path / "packed", tmp_path / "again")
    for shard, held in shards.items():
        again = load_file(tmp_path / "again" / shard)
        assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)
    assert json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"] == places


def test_what_is_no_number_to_prune_by_is_left_as_it_is(tmp_path):
    """Another tool's folder may hold numbers of 8 bits, and anything else."""
    save_pruned(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    others = {"fp8": torch.zeros(8, 8).to(torch.float8_e4m3fn), "ints": torch.zeros(8, 8, dtype=torch.int64)}
    save_file(load_file(path) | others | {"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, path)
    sums = pack_model(tmp_path / "model", tmp_path / "packed")
    assert sums["dense"][0] == len(load_file(path)) - 9
    unpack_model(tmp_path / "packed", tmp_path / "again")
    require_same(tmp_path / "model", tmp_path / "again")


def test_the_command(tmp_path, capsys):
    save_pruned(tmp_path / "model")
    places = [f"model={tmp_path / 'model'}", f"out={tmp_path / 'packed'}"]
    for _ in range(2):  # ours is replaced
        run_plain(command.main, command.PackConfig, ("model", "out"), places)
    assert "N:M along the outputs: 6 tensors, 24576 bytes, now 13314 (0.5417)" in capsys.readouterr().out
    places = [f"model={tmp_path / 'packed'}", f"out={tmp_path / 'again'}", "unpack=true"]
    run_plain(command.main, command.PackConfig, ("model", "out"), places)
    require_same(tmp_path / "model", tmp_path / "again")
    assert read_seal(tmp_path / "again") is not None and (tmp_path / "again" / SEAL).is_file()


def break_about(folder, **changes):
    about = json.loads((folder / PACKED).read_text())
    (folder / PACKED).write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / PACKED).unlink(), "is no packed model"),
        (lambda folder: (folder / PACKED).write_text("{"), "is no packed model"),
        (lambda folder: break_about(folder, files={"../model.safetensors": "x"}), "lies outside of it"),
        (lambda folder: break_about(folder, tensors=[1]), "is no packed model"),
        (lambda folder: break_about(folder, files={"model.safetensors": "absent"}), "absent cannot be read"),
        (lambda folder: os.truncate(folder / "model.packed.safetensors", 5000), "cannot be read"),
        (lambda folder: _other_pattern(folder), "is no packed model"),
    ],
    ids=["absent", "no JSON", "outside", "no tensors", "no file", "cut", "another pattern"],
)
def test_what_is_no_packed_model_is_one_sentence(tmp_path, damage, said):
    save_pruned(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    damage(tmp_path / "packed")
    with pytest.raises(DassError, match=said) as caught:
        unpack_model(tmp_path / "packed", tmp_path / "again")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "again").exists()


def _other_pattern(folder):
    about = json.loads((folder / PACKED).read_text())
    about["tensors"]["model.layers.0.mlp.up_proj.weight"]["pattern"] = [1, 4]
    break_about(folder, tensors=about["tensors"])


def test_no_folder_is_lost(tmp_path):
    save_pruned(tmp_path / "model")
    for out in (tmp_path / "model", tmp_path):
        with pytest.raises(DassError, match="would replace"):
            pack_model(tmp_path / "model", out)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "years").write_text("of it")
    with pytest.raises(DassError, match="is not one that this project wrote"):
        pack_model(tmp_path / "model", tmp_path / "work")
    pack_model(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(DassError, match="packed already"):
        pack_model(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(DassError, match="There is no model folder"):
        pack_model(tmp_path / "nowhere", tmp_path / "twice")
    shutil.rmtree(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["packed", "work"]


def pruned(axis, shape=(256, 512)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return weight.masked_fill(~select_mask(weight.float().abs(), NM(2, 4), axis).keep, 0)


def test_torchs_packer_drops_three_sixteenths_of_a_mask_along_the_outputs_and_ours_refuses_it():
    """Of 4 inputs 3 are kept with 4/16, 4 with 1/16: it drops (4 + 2) / 16 of 2 on average."""
    said = "not 2:4 along its 512 inputs.* would drop {:.1%} without a word"
    for axis, dropped in {"in": 0.0, "both": 0.0, "out": 3 / 16}.items():
        weight = pruned(axis)
        through = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
        lost = ((through != weight).sum() / weight.count_nonzero()).item()
        assert lost == pytest.approx(dropped, abs=0.01) and (axis == "out") == (lost > 0)
        if axis != "out":
            require_executable(weight)
            continue
        for refuse in (require_executable, semi_structured):
            with pytest.raises(DassError, match=said.format(lost)):
                refuse(weight)


@pytest.mark.parametrize("axis", ["in", "both"])
def test_torchs_packer_drops_a_sixth_of_fp32_and_ours_refuses_it(axis):
    """It keeps 1 of 2: of the 6 ways to keep 2 of 4, 2 have both in one pair, which loses one of the two."""
    weight = pruned(axis).float()
    values, _ = sparse_semi_structured_from_dense_cutlass(weight)
    lost = 1 - (values.count_nonzero() / weight.count_nonzero()).item()
    assert lost == pytest.approx(1 / 6, abs=0.02)
    for refuse in (require_executable, semi_structured):
        with pytest.raises(DassError, match=f"not 1:2 .* float32, of which it would drop {lost:.1%} .* in 16 bits"):
            refuse(weight)
    spared = weight.masked_fill(~select_mask(weight.abs(), NM(1, 2), "in").keep, 0)
    through = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(spared))
    require_executable(spared, kernel="CUTLASS")
    assert torch.equal(through, spared)


@pytest.mark.parametrize(
    ("weight", "kernel"),
    [
        (pruned("in", (100, 64)), None),
        (pruned("in").double(), None),
        (pruned("in").float()[:, 1::2].repeat(1, 2) * torch.tensor([1, 0] * 256), "cuSPARSELt"),
    ],
    ids=["shape", "fp64", "fp32"],
)
def test_what_fits_no_kernel_is_refused(weight, kernel):
    with pytest.raises(DassError, match="fits no kernel of"):
        require_executable(weight, kernel=kernel)


def test_kernels_need_a_gpu(tmp_path):
    save_pruned(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(DassError, match="need a GPU"):
        load_packed(tmp_path / "packed", kernels=True)


@pytest.mark.parametrize(
    ("architecture", "axes", "names"),
    [
        ("llama", DASS, ["down_proj"]),
        ("phi3", DASS, ["down_proj"]),
        ("phi3", dict.fromkeys(DASS, "in"), ["gate_up_proj", "down_proj"]),
        ("phi3", DASS | {"up": "in"}, ["down_proj"]),
    ],
    ids=["separate", "fused, outputs", "fused, inputs", "fused, half"],
)
def test_only_accelerated_layers_become_semi_structured(monkeypatch, architecture, axes, names):
    """As on a GPU, but for the tensors themselves."""
    model = tiny_model(architecture)
    prune_model(model, BlockPruner(Method("magnitude", axes, NM(2, 4))), random_tokens())
    model.bfloat16()
    monkeypatch.setattr("dass.kernels.semi_structured", lambda weight, name: weight * 2)
    first = next(model.parameters())
    monkeypatch.setattr(type(first), "device", property(lambda _: torch.device("cuda")), raising=False)
    assert speed_up(model) == [f"model.layers.{i}.mlp.{n}" for i in range(len(model.model.layers)) for n in names]


def test_all_that_the_audit_calls_accelerated_becomes_semi_structured(monkeypatch):
    """DeepSeek's attention is no projection, and another tool has pruned it."""
    model = tiny_model("deepseek_v3", hidden_size=64, kv_lora_rank=32, q_lora_rank=32).bfloat16()
    for layer in (m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "self_attn" in name):
        layer.weight.data.masked_fill_(~select_mask(layer.weight.float().abs(), NM(2, 4), "in").keep, 0)
    named = audit(model, find_blocks(model)).projections
    monkeypatch.setattr("dass.kernels.semi_structured", lambda weight, name: weight * 2)
    monkeypatch.setattr(torch.nn.Parameter, "device", property(lambda _: torch.device("cuda")), raising=False)
    expected = {name for name, one in named.items() if one.status == "accelerated"}
    assert set(speed_up(model)) == expected and len(expected) > 4
