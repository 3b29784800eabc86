"""MLPs trained to give what they gave: exact zeros, an error that never rises where it is measured, every layout."""

import pytest
import torch

from dass.errors import DassError
from dass.pruning import mlp as module
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import kept_of_parameters
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from tests.models import random_tokens, tiny_model

IN = dict.fromkeys(("gate", "up", "down"), "in")
QUICK = {"epochs": 2, "learning_rate": 0.01}


def wanda(update="mlp", **parameters):
    return BlockPruner(Method("wanda", IN, NM(2, 4), update, parameters))


def first_block(model, tokens):
    """What the first block gives."""
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trained_block_is_nearer_to_the_dense_one_and_keeps_its_zeros(dtype):
    tokens = random_tokens(8)
    dense, masked, trained = (tiny_model("llama", dtype, num_hidden_layers=1).requires_grad_(False) for _ in range(3))
    prune_model(masked, wanda("none"), tokens)
    (step,) = walk(trained, tokens, wanda().needs)
    pruned = wanda(**QUICK).prune(step.block, step.streams, step.outputs)
    before, after = pruned[0].mlp_error
    held_out, wanted = tokens[:2], first_block(dense, tokens[:2]).float()
    errors = [(first_block(model, held_out).float() - wanted).square().sum() for model in (masked, trained)]
    assert after < before and errors[1] < errors[0]
    if dtype == torch.float32:  # the same by hand, for what the MLP adds to the block
        torch.nn.init.zeros_(dense.model.layers[0].mlp.down_proj.weight)
        scale = (first_block(dense, held_out) - wanted).square().sum()
        assert (before, after) == pytest.approx([float(error / scale) for error in errors], rel=1e-4)
    for one in pruned:
        weight = one.projection.weight
        assert (weight[~one.mask.keep] == 0).all() and (weight[one.mask.keep] != 0).all()
        assert weight.dtype == dtype and not one.projection.parameter.requires_grad


def test_what_does_not_help_changes_nothing():
    """A rate that blows up: the weights are those without training, and the errors are one."""
    tokens, models = random_tokens(8), [tiny_model(num_hidden_layers=1) for _ in range(2)]
    prune_model(models[0], wanda("none"), tokens)
    (step,) = walk(models[1], tokens, wanda().needs)
    pruned = wanda(epochs=3, learning_rate=1e6).prune(step.block, step.streams, step.outputs)
    assert pruned[0].mlp_error[0] == pruned[0].mlp_error[1]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


def test_it_ends_where_the_held_out_sequences_no_longer_gain(monkeypatch):
    seen = []
    monkeypatch.setattr(module.torch.optim.AdamW, "step", lambda self, *_: seen.append(1))
    (step,) = walk(tiny_model(num_hidden_layers=1), random_tokens(8), wanda().needs)
    wanda(epochs=50).prune(step.block, step.streams, step.outputs)
    assert len(seen) == module.PATIENCE * 6  # of the eight sequences two are held out; nothing was learned


@pytest.mark.parametrize(
    "layout", ["gpt2", "phi3", "opt", "gemma3", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"]
)
def test_every_layout(layout):
    model, tokens = tiny_model(layout), random_tokens(6)
    errors = []
    for step in walk(model, tokens, wanda().needs):
        pruned = wanda(**QUICK).prune(step.block, step.streams, step.outputs)
        errors += [one.mlp_error for one in pruned]
        assert all(torch.equal(one.projection.weight != 0, one.mask.keep) for one in pruned)
    assert all(after <= before for before, after in errors) and min(a / b for b, a in errors) < 0.97


def test_a_mixer_that_adds_the_residual_itself_in_16_bits():
    model = tiny_model("bloom", torch.bfloat16).requires_grad_(False)
    for step in walk(model, random_tokens(6), wanda().needs):
        assert all(
            one.mlp_error[1] <= one.mlp_error[0] for one in wanda(**QUICK).prune(step.block, step.streams, step.outputs)
        )


def test_adaptive_trains_the_winner_alone():
    candidates = {name: BlockPruner(Method(name, IN, NM(2, 4), "mlp", QUICK)) for name in ("wanda", "magnitude")}
    plain = {name: one.masking() for name, one in candidates.items()}
    tokens, chosen = random_tokens(6), []
    for own in (candidates, plain):
        (step,) = walk(tiny_model(num_hidden_layers=1), tokens, AdaptivePruner(own).needs)
        chosen.append(AdaptivePruner(own).prune(step.block, step.streams, step.outputs))
    assert [one.chosen for one in chosen[0]] == [one.chosen for one in chosen[1]]
    assert all(one.mlp_error[1] < one.mlp_error[0] for one in chosen[0])


def test_a_mask_of_a_whole_parameter():
    model = tiny_model("phi3")
    unit = find_blocks(model)[0].units[0].projections
    gate, up = (torch.rand(unit[role].weight.shape) > 0.5 for role in ("gate", "up"))
    ((place, keep),) = kept_of_parameters([(unit["gate"], gate), (unit["up"], up)]).items()
    assert place == (unit["up"].module, "weight") and torch.equal(keep, torch.cat([gate, up]))


def test_without_outputs_it_says_so():
    (step,) = walk(tiny_model(num_hidden_layers=1), random_tokens(2), wanda().needs)
    with pytest.raises(DassError, match=r"needs the outputs of model\.layers\.0"):
        wanda().prune(step.block, step.streams)
