"""The mask chosen anew while the kept weights are trained, against the steps by hand."""

import copy
from functools import partial

import pytest
import torch

from dass.evaluation.perplexity import window_losses
from dass.pruning.blocks import kept_of_parameters
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from dass.training.masked import Recipe, train
from dass.training.stability import dense_weights, judged, put_back
from tests.models import random_tokens, tiny_model

WANDA = BlockPruner(Method("wanda", dict.fromkeys(("gate", "up", "down"), "in"), NM(2, 4)))


@pytest.mark.parametrize("layout", ["llama", "phi3"])
def test_the_choice_is_made_anew_from_trained_and_dense_weights(tmp_path, layout):
    tokens, windows = random_tokens(8), random_tokens(4, seed=5)
    dense = tiny_model(layout).requires_grad_(False)
    for p in (p for block in find_blocks(dense) for p in WANDA.projections(block)):
        p.weight[::3].masked_fill_(torch.arange(p.weight.shape[1]) % 4 > 0, 0)  # so that zeros are kept, too
    model = copy.deepcopy(dense)
    before = dense_weights(WANDA, find_blocks(model))
    masks = prune_model(model, WANDA, tokens)
    fixed = {name: mask.keep for name, mask in masks.items()}
    choose = partial(prune_model, pruner=WANDA, input_ids=tokens)
    judge = judged(model, fixed, choose, lambda one: window_losses(one, windows).tolist())
    start = window_losses(model, windows)
    keep = kept_of_parameters((p, fixed[p.name]) for block in find_blocks(model) for p in WANDA.projections(block))
    put_back(before, keep)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)  # nothing is trained yet, and the masks hide nothing
    recipe = Recipe(steps=4, every=2, batch=4, learning_rate=0.02)
    history, _ = train(model, keep, tokens, recipe, judge, tmp_path, "here")
    assert history[0]["windows"] == pytest.approx(start.tolist()) and history[0]["overlap"] == 1
    assert history[0]["exchanged"] == pytest.approx(history[0]["loss"])
    assert history[-1]["windows"] == pytest.approx(window_losses(model, windows).tolist())
    found = {p.name: p.weight for block in find_blocks(model) for p in WANDA.projections(block)}
    assert not any(found[name][~mask.keep].any() for name, mask in masks.items())
    learnt = [(found[name][mask.keep] != 0).float().mean() for name, mask in masks.items()]
    assert min(learnt) > 0.9  # kept zeros, too, but of neurons that the down projection has lost
    mixed = copy.deepcopy(model)  # by hand: trained where kept, dense where not
    places = {p.name: p.weight for block in find_blocks(mixed) for p in WANDA.projections(block)}
    old = {p.name: p.weight for block in find_blocks(dense) for p in WANDA.projections(block)}
    for name, mask in masks.items():
        places[name].copy_(torch.where(mask.keep, places[name], old[name]))
    again = prune_model(mixed, WANDA, tokens)
    both = sum((again[name].keep & mask.keep).sum() for name, mask in masks.items())
    either = sum((again[name].keep | mask.keep).sum() for name, mask in masks.items())
    assert history[-1]["overlap"] == pytest.approx(float(both / either)) and history[-1]["overlap"] < 1
    assert history[-1]["exchanged_windows"] == pytest.approx(window_losses(mixed, windows).tolist(), rel=1e-5)
