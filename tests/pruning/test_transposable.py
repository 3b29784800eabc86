"""Transposable masks: feasible always, exact for small tiles, near the optimum for others; and methods with them."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from dass.errors import DassError
from dass.pruning import transposable
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Mask, Unstructured, select_mask, verify_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from tests.models import random_tokens, tiny_model

BOTH = dict.fromkeys(("gate", "up", "down"), "both")


def tiles_of(matrix, m):
    rows, columns = matrix.shape
    return matrix.view(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m, m)


def optimum(tile, n):
    """The largest sum that a mask of a tile can keep: this linear program has whole solutions."""
    m = len(tile)
    lines = np.zeros((2 * m, m, m))
    for i in range(m):
        lines[i, i], lines[m + i, :, i] = 1, 1
    found = linprog(-tile.ravel(), A_eq=lines.reshape(2 * m, -1), b_eq=np.full(2 * m, n), bounds=(0, 1))
    return -found.fun


def kept_and_optimum(scores, n, m):
    keep = select_mask(scores, NM(n, m), "both").keep
    own, chosen = tiles_of(scores.double(), m), tiles_of(keep, m)
    return (own * chosen).sum((1, 2)).numpy(), np.array([optimum(tile.numpy(), n) for tile in own])


@st.composite
def cases(draw):
    """Scores with or without ties, and a pattern that fits them."""
    m = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    pattern = NM(draw(st.integers(1, m)), m)
    shape = m * draw(st.integers(1, 3)), m * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    few = torch.tensor([-1.0, 0.0, 0.25, 1.0, 3.0])[torch.randint(5, shape, generator=generator)]
    many = 10.0 ** draw(st.integers(-3, 4)) * torch.randn(shape, generator=generator)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    return (few if draw(st.booleans()) else many).to(dtype), pattern


@settings(max_examples=60, deadline=None)
@given(cases())
def test_it_is_never_infeasible_and_scale_and_chunks_change_nothing(case):
    scores, pattern = case
    mask = select_mask(scores, pattern, "both")
    verify_mask(mask)
    for axis in ("in", "out"):
        verify_mask(Mask(mask.keep, pattern, axis))
    assert (mask.axis, mask.pattern, mask.keep.dtype) == ("both", pattern, torch.bool) and mask.keep.is_contiguous()
    assert torch.equal(select_mask(scores.T.contiguous().T, pattern, "both").keep, mask.keep)
    if pattern.m <= transposable.LISTED:  # beyond, scores between 0 and 1 are made of them, which are rounded
        assert torch.equal(select_mask(scores.double() * 2.0**-20, pattern, "both").keep, mask.keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposable, "CHUNK", 1000)
        assert torch.equal(select_mask(scores, pattern, "both").keep, mask.keep)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_small_tiles_are_exact_with_the_lower_indices_pruned_among_equals(case):
    scores, pattern = case
    if pattern.m > transposable.LISTED:
        return
    n, m = pattern.n, pattern.m
    lines = [[int(i in own) for i in range(m)] for own in itertools.combinations(range(m), n)]
    masks = [np.array(rows) for rows in itertools.product(lines, repeat=m) if (np.sum(rows, axis=0) == n).all()]
    masks.sort(key=lambda mask: mask.ravel().tolist())
    keep = select_mask(scores, pattern, "both").keep
    for tile, found in zip(tiles_of(scores.double(), m).numpy(), tiles_of(keep, m).numpy(), strict=True):
        sums = [float((tile * mask).sum()) for mask in masks]  # exact: few values of few digits
        if (n, m) == (2, 4):
            assert len(masks) == 90
        best = max(range(len(masks)), key=lambda i: (sums[i], -i))
        assert sums[best] == pytest.approx((tile * found).sum(), rel=1e-12)
        if len(np.unique(tile)) < 5:
            assert (masks[best] == found).all()


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(("n", "m"), [(4, 8), (2, 8), (3, 6), (8, 16)])
def test_larger_tiles_keep_within_a_percent_of_the_exact_optimum(n, m, spread):
    """Scores of a normal and of a heavy-tailed distribution, against SciPy's linear program."""
    normal = torch.randn(4 * m, 4 * m, generator=torch.Generator().manual_seed(m + n))
    found, best = kept_and_optimum(normal.abs() if spread == 1 else (spread * normal).exp(), n, m)
    assert (found <= best * (1 + 1e-6)).all()
    assert (1 - found / best).mean() < 0.002 and (1 - found / best).max() < 0.03


def test_all_equal_scores_keep_the_highest_indices():
    keep = select_mask(torch.ones(8, 8), NM(4, 8), "both").keep
    assert keep[4:, 4:].all() and keep[:4, :4].all() and not keep[4:, :4].any()
    assert select_mask(torch.ones(4, 4), NM(2, 4), "both").keep[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(bad, m):
    scores = torch.rand(8, 8)
    scores[2, 3] = bad
    with pytest.raises(DassError, match=r"layers\.7\.up_proj hold NaN or infinite"):
        select_mask(scores, NM(m // 2, m), "both", "layers.7.up_proj")


@pytest.mark.parametrize(("shape", "said"), [((8, 6), "6 input features"), ((6, 8), "6 output features")])
def test_a_side_that_m_does_not_divide(shape, said):
    with pytest.raises(DassError, match=f"a layer has {said}, which M=4 does not divide"):
        select_mask(torch.rand(shape), NM(2, 4), "both")
    model = tiny_model(intermediate_size=36, hidden_size=32)
    with pytest.raises(DassError, match="36 output features, which M=8 does not divide"):
        prune_model(model, BlockPruner(Method("magnitude", BOTH, NM(4, 8))), random_tokens())


def test_what_means_nothing_is_refused():
    with pytest.raises(DassError, match="50% has no tiles"):
        select_mask(torch.rand(4, 4), Unstructured(0.5), "both")
    with pytest.raises(DassError, match="50% has no tiles"):
        Method("wanda", BOTH, Unstructured(0.5))
    with pytest.raises(DassError, match="SparseGPT takes M columns at a time"):
        Method("obs", BOTH, NM(2, 4), "obs")
    Method("obs", BOTH, NM(2, 4))


def test_a_mask_along_one_axis_alone_is_told():
    mask = select_mask(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)), NM(2, 4), "in")
    with pytest.raises(DassError, match="breaks its pattern 2:4 along 'both'"):
        verify_mask(Mask(mask.keep, NM(2, 4), "both"))


@pytest.mark.parametrize("update", ["none", "obs"])
@pytest.mark.parametrize("order", ["released", "matched"])
@pytest.mark.parametrize("criterion", ["wanda_dass", "dass", "ria", "obs"])
def test_every_criterion_order_and_update(criterion, order, update):
    """The pattern holds in the weights; an update leaves the mask that was chosen before it."""
    if criterion == update == "obs":
        return
    found = {}
    for own in ("none", update):
        model = tiny_model()
        masks = prune_model(model, BlockPruner(Method(criterion, BOTH, NM(2, 4), own, order=order)), random_tokens())
        for block in find_blocks(model):
            for p in block.units[0].projections.values():
                verify_mask(masks[p.name])
                assert torch.equal(p.weight != 0, masks[p.name].keep)
        found[own] = masks["model.layers.0.mlp.up_proj"].keep  # of one input: later ones are of pruned blocks
    assert torch.equal(found["none"], found[update])


def test_matched_neurons_keep_more_of_transposable_scores():
    """The order is found for the groups along the neurons; what both axes allow gains with it."""
    gains = []
    for order in ("released", "matched"):
        model = tiny_model()
        masks = prune_model(model, BlockPruner(Method("magnitude", BOTH, NM(2, 4), order=order)), random_tokens())
        dense = tiny_model()
        total = 0.0
        for name, mask in masks.items():
            weight = dense.get_parameter(f"{name}.weight").abs()
            if mask.order is not None:
                weight = weight[:, mask.order] if name.endswith("down_proj") else weight[mask.order]
            total += (weight * mask.keep).sum().item()
        gains.append(total)
    assert gains[1] > 1.01 * gains[0]


@pytest.mark.slow
def test_the_mlps_of_smollm2_take_less_than_a_minute():
    before = time.perf_counter()
    for _ in range(90):
        transposable.keep_transposable(torch.rand(1536, 576), 2, 4)
    assert time.perf_counter() - before < 60
