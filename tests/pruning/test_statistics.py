"""Streamed statistics against one-shot fp64, and the damped inverse."""

import pytest
import torch

from dass.errors import DassError
from dass.pruning import statistics
from dass.pruning.calls import enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.observe import observe, open_streams
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import HESSIAN_BLOCK, InputStream, damped_inverse
from tests.models import random_tokens, tiny_model

FEATURES = HESSIAN_BLOCK + 44


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_hessian", [False, True])
def test_streamed_equals_one_shot(dtype, with_hessian):
    torch.manual_seed(0)
    x = torch.randn(7, 11, FEATURES).to(dtype)
    stream = InputStream(FEATURES, dtype, torch.device("cpu"), with_hessian)
    for batch in x.split([1, 4, 2]):
        stream.add(batch)
        stream.n_sequences += len(batch)
    exact = x.double().flatten(0, 1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(stream.norm().double(), exact.norm(dim=0), rtol=tolerance, atol=tolerance)
    if with_hessian:
        torch.testing.assert_close(
            stream.hessian().double() * 7 / 2, exact.T @ exact, rtol=tolerance, atol=50 * tolerance
        )
        assert torch.equal(stream.hessian(), stream.hessian().T)


@pytest.mark.parametrize("allowed", ["high", "highest"])
def test_hessians_are_in_full_fp32_whatever_is_allowed(allowed, monkeypatch):
    seen, product = [], torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor,
        "addmm_",
        lambda *arguments: seen.append(torch.get_float32_matmul_precision()) or product(*arguments),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        InputStream(FEATURES, torch.float32, torch.device("cpu"), True).add(torch.randn(1, 5, FEATURES))
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_precision_does_not_overflow():
    stream = InputStream(4, torch.float16, torch.device("cpu"), False)
    stream.add(torch.full((1, 1000, 4), 6e4, dtype=torch.float16))
    torch.testing.assert_close(stream.norm(), torch.full((4,), 6e4 * 1000**0.5), rtol=1e-3, atol=0)


@torch.no_grad()
def test_the_intermediate_norm_is_that_of_h():
    model = tiny_model(dtype=torch.float64)
    blocks, input_ids = find_blocks(model), random_tokens()
    pruner = BlockPruner(Method("dass", dict.fromkeys(("gate", "up"), "out"), NM(2, 4)))
    streams = open_streams(blocks[0], pruner.needs(blocks[0]))
    assert set(streams) == {"intermediate"}
    activations = enter_first_block(model, blocks, input_ids.split(2))
    for hidden, calls in zip(activations.batches, activations.calls, strict=True):
        observe(blocks[0], None, streams, hidden, calls[0])
    seen = []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(input_ids)
    h = mlp.act_fn(mlp.gate_proj(seen[0])) * mlp.up_proj(seen[0])
    torch.testing.assert_close(streams["intermediate"].norm(), h.flatten(0, 1).norm(dim=0), rtol=1e-10, atol=1e-10)


def test_the_factor_is_that_of_the_damped_inverse():
    torch.manual_seed(0)
    x = torch.randn(50, 12, dtype=torch.float64)
    hessian = x.T @ x
    inverse = damped_inverse(hessian, 0.01, "a layer")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(inverse.factor.T @ inverse.factor, torch.linalg.inv(damped))
    assert torch.equal(inverse.factor, inverse.factor.triu())
    assert (inverse.damping, inverse.attempts) == (0.01, 1)


def test_a_factor_of_many_columns_is_inverted_in_blocks(monkeypatch):
    monkeypatch.setattr(statistics, "INVERSE_BLOCK", 5)
    test_the_factor_is_that_of_the_damped_inverse()


def test_dead_inputs_are_told():
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2] = 0
    inverse = damped_inverse(x.T @ x, 0.01, "a layer")
    assert inverse.dead.tolist() == [False, False, True, False, False, False]
    assert torch.isfinite(inverse.factor).all()


def test_damping_rises_until_cholesky_succeeds():
    hessian = torch.eye(4) - 0.3 * torch.ones(4, 4)  # indefinite: one eigenvalue is -0.2, the mean diagonal 0.7
    inverse = damped_inverse(hessian, 0.01, "a layer")
    assert (inverse.damping, inverse.attempts) == (1.0, 3)


@pytest.mark.parametrize("value", [float("nan"), -1e6])
def test_a_hopeless_hessian_names_the_layer(value):
    hessian = torch.eye(4)
    hessian[1, 2] = hessian[2, 1] = value
    with pytest.raises(DassError, match=r"layers\.3\.mlp\.down_proj"):
        damped_inverse(hessian, 0.01, "layers.3.mlp.down_proj")
