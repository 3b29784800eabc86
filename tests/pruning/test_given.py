"""Roles that structure does not tell: guessed, given as regular expressions, and checked by what runs."""

import pytest
import torch
from torch import nn

from dass.errors import DassError
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from dass.sparsity import sparsity_report
from tests.models import image_model, random_tokens, tiny_model

WANDA = Method("wanda", dict.fromkeys(("gate", "up", "down"), "in"), NM(2, 4))


class Plain(nn.Module):
    """A block whose matrices are all of one shape, with names that tell nothing: c reads silu(a x) * b x."""

    def __init__(self, order, width=16):
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(width, width))

    def forward(self, hidden_states, **kwargs):
        x = hidden_states
        return x + self.c(nn.functional.silu(self.a(x)) * self.b(x))


def plain_model(order="abc"):
    """A LLaMA whose blocks are such blocks."""
    model = tiny_model("llama_biased", torch.float64)
    torch.manual_seed(0)
    model.model.layers = nn.ModuleList(Plain(order) for _ in range(2)).double()
    return model


GIVEN = {"gate": r"\.a$", "up": r"\.b$", "down": r"\.c$"}


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
@torch.no_grad()
def test_roles_that_are_given(order):
    model = plain_model(order)
    for block in find_blocks(model, GIVEN):
        (unit,) = block.units
        for role, letter in zip(("gate", "up", "down"), "abc", strict=True):
            assert unit.projections[role].name == f"{block.name}.{letter}"
    input_ids = random_tokens()
    seen = []
    model.model.layers[0].c.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    model(input_ids)
    pruner = BlockPruner(Method("dass", {"gate": "out", "up": "out", "down": "in"}, NM(2, 4)))
    step = next(iter(walk(model, input_ids, pruner.needs, 2, projections=GIVEN)))
    torch.testing.assert_close(step.streams["intermediate"].norm(), seen[0].norm(dim=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", ["wanda", "dass"])
@pytest.mark.parametrize("order", ["cab", "acb", "bca"])
def test_roles_that_are_guessed_wrong_are_refused_by_what_runs(order, criterion):
    """Between three square matrices their order decides, and the walk finds out."""
    model = plain_model(order)
    with pytest.raises(DassError, match=r"layers\.0 has an unknown layout.*say with `projections`"):
        prune_model(model, BlockPruner(Method(criterion, {"gate": "out", "up": "out"}, NM(2, 4))), random_tokens())


@pytest.mark.parametrize("swapped", ["acb", "cba"])
def test_roles_that_are_given_wrong_are_refused_by_what_runs(swapped):
    given = {role: rf"\.{letter}$" for role, letter in zip(GIVEN, swapped, strict=True)}
    with pytest.raises(DassError, match=r"layers\.0 has an unknown layout.*say with `projections`"):
        list(walk(plain_model(), random_tokens(), BlockPruner(WANDA).needs, projections=given))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"up": r"\.[bc]$"}, r"names .*layers\.0\.b and .*layers\.0\.c: give an expression that names one"),
        ({"up": r"\.x$"}, "no list of blocks that all hold an MLP"),
        ({"up": "("}, r"\( is not a regular expression"),
        ({"qkv": "q"}, "role qkv is unknown"),
    ],
)
def test_regular_expressions_that_do_not_fit(changes, says):
    with pytest.raises(DassError, match=says) as caught:
        find_blocks(plain_model(), GIVEN | changes)
    assert caught.value.field == "model.projections"


def test_given_roles_need_up_and_down_and_shapes_that_fit():
    with pytest.raises(DassError, match="up and down are needed"):
        find_blocks(plain_model(), {"gate": r"\.a$", "down": r"\.c$"})
    with pytest.raises(DassError, match=r"none by its shapes: .*up model\.layers\.0\.mlp\.down_proj \(32, 64\)"):
        find_blocks(tiny_model(), {"up": "down_proj", "down": "up_proj", "gate": "gate_proj"})
    with pytest.raises(DassError, match="none by its shapes"):
        find_blocks(tiny_model("mixtral"), {"up": "gate_up_proj", "down": "down_proj"})


def test_a_fused_matrix_that_is_given_is_gate_and_up():
    model = tiny_model("phi3")
    given = find_blocks(model, {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"})
    for one, other in zip(given, find_blocks(model), strict=True):
        assert one.units == other.units


def test_what_stays_dense_must_be_said():
    """A second MLP, an adapter, or a matrix that hides in a norm is named, never left out in silence."""
    model = tiny_model("llama", torch.float64)
    for block in model.model.layers:
        block.adapter = nn.Linear(32, 16)
        block.post_attention_layernorm.mixing = nn.Linear(32, 32)
    with pytest.raises(DassError, match=r"norm\.mixing.*layers\.0\.adapter.*which stay dense"):
        find_blocks(model)
    with pytest.raises(DassError, match=r"mixing \(32, 32\) stands beside"):
        find_blocks(model, {"dense": "adapter"})
    blocks = find_blocks(model, {"dense": "adapter|mixing"})
    assert [list(unit.projections) for block in blocks for unit in block.units] == [["gate", "up", "down"]] * 3
    given = {role: rf"mlp\.{role}_proj" for role in ("gate", "up", "down")}
    with pytest.raises(DassError, match="adapter"):
        find_blocks(model, given)
    assert len(find_blocks(model, given | {"dense": "adapter|mixing"})) == 3
    with pytest.raises(DassError, match="is not a regular expression"):
        find_blocks(model, {"dense": "("})


def test_what_is_understood_cannot_be_called_dense():
    with pytest.raises(DassError, match=r"names model.layers.0.mlp.gate_proj of an MLP .* set exclude"):
        find_blocks(tiny_model(), {"dense": r"layers\.0\."})


def test_what_stays_dense_beside_an_mlp_is_part_of_all_mlps():
    """A shared expert is pruned, and half of all that the MLPs hold is not what is left of three quarters."""
    model = tiny_model("deepseek_v3")
    shared = {"gate": "gate_proj", "up": r"\.up_proj", "down": r"(shared_experts|mlp)\.down_proj"}
    words = shared | {"dense": r"experts\.(gate_up|down)_proj$"}
    pruner = BlockPruner(Method("magnitude", dict.fromkeys(("gate", "up", "down"), "in"), NM(2, 4)))
    prune_model(model, pruner, projections=words)
    blocks = find_blocks(model, words)
    found = sparsity_report(model, blocks, [p for block in blocks for p in pruner.projections(block)])
    weights = {name: p for name, p in model.named_parameters() if ".mlp." in name and "gate.weight" not in name}
    zeros, total = (
        sum(f(p) for p in weights.values() if p.ndim > 1) for f in (lambda p: int((p == 0).sum()), torch.numel)
    )
    assert found["targeted"] == 0.5 and found["mlp"] == pytest.approx(zeros / total) and found["mlp"] < 0.4


@pytest.mark.parametrize("criterion", ["wanda", "dass"])
def test_up_may_run_before_gate(criterion):
    model, other, input_ids = tiny_model(), tiny_model(), random_tokens()
    for block in model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(mlp.gate_proj(x)))
    axis = dict.fromkeys(("gate", "up"), "in" if criterion == "wanda" else "out") | {"down": "in"}
    masks, expected = (
        prune_model(m, BlockPruner(Method(criterion, axis, NM(2, 4))), input_ids) for m in (model, other)
    )
    assert masks.keys() == expected.keys() and all(torch.equal(masks[n].keep, expected[n].keep) for n in masks)


def test_the_blocks_are_those_beside_the_embedding():
    """A vision tower as wide as the text model, and deeper."""
    model = image_model("mistral3")
    tower = nn.ModuleList(tiny_model(hidden_size=16).model.layers for _ in range(2))
    model.model.vision_tower.layers = nn.ModuleList(layer for some in tower for layer in some)
    assert all(block.name.startswith("model.language_model.layers") for block in find_blocks(model))
