"""Properties of masks, against a slow and obvious reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dass.errors import DassError
from dass.pruning import masks
from dass.pruning.masks import NM, Mask, Unstructured, select_mask, verify_mask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reference(scores, pattern, axis):
    """Sort every group in plain Python by (score, index) and prune from the front."""
    if axis == "layer" and isinstance(pattern, NM):
        axis = "in"
    rows, columns = scores.shape
    lines = {
        "in": [[(i, j) for j in range(columns)] for i in range(rows)],
        "out": [[(i, j) for i in range(rows)] for j in range(columns)],
        "layer": [[(i, j) for i in range(rows) for j in range(columns)]],
    }[axis]
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for line in lines:
        if isinstance(pattern, NM):
            groups = [line[k : k + pattern.m] for k in range(0, len(line), pattern.m)]
            count = pattern.m - pattern.n
        else:
            groups, count = [line], math.floor(pattern.ratio * len(line))
        for group in groups:
            for place in sorted(group, key=lambda p: (scores[p].item(), p))[:count]:
                keep[place] = False
    return keep


@st.composite
def cases(draw):
    """Scores with many ties, a pattern that fits them, and an axis."""
    axis = draw(st.sampled_from(["in", "out", "layer"]))
    if draw(st.booleans()):
        m = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20]))
        pattern = NM(draw(st.integers(1, m)), m)
        rows, columns = draw(st.integers(1, 6)), m * draw(st.integers(1, 3))
        if axis == "out":
            rows, columns = columns, rows
    else:
        pattern = Unstructured(draw(st.floats(0.01, 0.99)))
        rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) if draw(st.booleans()) else st.floats(0, 1e4, width=16)
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(flat, dtype=dtype).view(rows, columns), pattern, axis


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_sorting_each_group(case):
    scores, pattern, axis = case
    mask = select_mask(scores, pattern, axis)
    assert torch.equal(mask.keep, reference(scores, pattern, axis))
    assert mask.keep.is_contiguous() and mask.pattern == pattern
    verify_mask(mask)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_sorting_as_on_a_gpu_gives_the_same(case):
    scores, pattern, axis = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "LARGEST_RANKED_M", 0)
        patch.setattr(masks, "_kept", masks._kept_by_sorting)
        sorted_ones = select_mask(scores, pattern, axis).keep
    assert torch.equal(sorted_ones, select_mask(scores, pattern, axis).keep)


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(-8, 8))
def test_scaling_a_group_changes_nothing(case, power):
    scores, pattern, axis = case
    scores = scores.double()
    axis = "in" if axis == "layer" and isinstance(pattern, NM) else axis
    scale = torch.ones_like(scores)
    {"in": scale[:1], "out": scale[:, :1], "layer": scale}[axis].mul_(2.0**power)
    assert torch.equal(select_mask(scores * scale, pattern, axis).keep, select_mask(scores, pattern, axis).keep)


@pytest.mark.parametrize("axis", ["in", "out", "layer"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.3)], ids=str)
def test_strides_do_not_matter(pattern, axis):
    wide = torch.randn(64, 128).abs()
    views = [wide.T, wide[:, ::2], wide[::2].T]
    for view in views:
        assert torch.equal(select_mask(view, pattern, axis).keep, select_mask(view.clone(), pattern, axis).keep)


@pytest.mark.parametrize(("axis", "first"), [("in", [[0, 0, 1, 1]] * 4), ("out", [[0] * 4, [0] * 4, [1] * 4, [1] * 4])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_among_equals_the_lower_index_is_pruned(axis, first, dtype):
    keep = select_mask(torch.ones(4, 4, dtype=dtype), NM(2, 4), axis).keep
    assert keep.int().tolist() == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(bad):
    scores = torch.rand(4, 8)
    scores[2, 3] = bad
    with pytest.raises(DassError, match=r"model\.layers\.7\.mlp\.up_proj"):
        select_mask(scores, NM(2, 4), "in", "model.layers.7.mlp.up_proj")


@pytest.mark.parametrize(("shape", "axis"), [((8, 6), "in"), ((6, 8), "out"), ((8, 6), "layer")])
def test_a_width_that_m_does_not_divide(shape, axis):
    with pytest.raises(DassError, match="does not divide"):
        select_mask(torch.rand(shape), NM(2, 4), axis)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_ratios_that_mean_nothing(ratio):
    with pytest.raises(DassError, match=r"sparsity\.ratio"):
        Unstructured(ratio)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4)])
def test_n_and_m_that_mean_nothing(n, m):
    with pytest.raises(DassError, match=r"sparsity\.n"):
        NM(n, m)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_verify_refuses_a_mask_along_the_other_axis(pattern, axis):
    mask = select_mask(torch.rand(32, 32, generator=torch.Generator().manual_seed(0)), pattern, axis)
    verify_mask(mask)
    with pytest.raises(DassError, match="breaks its pattern"):
        verify_mask(Mask(mask.keep, pattern, "out" if axis == "in" else "in"))


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("axis", ["in", "out", "layer"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(20, 40), Unstructured(0.5)], ids=str)
def test_the_number_of_operations_does_not_grow_with_the_matrix(pattern, axis):
    counts = []
    for size in (80, 160, 400):
        with CountOperations() as counter:
            select_mask(torch.rand(size, 2 * size), pattern, axis)
        counts.append(counter.count)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 250
