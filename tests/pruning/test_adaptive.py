"""The candidate that changes the block least is kept, unit by unit."""

import copy
from dataclasses import replace

import pytest
import torch

from dass.errors import DassError
from dass.pruning.adaptive import AdaptivePruner, squared_error
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from tests.models import random_tokens, tiny_model

TWO_OF_FOUR = NM(2, 4)
IN = dict.fromkeys(("gate", "up", "down"), "in")
OUT = IN | {"gate": "out", "up": "out"}


def candidates(pattern=TWO_OF_FOUR, update="none", order="released"):
    return {
        "wanda": BlockPruner(Method("wanda", IN, pattern, update, order=order)),
        "dass": BlockPruner(Method("dass", OUT, pattern, update, order=order)),
        "magnitude": BlockPruner(Method("magnitude", IN, pattern, update, order=order)),
    }


@torch.no_grad()
@pytest.mark.parametrize("update", ["none", "obs"])
@pytest.mark.parametrize("order", ["released", "matched"])
def test_the_best_of_each_block_by_hand(update, order):
    """Each candidate prunes the first block of a copy; the one nearest to the dense block's outputs is what is kept."""
    tokens, errors, weights = random_tokens(4), {}, {}
    model = tiny_model("llama", torch.float64)

    def first_block(one):
        seen = []
        hook = one.model.layers[0].register_forward_hook(lambda module, given, output: seen.append(output))
        one(tokens)
        hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    dense = first_block(model)
    for name, pruner in candidates(update=update, order=order).items():
        pruned = copy.deepcopy(model)
        prune_model(pruned, pruner, tokens)
        errors[name] = (first_block(pruned) - dense).square().sum().item()
        weights[name] = pruned.model.layers[0].mlp.state_dict()
    best = min(errors, key=errors.get)
    adaptive = AdaptivePruner(candidates(update=update, order=order), share=1.0)
    chosen = []
    for step in walk(model, tokens, adaptive.needs):
        chosen.append({one.chosen for one in adaptive.prune(step.block, step.streams, step.outputs)})
    assert chosen[0] == {best} and len(set(errors.values())) == 3
    for name, weight in model.model.layers[0].mlp.state_dict().items():
        torch.testing.assert_close(weight, weights[best][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["mixtral", "gpt2", "phi3"])
def test_every_layout_and_each_expert_has_its_own_choice(layout):
    model = tiny_model(layout, torch.float64)
    masks = prune_model(model, AdaptivePruner(candidates(), share=0.5), random_tokens(6))
    for block in find_blocks(model):
        for p in (p for unit in block.units for p in unit.projections.values()):
            assert torch.equal(p.weight != 0, masks[p.name].keep), p.name


def test_attention_is_pruned_by_the_first():
    model = tiny_model("llama")
    both = {name: BlockPruner(pruner.method, "all") for name, pruner in candidates().items()}
    masks = prune_model(model, AdaptivePruner(both), random_tokens())
    assert sum("q_proj" in name for name in masks) == len(model.model.layers)
    assert all(float(mask.keep.float().mean()) == 0.5 for mask in masks.values())


def test_what_is_no_choice():
    with pytest.raises(DassError, match="at least two"):
        AdaptivePruner({"wanda": candidates()["wanda"]})
    with pytest.raises(DassError, match="share=0"):
        AdaptivePruner(candidates(), share=0)
    with pytest.raises(DassError, match="differ in their targets, exclude, pattern"):
        AdaptivePruner(candidates() | {"other": candidates(Unstructured(0.5))["dass"]})
    with pytest.raises(DassError, match="differ in their targets, exclude"):  # who prunes less would win
        AdaptivePruner(candidates() | {"other": replace(candidates()["wanda"], exclude="down")})
    with pytest.raises(DassError, match="Some candidates train their MLPs"):
        AdaptivePruner(candidates() | {"other": BlockPruner(Method("wanda", IN, TWO_OF_FOUR, "mlp"))})


def test_each_candidate_may_have_its_own_update():
    obs = BlockPruner(Method("obs", IN, TWO_OF_FOUR, "obs"))
    adaptive = AdaptivePruner({"magnitude": candidates()["magnitude"], "sparsegpt": obs}, share=1.0)
    model, tokens = tiny_model(), random_tokens(8)
    chosen = [one for s in walk(model, tokens, adaptive.needs) for one in adaptive.prune(s.block, s.streams, s.outputs)]
    assert {one.chosen for one in chosen} == {"sparsegpt"}  # it repairs what it prunes
    assert all(one.damping is not None for one in chosen)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_choice_does_not_depend_on_the_batches(batch_size):
    tokens, found = random_tokens(8), []
    for size in (1, batch_size):
        model = tiny_model("llama", torch.float64)
        found.append(prune_model(model, AdaptivePruner(candidates(), share=0.3), tokens, size))
    assert all(torch.equal(mask.keep, found[1][name].keep) for name, mask in found[0].items())


def test_an_error_that_is_no_number_never_wins():
    assert squared_error([torch.tensor([1.0])], iter([torch.tensor([torch.nan])])) == float("inf")
    wide = torch.tensor([60000.0], dtype=torch.float16)
    assert squared_error([wide], iter([-wide])) == pytest.approx(120000.0**2)
