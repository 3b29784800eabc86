"""The OBS solver against a plain column-by-column algorithm and an exact dense computation."""

from functools import partial

import pytest
import torch

from dass.errors import DassError
from dass.pruning import update as solver
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured, select_mask, verify_mask
from dass.pruning.method import Method
from dass.pruning.observe import open_streams
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import InputStream, damped_inverse
from dass.pruning.update import obs_sweep
from dass.pruning.walk import prune_model
from tests.models import random_tokens, tiny_model

ROLES = ("gate", "up", "down", "q", "k", "v", "o")


def correlated(tokens, features, seed=0, dtype=torch.float64):
    """Inputs whose features go together and differ in size, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(features, features, generator=generator, dtype=dtype) * torch.linspace(0.1, 2, features)[:, None]
    )
    return torch.randn(tokens, features, generator=generator, dtype=dtype) @ mixing.to(dtype)


def fixed(keep):
    return lambda columns, weight: keep[:, columns]


def plain(weight, hessian, keep):
    """One column after the other with the exact inverse Hessian of the columns that are left (no Cholesky)."""
    weight = weight.clone()
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        error = torch.where(keep[:, i], 0, weight[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
        weight[~keep[:, i], i] = 0
    return weight


@pytest.mark.parametrize("lazy", [1, 7, 16, 32])
@pytest.mark.parametrize("choose_every", [1, 3, 16, 20, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_plain_algorithm(lazy, choose_every, dtype, monkeypatch):
    monkeypatch.setattr(solver, "LAZY", lazy)
    torch.manual_seed(0)
    x, weight = correlated(400, 40), torch.randn(24, 40, dtype=torch.float64)
    keep = torch.rand(24, 40) > 0.5
    inverse = damped_inverse((x.T @ x).to(dtype), 0.01, "a layer")
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    result, mask = obs_sweep(weight.to(dtype), inverse.factor, fixed(keep), choose_every)
    expected = plain(weight, hessian, keep)
    assert torch.equal(mask, keep) and (result[~keep] == 0).all()
    assert (result - expected).norm() / expected.norm() < (1e-10 if dtype == torch.float64 else 1e-4)


def test_one_pruned_weight_is_exact_obs():
    """Pruning the first column alone: W' = W - w_q / [H^-1]_qq * [H^-1]_q: is the optimum for the rest (exact OBS)."""
    torch.manual_seed(0)
    x, weight = correlated(300, 10), torch.randn(4, 10, dtype=torch.float64)
    keep = torch.ones(4, 10, dtype=torch.bool)
    keep[:, 0] = False
    result, _ = obs_sweep(weight, damped_inverse(x.T @ x, 1e-12, "a layer").factor, fixed(keep), 128)
    rest = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    torch.testing.assert_close(result[:, 1:], rest, rtol=1e-6, atol=1e-8)


def sparsegpt_layer(pattern, axis, x, weights, dtype=torch.float64, stored=None, **parameters):
    """Prune gate and up of a real block through the method, with statistics of our choice."""
    model = tiny_model(dtype=dtype)
    block = find_blocks(model)[0]
    for role, weight in weights.items():
        block.units[0].projections[role].weight.copy_(weight)
    method = Method("obs", dict.fromkeys(ROLES, axis), pattern, "obs", {"block_size": 16, **parameters})
    pruner = BlockPruner(method, exclude="down_proj", stored=stored)
    streams = open_streams(block, pruner.needs(block))
    streams["mlp input"].add(x[None])
    with torch.no_grad():
        return {pruned.projection.role: pruned for pruned in pruner.prune(block, streams)}


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.4)], ids=str)
def test_gate_and_up_together_equal_each_alone(pattern):
    """The original algorithm, written for one layer: masks from the updated weights, group by group."""
    torch.manual_seed(0)
    x = correlated(300, 32)
    weights = {role: torch.randn(64, 32, dtype=torch.float64) for role in ("gate", "up")}
    pruned = sparsegpt_layer(pattern, "layer", x, weights)
    factor = damped_inverse(x.T @ x, 0.01, "a layer").factor
    for role, weight in weights.items():
        expected, zeros = weight.clone(), torch.zeros(64, 32, dtype=torch.bool)
        for start in range(0, 32, 16):
            for i in range(start, start + 16):
                width = pattern.m if isinstance(pattern, NM) else 16
                if i % width == 0:
                    scores = (expected[:, i : i + width] / factor.diagonal()[i : i + width]) ** 2
                    if isinstance(pattern, NM):
                        order = scores.argsort(dim=1, stable=True)[:, : pattern.m - pattern.n]
                        zeros[:, i : i + width] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
                    else:
                        threshold = scores.flatten().sort().values[int(scores.numel() * pattern.ratio)]
                        zeros[:, i : i + width] = scores < threshold
                error = torch.where(zeros[:, i], expected[:, i], 0) / factor[i, i]
                expected[:, i:] -= error[:, None] * factor[i, i:]
        expected[zeros] = 0
        verify_mask(pruned[role].mask)
        assert torch.equal(pruned[role].mask.keep, ~zeros)
        torch.testing.assert_close(pruned[role].projection.weight, expected)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.4)], ids=str)
@pytest.mark.parametrize("axis", ["in", "out", "layer"])
def test_masks_of_the_sweep_obey_their_axis(pattern, axis):
    weights = {role: torch.randn(64, 32, dtype=torch.float64) for role in ("gate", "up")}
    for pruned in sparsegpt_layer(pattern, axis, correlated(300, 32), weights).values():
        verify_mask(pruned.mask)
        assert torch.equal(pruned.projection.weight != 0, pruned.mask.keep)


def test_dead_inputs_are_cleared():
    x = correlated(300, 32)
    x[:, 5] = 0
    weights = {role: torch.randn(64, 32, dtype=torch.float64) for role in ("gate", "up")}
    for pruned in sparsegpt_layer(NM(2, 4), "in", x, weights).values():
        assert (pruned.projection.weight[:, 5] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value):
    weights = {role: torch.randn(64, 32, dtype=torch.float64) for role in ("gate", "up")}
    weights["gate"][2, 31] = value
    with pytest.raises(DassError, match=r"layers\.0\.mlp\.gate_proj"):
        sparsegpt_layer(NM(2, 4), "in", correlated(300, 32), weights)


def test_new_weights_that_fp16_cannot_hold():
    """Two features that are nearly one: the weight of the one that is pruned goes to the other, twice 60,000."""
    torch.manual_seed(0)
    x = torch.randn(300, 16).repeat_interleave(2, dim=1) + 0.01 * torch.randn(300, 32)
    weights = {"gate": torch.randn(64, 32), "up": torch.full((64, 32), 6e4)}
    layer = partial(sparsegpt_layer, NM(2, 4), "in", x, weights)
    with pytest.raises(
        DassError, match=r"layers\.0\.mlp\.up_proj exceed 65504.*model\.dtype=bfloat16.*method\.clip=true"
    ):
        layer(torch.float16)
    with pytest.raises(DassError, match=r"layers\.0\.mlp\.up_proj exceed 65504"):
        layer(torch.float32, stored=torch.float16)  # as an fp16 model is computed on the CPU
    assert layer(torch.float32, stored=torch.float16, clip=True)["up"].projection.weight.max() == 65504
    clipped, wide = layer(torch.float16, clip=True), layer(torch.bfloat16)
    assert clipped["up"].projection.weight.max() == 65504 and wide["up"].projection.weight.max() > 1e5
    for role in weights:
        limited = wide[role].projection.weight.float().clamp(-65504, 65504)
        torch.testing.assert_close(clipped[role].projection.weight.float(), limited, rtol=0.02, atol=0.02)


def test_dead_inputs_weigh_as_in_the_original():
    """There H is 2 / n_sequences * X^T X with ones for dead inputs, before 1 % of the mean diagonal is added."""
    x = correlated(60, 6).view(5, 12, 6) * 1e-2
    x[..., 4] = 0
    stream = InputStream(6, torch.float64, torch.device("cpu"), True)
    for sequence in x:
        stream.add(sequence[None])
        stream.n_sequences += 1
    hessian = 2 / 5 * torch.einsum("btj,btk->jk", x, x)
    hessian[4, 4] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(6)
    factor = damped_inverse(stream.hessian(), 0.01, "a layer").factor
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))


def output_error(dense, model, input_ids):
    """Relative change of the first block's MLP output, for the dense inputs."""
    seen = []
    hook = dense.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    dense(input_ids)
    hook.remove()
    wanted = dense.model.layers[0].mlp(seen[0])
    return ((model.model.layers[0].mlp(seen[0]) - wanted).norm() / wanted.norm()).item()


def layer_error(x, weight, pruned):
    return (x @ (weight - pruned).T).norm().item()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
def test_reconstruction_error_is_below_wandas(pattern):
    torch.manual_seed(1)
    x = correlated(500, 32)
    weights = {role: torch.randn(64, 32, dtype=torch.float64) for role in ("gate", "up")}
    repaired = sparsegpt_layer(pattern, "layer", x, weights)
    for role, weight in weights.items():
        keep = select_mask(weight.abs() * x.norm(dim=0), pattern, "in").keep
        assert layer_error(x, weight, repaired[role].projection.weight) < 0.9 * layer_error(x, weight, weight * keep)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "dass"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@torch.no_grad()
def test_obs_on_a_fixed_mask_lowers_its_error_and_keeps_zeros(criterion, axis, pattern):
    dense, input_ids = tiny_model(dtype=torch.float64), random_tokens(12)
    results = {}
    for update in ("none", "obs"):
        model = tiny_model(dtype=torch.float64)
        method = Method(criterion, dict.fromkeys(ROLES, axis), pattern, update)
        masks = prune_model(model, BlockPruner(method), input_ids)
        for name, mask in masks.items():
            verify_mask(mask, name)
            assert (model.get_parameter(f"{name}.weight")[~mask.keep] == 0).all()
        results[update] = (masks, output_error(dense, model, input_ids))
    for name, mask in results["none"][0].items():
        if ".layers.0." in name:  # later blocks see other inputs
            assert torch.equal(mask.keep, results["obs"][0][name].keep)
    assert results["obs"][1] < results["none"][1]
