"""The block map on every layout, and on models that it must refuse."""

import copy

import pytest
import torch
from torch import nn

from dass.errors import DassError
from dass.pruning.blocks import mlp_names
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from tests.models import ARCHITECTURES, LAYOUTS, random_tokens, tiny_model
from tests.pruning.naive import EXPERTS, LINEARS, decoder, matrices_of

WANDA = Method("wanda", dict.fromkeys(("gate", "up", "down"), "in"), NM(2, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    model = tiny_model(architecture)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(3)]
    for i, block in enumerate(blocks):
        assert [p.role for p in block.projections] == ["gate", "up", "down", "q", "k", "v", "o"]
        for projection in block.projections:
            kind = "mlp" if projection.role in ("gate", "up", "down") else "self_attn"
            assert projection.name == f"model.layers.{i}.{kind}.{projection.role}_proj"
            layer = model.get_submodule(projection.name)
            assert projection.module is layer and projection.weight.data_ptr() == layer.weight.data_ptr()
        (unit,) = block.units
        assert unit.name == f"model.layers.{i}.mlp" and not unit.routed
        assert block.mixer is model.model.layers[i].self_attn


def test_blocks_are_found_wherever_they_are():
    wrapped = nn.ModuleDict({"vision": nn.ModuleList([nn.Linear(2, 2)] * 9), "text": tiny_model()})
    assert [block.name for block in find_blocks(wrapped)] == [f"text.model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_views_write_into_the_parameters_that_are_known_by_hand(layout):
    model = tiny_model(layout)
    for block, module in zip(find_blocks(model), decoder(model), strict=True):
        by_hand = {}
        for name, matrices in matrices_of(layout, module).items():
            by_hand |= {(name, role): matrix for role, matrix in matrices.items()}
        found = {}
        for unit in block.units:
            place = unit.name.removeprefix(block.name).removeprefix(".")
            is_expert = unit.routed
            found |= {(place if is_expert else "mlp", role): p for role, p in unit.projections.items()}
        found |= {("attention", role): p for role, p in block.attention.items()}
        assert found.keys() == by_hand.keys()
        assert len({p.name for p in found.values()}) == len(found)
        for key, p in found.items():
            before = copy.deepcopy(model.state_dict())
            new = torch.randn(p.weight.shape)
            p.weight.copy_(new)
            assert torch.equal(by_hand[key], new), key
            changed = sum(int((value != before[name]).sum()) for name, value in model.named_parameters())
            assert changed == new.numel(), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_matrix_of_an_mlp_is_forgotten(layout):
    """All that is left of a block's matrices are attention, routers and one bias for each expert."""
    model = tiny_model(layout)
    blocks = find_blocks(model)
    expected = 0
    for module in decoder(model):
        for name, parameter in module.named_parameters():
            other = ("attn", "attention", "router", "bias", "mlp.gate.", "shared_expert_gate")
            if parameter.ndim > 1 and not any(word in name for word in other):
                expected += parameter.numel()
    targeted = [p.weight for block in blocks for unit in block.units for p in unit.projections.values()]
    assert sum(weight.numel() for weight in targeted) == expected > 0
    assert sum(model.get_parameter(name).numel() for name in mlp_names(blocks)) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_row_i_of_gate_and_up_belongs_to_column_i_of_down(layout):
    """Judged by the model's own forward: where column i of down is 0, row i of gate and up does not matter."""
    model = tiny_model(layout, torch.float64)
    input_ids = random_tokens(3)

    def outputs():
        return model(input_ids, use_cache=False).logits

    dense = outputs()
    for block in find_blocks(model):
        for unit in block.units:
            down = unit.projections["down"].weight
            i = down.shape[1] // 2 + 1
            column = down[:, i].clone()
            down[:, i] = 0
            without = outputs()
            rows = [p.weight[i] for role, p in unit.projections.items() if role != "down"]
            kept = [row.clone() for row in rows]
            for row in rows:
                row += torch.randn(row.shape, dtype=row.dtype)
            torch.testing.assert_close(outputs(), without, rtol=0, atol=1e-12)
            down[:, i] = column
            assert (outputs() - dense).abs().max() > 1e-6, unit.name
            for row, old in zip(rows, kept, strict=True):
                row.copy_(old)
    assert torch.equal(outputs(), dense)


@pytest.mark.parametrize("width", [4, 16], ids=["the width of the expert", "both of its widths"])
def test_a_shared_expert_with_as_many_rows_as_there_are_experts_is_no_router(width):
    """As in Qwen3-Next: 512 experts, and a shared one of width 512."""
    model = tiny_model("qwen2_moe", num_experts=width, shared_expert_intermediate_size=width)
    for block in find_blocks(model):
        assert [unit.routed for unit in block.units].count(False) == 1
        assert len(block.units) == width + 1


@pytest.mark.parametrize("layout", EXPERTS)
def test_each_expert_is_a_unit_with_inputs_of_its_own(layout):
    block = find_blocks(tiny_model(layout))[1]
    routed = [unit for unit in block.units if unit.routed]
    assert [unit.name for unit in routed] == [f"{block.name}.{EXPERTS[layout]}.{e}" for e in range(3)]
    reads = [{p.reads for p in unit.projections.values()} for unit in block.units]
    assert all(len(own) == 2 for own in reads) and len(set.union(*reads)) == 2 * len(block.units)
    assert bool(block.attention) == bool(LINEARS[layout][1])


@pytest.mark.parametrize(
    ("where", "extra"),
    [
        ("mlp", nn.Linear(32, 64)),
        ("mlp", nn.Linear(64, 32)),
        ("mlp", nn.Linear(32, 32)),
        ("", nn.Linear(32, 48)),
        ("", nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(40, 32))),
    ],
)
def test_a_matrix_beside_the_mlp_is_named(where, extra):
    model = tiny_model()
    model.model.layers[1].get_submodule(where).add_module("extra", extra)
    with pytest.raises(DassError, match=r"unknown layout.*layers.*extra"):
        find_blocks(model)


def test_matrices_of_a_norm_are_no_mlp():
    """As of A.X K2, which scales what leaves a norm by a small MLP of it."""
    model = tiny_model()
    for block in model.model.layers:
        block.input_layernorm.mlp = nn.Sequential(nn.Linear(32, 8), nn.SiLU(), nn.Linear(8, 32))
    with pytest.raises(DassError, match=r"unknown layout: model\.layers\.0\.input_layernorm\.mlp\.0 .* stay dense"):
        find_blocks(model)
    for block in find_blocks(model, {"dense": "norm"}):
        assert [unit.name for unit in block.units] == [f"{block.name}.mlp"]
        assert block.left == tuple(f"{block.name}.input_layernorm.mlp.{i}.weight" for i in (0, 2))


def test_a_second_mlp_beside_the_first_is_a_unit_of_its_own():
    model = tiny_model()
    model.model.layers[1].other = copy.deepcopy(model.model.layers[1].mlp)
    assert [len(block.units) for block in find_blocks(model)] == [1, 2, 1]


def test_gemma_4_with_an_input_for_each_layer_is_refused():
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)
    with pytest.raises(DassError, match=r"layers\.0 has an unknown layout: .*per_layer_input_gate.* \(8, 16\)"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.Linear(2, 2), "no list of modules"),
        (lambda: nn.ModuleList(), "an empty list"),
        (lambda: nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)]), r"2 x Linear, layers\.0 with weight \(3, 2\)"),
        (lambda: nn.ModuleList([nn.LSTM(4, 4)] * 2), "2 x LSTM"),
    ],
    ids=["no-list", "empty", "plain-layers", "recurrent"],
)
def test_an_unknown_layout_says_what_was_found(make, found):
    with pytest.raises(DassError, match=f"unknown layout.*{found}"):
        find_blocks(nn.ModuleDict({"layers": make()}))


def test_shapes_that_are_no_mlp():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 60, bias=False)
    with pytest.raises(DassError, match=r"unknown layout.*layers\.1 with .*mlp\.up_proj\.weight \(60, 32\)"):
        find_blocks(model)


class Routed(nn.Module):
    """Experts in a list, as models held them before transformers 5; each token goes to one."""

    def __init__(self, mlp, n_experts):
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(n_experts))
        self.router = nn.Linear(32, n_experts, bias=False)

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (chosen == e).any():
                out[chosen == e] = expert(x[chosen == e])
        return out


@torch.no_grad()
def test_experts_in_a_list_are_units():
    """The list is none of blocks: they do not follow one another. Each is pruned by the tokens that it saw."""
    model = tiny_model(dtype=torch.float64)
    for block in model.model.layers:
        block.mlp = Routed(block.mlp, 4).double()
    blocks = find_blocks(model)
    assert [unit.name for unit in blocks[1].units] == [f"model.layers.1.mlp.experts.{e}" for e in range(4)]
    assert all(unit.routed for unit in blocks[1].units)
    seen, input_ids = {}, random_tokens(12)
    hooks = [
        expert.down_proj.register_forward_pre_hook(lambda m, a, e=e: seen.update({e: a[0]}))
        for e, expert in enumerate(model.model.layers[0].mlp.experts)
    ]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    step = next(iter(walk(model, input_ids, BlockPruner(WANDA).needs, batch_size=12)))
    for e, h in seen.items():
        stream = step.streams[f"mlp.experts.{e}: intermediate"]
        torch.testing.assert_close(stream.norm(), h.norm(dim=0), rtol=1e-9, atol=1e-9)
        assert stream.n_tokens == len(h)
    assert sum(map(len, seen.values())) == 288 and step.rare == {}
    model.model.layers[1].mlp.router.weight[2] = model.model.layers[1].mlp.router.weight[:2].mean(0)
    with pytest.raises(DassError, match=r"layers\.1\.mlp\.experts\.2 saw too few calibration tokens") as caught:
        prune_model(model, BlockPruner(WANDA), input_ids)
    assert caught.value.field == "calibration.min_expert_tokens"


def test_shapes_that_are_no_mlp_are_refused_and_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    with pytest.raises(DassError, match=r"unknown layout.*model\.layers\.1 with.*up_proj\.weight \(60, 32\)"):
        find_blocks(model)
