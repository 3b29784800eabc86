"""The audit: on matrices made for every status, its sums by hand, and one axis from memory to the saved model."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from dass.audit import as_dict, audit, audit_matrix, facts_of, kernels_for
from dass.errors import DassError
from dass.packed_model import pack_model
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured, select_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from experiments import audit as command
from experiments.plain import run_plain
from tests.experiments.test_prune import records, run, setting  # noqa: F401  (a fixture)
from tests.models import image_model, random_tokens, tiny_model

BACKWARD = "backward (dX = dY W)"


def matrix(shape=(128, 256), pattern=None, axis="in", dtype=torch.bfloat16):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if pattern is not None:
        weight = weight.masked_fill(~select_mask(weight.abs(), pattern, axis).keep, 0)
    return weight.to(dtype)


@pytest.mark.parametrize(
    ("made", "status", "axis", "inputs", "outputs", "helps"),
    [
        ({"pattern": NM(2, 4)}, "accelerated", "in", "2:4", None, "forward"),
        ({"pattern": NM(1, 4)}, "accelerated", "in", "1:4", None, "forward"),
        ({"pattern": NM(2, 4), "axis": "both"}, "accelerated", "both", "2:4", "2:4", f"forward and {BACKWARD}"),
        ({"pattern": NM(2, 4), "dtype": torch.float32}, "K-aligned but no kernel", "in", "2:4", None, "none"),
        ({"pattern": NM(2, 4), "dtype": torch.float32, "axis": "out"}, "not K-aligned", "out", None, "2:4", "none"),
        ({"pattern": NM(1, 2), "dtype": torch.float32}, "accelerated", "in", "1:2", None, "forward"),
        ({"pattern": NM(1, 4), "dtype": torch.float32, "axis": "out"}, "not K-aligned", "out", None, "1:4", BACKWARD),
        ({"pattern": NM(4, 8)}, "K-aligned but no kernel", "in", "4:8", None, "none"),
        ({"pattern": NM(4, 8), "axis": "both"}, "K-aligned but no kernel", "both", "4:8", "4:8", "none"),
        ({"pattern": NM(2, 3), "shape": (96, 192)}, "K-aligned but no kernel", "in", "2:3", None, "none"),
        ({"pattern": NM(1, 3), "shape": (96, 192)}, "accelerated", "in", "1:3", None, "forward"),  # at most 2 of any 4
        ({"pattern": NM(2, 4), "shape": (100, 260)}, "K-aligned but no kernel", "in", "2:4", None, "none"),
        ({"pattern": NM(2, 4), "dtype": torch.float64}, "K-aligned but no kernel", "in", "2:4", None, "none"),
        ({"pattern": NM(2, 4), "axis": "out"}, "not K-aligned", "out", None, "2:4", BACKWARD),
        ({"pattern": NM(4, 8), "axis": "out"}, "not K-aligned", "out", None, "4:8", "none"),
        ({"pattern": NM(2, 4), "axis": "out", "shape": (260, 100)}, "not K-aligned", "out", None, "2:4", "none"),
        ({"pattern": Unstructured(0.5)}, "not K-aligned", "neither", None, None, "none"),
        ({"pattern": Unstructured(0.05)}, "not K-aligned", "neither", None, None, "none"),
        ({}, "dense", "neither", None, None, "none"),
        ({"pattern": Unstructured(0.005)}, "dense", "neither", None, None, "none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_every_status(made, status, axis, inputs, outputs, helps):
    found = audit_matrix(matrix(**made))
    assert (found.status, found.axis, found.helps) == (status, axis, helps)
    assert tuple(side and str(side) for side in (found.inputs, found.outputs)) == (inputs, outputs)


def test_groups_along_the_inputs():
    """A row of four groups with 0, 2, 3 and 4 non-zeros."""
    row = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 2, 3, 0, 4, 5, 6, 7, 8, 9]], dtype=torch.float32)
    found = audit_matrix(row)
    assert found.groups == 0.5 and found.sparsity == 7 / 16
    assert audit_matrix(row[:, :15]).groups is None


def test_a_matrix_without_any_weight_is_executed_too():
    found = audit_matrix(torch.zeros(64, 64, dtype=torch.float16))
    assert (found.status, found.axis, found.sparsity) == ("accelerated", "both", 1.0)


def test_the_kernels_are_torchs_own_constraints():
    assert kernels_for((4096, 11008), torch.bfloat16) == ("cuSPARSELt", "CUTLASS")
    assert kernels_for((48, 48), torch.float16) == ("cuSPARSELt",)
    assert kernels_for((4096, 11008), torch.float32) == ("CUTLASS",)
    assert kernels_for((4096, 11008), torch.float64) == kernels_for((4095, 11008), torch.bfloat16) == ()


def pruned(axes, pattern=NM(2, 4)):  # noqa: B008
    model = tiny_model()
    prune_model(model, BlockPruner(Method("magnitude", axes, pattern)), random_tokens())
    return model


def test_the_sums_by_hand():
    """Three blocks of d = 32, f = 64, 4 heads of 8 with 2 of keys: gate, up and down of 2048 weights; bf16."""
    model = pruned({"gate": "out", "up": "out", "down": "in"}).bfloat16()
    found = audit(model, find_blocks(model))
    mlp, attention, head = 2048, 32 * 32 * 2 + 16 * 32 * 2, 96 * 32
    linear = 3 * (3 * mlp + attention)
    assert found.prefill == pytest.approx(linear / (linear - 3 * mlp / 2))
    dense = 2 * (linear + head)
    assert found.read["dense"] == dense and found.read["packed"] == dense - 3 * mlp * 7 // 8
    assert found.read["bitmask"] == dense - 9 * mlp * 7 // 8
    assert found.decode["packed"] == dense / found.read["packed"]
    assert found.disk["dense"] == 2 * sum(p.numel() for p in model.parameters())
    assert found.disk["dense"] - found.disk["packed"] == 9 * (2 * mlp - (mlp + -(-mlp // 12)))
    record = as_dict(found)
    assert record["status"] == "gate, up: not K-aligned; down: accelerated" and len(json.dumps(record)) < 4000
    assert sum(len(kind["projections"]) for kind in record["kinds"]) == 3 * 7
    assert "backward (dX = dY W), forward" in facts_of(record)["passes that they speed up"]
    wide = audit(pruned({"gate": "out", "up": "out", "down": "in"}), find_blocks(model), torch.bfloat16)
    assert wide.read == found.read


def test_what_is_in_fp32_is_told_in_bf16_too():
    """Of 2:4 in fp32 torch's packer keeps 1 of 2: nothing is accelerated, and in bf16 it would be."""
    model = pruned({"gate": "out", "up": "out", "down": "in"})
    record = as_dict(audit(model, find_blocks(model)))
    assert record["status"] == "gate, up: not K-aligned; down: K-aligned but no kernel"
    assert record["prefill"] == record["decode"]["packed"] == 1 < record["decode"]["bitmask"]
    halved = as_dict(audit(model.bfloat16(), find_blocks(model)))
    assert "bfloat16" not in halved and record["bfloat16"] == {k: v for k, v in halved.items() if k != "kinds"}
    facts = facts_of(record)
    assert facts["sparse tensor cores, in bf16"] == halved["status"] != facts["sparse tensor cores"]


def test_the_format_of_the_kernels_has_as_many_bytes_as_torchs():
    for pattern, dtype in ((NM(2, 4), torch.bfloat16), (NM(1, 2), torch.float32)):
        weight = matrix((64, 256), pattern, dtype=dtype)
        found = audit_matrix(weight)
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert weight.nbytes - found.saving == values.nbytes + meta.nbytes


def test_a_tower_for_images_is_not_run_for_text():
    """As in the language model alone, whose MLPs are the pruned ones."""
    model = image_model("mistral3").bfloat16()
    for block in (blocks := find_blocks(model)):
        for p in block.projections:
            p.weight.data.masked_fill_(~select_mask(p.weight.float().abs(), NM(2, 4), "in").keep, 0)
    found = audit(model, blocks)
    inside = sum(one.weights for one in found.projections.values())
    fast = sum(one.weights for one in found.projections.values() if one.status == "accelerated")
    assert fast > 0 and found.prefill == pytest.approx(inside / (inside - fast / 2))


@pytest.mark.parametrize(("weights", "said"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_dtype_is_that_of_the_weights(tmp_path, capsys, weights, said):
    tiny_model().to(getattr(torch, weights)).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": said}))
    command.main(command.AuditConfig(str(tmp_path / "model")))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| model.layers.")]
    assert rows and all(f"| {weights} " in row for row in rows)
    assert f"| {32 * 64 * getattr(torch, weights).itemsize} " in next(row for row in rows if "gate_proj" in row)


def test_experts_count_by_the_tokens_that_they_see():
    """Mixtral's 2 of 3 experts: all 2:4 along the inputs, so that their operations are halved."""
    model = tiny_model("mixtral")
    prune_model(model, BlockPruner(Method("magnitude", dict.fromkeys(("gate", "up", "down"), "in"), NM(2, 4))), None)
    found = audit(model, find_blocks(model), torch.bfloat16)
    experts = 2 * 3 * 3 * 16 * 32 * 2 / 3
    fast = [one for one in found.projections.values() if one.status == "accelerated"]
    saved = sum(one.weights for one in fast) * 2 / 3 / 2
    attention_and_router = 2 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16)
    assert found.prefill == pytest.approx((experts + attention_and_router) / (experts + attention_and_router - saved))


def test_a_checkpoint_of_another_tool(tmp_path, capsys):
    """Weights times a mask, so that half of the zeros are negative; one projection along each axis, one dense."""
    tiny_model().bfloat16().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    for name, axis in {"gate_proj": "in", "up_proj": "out", "down_proj": "both"}.items():
        for key in (key for key in weights if name in key):
            weights[key] = weights[key] * select_mask(weights[key].float().abs(), NM(2, 4), axis).keep
    save_file(weights, path, {"format": "pt"})
    command.main(command.AuditConfig(str(tmp_path / "model")))
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| model.layers.1")}
    assert len(rows) == 7
    for name, said in {
        "mlp.gate_proj": "inputs 2:4 .* accelerated .* forward ",
        "mlp.up_proj": "outputs 2:4 .* not K-aligned .* backward ",
        "mlp.down_proj": r"inputs 2:4, outputs 2:4 .* 100\.00% .* accelerated .* forward and backward ",
        "self_attn.q_proj": "neither .* dense .* none ",
    }.items():
        assert re.search(said, rows[f"model.layers.1.{name}"]), rows
    assert "0.5000 of the targeted weights" in out and "bytes on disk" in out


@pytest.mark.parametrize(
    ("stored", "groups", "reads"), [("dense", {}, True), ("sparse-24-bitmask", {}, False), ("dense", {"g": 1}, False)]
)
def test_words_of_llm_compressor_beside_plain_weights(tmp_path, capsys, stored, groups, reads):
    tiny_model().bfloat16().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "sparsity_config": {"format": stored}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    if reads:
        command.main(command.AuditConfig(str(tmp_path / "model")))
        assert "sparse tensor cores: dense" in capsys.readouterr().out
    else:
        with pytest.raises(DassError, match="is quantised" if groups else f"stored compressed, as {stored}, and not"):
            command.main(command.AuditConfig(str(tmp_path / "model")))


def test_a_packed_model_is_to_be_unpacked(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(DassError, match=r"packed are packed: unpack them with .*unpack=true"):
        command.main(command.AuditConfig(str(tmp_path / "packed")))


def test_a_layout_given_in_words_is_audited_by_its_roles(tmp_path, capsys):
    """Here up and gate change places, which nobody could guess."""
    tiny_model().save_pretrained(tmp_path / "model")
    swapped = r"{gate: up_proj, up: gate_proj, down: 'mlp\.down_proj$'}"
    run_plain(command.main, command.AuditConfig, ("model",), [f"model={tmp_path / 'model'}", f"projections={swapped}"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if ".mlp." in line]
    roles = {line[1].strip().rpartition(".")[2]: line[2].strip() for line in lines}
    assert roles == {"up_proj": "gate", "gate_proj": "up", "down_proj": "down"}


@pytest.mark.parametrize("words", ["gate", "{gate: 1}", "[a]", "{a", "{up: x, down: y}"])
def test_a_layout_in_words_that_is_none(tmp_path, capsys, words):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        command_line = [f"model={tmp_path / 'model'}", f"projections={words}"]
        run_plain(command.main, command.AuditConfig, ("model",), command_line)
    assert re.fullmatch(r"error: .*projections.*\n", capsys.readouterr().err)


def test_linear_layers_that_are_no_projections_count_as_well(tmp_path, capsys):
    """DeepSeek's attention has no q, k, v: another tool has pruned it all the same, and it is part of every bound."""
    model = tiny_model("deepseek_v3", kv_lora_rank=16, q_lora_rank=16).bfloat16()
    before = audit(model, find_blocks(model))
    keys = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "self_attn" in name]
    for key in keys:
        weight = model.get_submodule(key).weight.data
        weight.masked_fill_(~select_mask(weight.float().abs(), NM(2, 4), "in").keep, 0)
    found = audit(model, find_blocks(model))
    fast = [name for name, one in found.projections.items() if one.status == "accelerated"]
    assert set(fast) <= set(keys) <= set(found.projections) and len(fast) >= 4
    assert before.prefill == 1 < found.prefill
    assert found.read["bitmask"] < found.read["packed"] < found.read["dense"] == before.read["packed"]
    model.save_pretrained(tmp_path / "model")
    command.main(command.AuditConfig(str(tmp_path / "model")))
    out = capsys.readouterr().out
    assert "0.5000 of the targeted weights" in out and "sparse tensor cores: other: " in out


@pytest.mark.parametrize("arguments", [["model"], ["model=/nowhere/at/all"], [], ["modle=x"]], ids=" ".join)
def test_what_cannot_be_audited_is_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run_plain(command.main, command.AuditConfig, ("model",), arguments)
    told = capsys.readouterr().err
    assert caught.value.code == 1 and told.startswith("error: ") and len(told.splitlines()) == 1


@pytest.mark.parametrize("method", ["dass", "wanda_transposable", "dass_hybrid"])
def test_one_and_the_same_axis_everywhere(setting, tmp_path, method, capsys):  # noqa: F811
    """In memory (its masks), in the record, in the weights that were saved, in the card, in the audit of the saved."""
    overrides = [one for one in setting if not one.startswith("evaluation.")]
    run(*overrides, "evaluation=none", f"method={method}", f"save_model={tmp_path / 'saved'}")
    (record,) = records(tmp_path)
    card = (tmp_path / "saved" / "README.md").read_text()
    capsys.readouterr()
    command.main(command.AuditConfig(str(tmp_path / "saved")))
    out = capsys.readouterr().out
    kinds = {name: kind for kind in record["audit"]["kinds"] for name in kind["projections"]}
    for name, facts in record["sparsity"]["projections"].items():
        axis, role = facts["axis"], facts["role"]
        assert kinds[name]["axis"] == axis and re.search(rf"axis: .*{role}: {axis}", card)
        words = {"in": "inputs 2:4", "out": "outputs 2:4", "both": "inputs 2:4, outputs 2:4"}[axis]
        assert re.search(rf"\| {re.escape(name)} .*\| {words} +\|", out)
    assert f"sparse tensor cores: {record['audit']['status']}" in card and f": {record['audit']['status']}\n" in out
    assert "speed-up, at most: prefill" in card
