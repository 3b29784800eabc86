"""Packed weights: the same bits, fewer bytes, and a product straight from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.packing import decode, digits_per_byte, encode, encoded_bytes, pack, packing_of, product, unpack
from dass.pruning.masks import NM, nm_along, select_mask

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


def pruned(shape, pattern, axis, dtype=torch.bfloat16, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight.masked_fill(~select_mask(weight.abs(), pattern, axis).keep, 0)


@pytest.mark.parametrize(
    ("pattern", "digits"),
    [(NM(2, 4), 3), (NM(1, 4), 4), (NM(1, 2), 8), (NM(1, 16), 2), (NM(4, 8), None), (NM(1, 32), None)],
    ids=str,
)
def test_as_many_digits_share_a_byte_as_fit(pattern, digits):
    assert digits_per_byte(pattern) == digits
    if digits is not None:
        base = math.comb(pattern.m, pattern.n)
        assert base**digits <= 256 < base ** (digits + 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32]), st.data())
def test_masks_are_decoded_as_they_were(lines, groups, m, data):
    pattern = NM(data.draw(st.integers(1, m)), m)
    scores = torch.rand(lines, groups * m, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    keep = select_mask(scores, pattern, "in").keep
    for one in (pattern, None):
        codes = encode(keep, one)
        assert codes.dtype == torch.uint8 and len(codes) == encoded_bytes(keep.numel(), one)
        assert torch.equal(decode(codes, tuple(keep.shape), one), keep)


@pytest.mark.parametrize(
    "values", [[0, 0], [216], [6]], ids=["two bytes", "no three digits", "a digit behind the last group"]
)
def test_bytes_that_mean_nothing(values):
    with pytest.raises(ValueError):
        decode(torch.tensor(values, dtype=torch.uint8), (1, 4), NM(2, 4))
    assert decode(torch.tensor([5], dtype=torch.uint8), (1, 4), NM(2, 4)).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("pattern", "axis", "packing"),
    [
        (NM(2, 4), "in", "in"),
        (NM(2, 4), "out", "out"),
        (NM(2, 4), "both", "in"),
        (NM(4, 8), "in", "in"),
        (NM(16, 32), "out", "out"),
        (NM(1, 4), "in", "in"),
        (NM(3, 6), "out", "out"),
    ],
    ids=str,
)
def test_nm_of_either_axis(pattern, axis, packing, dtype):
    weight = pruned((96, 192), pattern, axis, dtype)
    packed = pack(weight)
    assert (packed.packing, packed.pattern) == (packing, pattern)
    assert len(packed.values) == 96 * 192 * pattern.n // pattern.m
    assert same_bits(unpack(packed), weight)
    if (pattern, dtype) == (NM(2, 4), torch.bfloat16):
        assert packed.nbytes < 0.5425 * weight.nbytes and 8 * len(packed.codes) / weight.numel() < 0.67


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(FLOATS),
    st.sampled_from([(8, 12), (1, 4), (5, 7), (3, 8, 4), (64, 64)]),
    st.sampled_from(["in", "out", "none", "all"]),
    st.integers(0, 100),
    st.booleans(),
)
def test_any_matrix_comes_back_bit_for_bit(dtype, shape, zeros, seed, signed):
    """With zeros along either axis, anywhere, or everywhere; with negative zeros, NaN and infinity; and of experts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.flatten()[0], weight.flatten()[-1] = math.nan, -math.inf
    keep = torch.rand(shape, generator=generator) < (0.3 if zeros == "none" else 0.9)
    dim = -1 if zeros == "in" else -2
    if zeros == "all":
        keep[:] = False
    elif zeros in ("in", "out") and shape[dim] % 4 == 0:
        keep.transpose(dim, -1).unflatten(-1, (-1, 4))[..., :2] = False
    weight = weight * keep if signed else weight.masked_fill(~keep, 0)  # of NaN times 0 there is NaN
    packed = pack(weight)
    if packed is None:
        assert weight.count_nonzero() > 0.9 * weight.numel() or weight.numel() < 100
        return
    assert same_bits(unpack(packed), weight)
    assert packed.packing == packing_of(weight)[0]
    if packed.negative is not None:
        assert ((weight == 0) & weight.signbit()).any()


@pytest.mark.parametrize(("pattern", "axis"), [(NM(2, 4), "in"), (NM(2, 4), "out"), (NM(4, 8), "in"), (None, "in")])
def test_a_product_from_the_packed_form(pattern, axis):
    """With whole numbers the sums are exact in any order; half the weights are not read, nor their zeros."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-8, 9, (24, 48), generator=generator).float() + 0.5
    keep = torch.rand(24, 48, generator=generator) < 0.5
    weight = weight * (keep if pattern is None else select_mask(weight.abs(), pattern, axis).keep)
    x = torch.randint(-8, 9, (48,), generator=generator).float()
    packed = pack(weight)
    y, read = product(packed, x)
    assert torch.equal(y, weight @ x)
    assert read == packed.values.nbytes + len(packed.codes) < 0.6 * weight.nbytes
    wide = torch.randn(48, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product(packed, wide)[0], weight.double() @ wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_long_product_in_16_bits_is_as_good_as_the_dense_one(axis, dtype):
    """Over LLaMA2-7B's 11008 inputs sums of 16 bits would be wrong by percents."""
    weight = pruned((64, 11008), NM(2, 4), axis, dtype)
    x = torch.randn(11008, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = weight.double() @ x.double()
    y, _ = product(pack(weight), x)
    assert y.dtype == dtype
    ours, dense = ((one.double() - exact).norm() / exact.norm() for one in (y, weight @ x))
    assert ours < 1.5 * dense


def test_dense_and_nearly_dense_matrices_are_not_packed():
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    assert pack(weight) is None
    weight[0, :3] = 0
    assert pack(weight) is None
    weight[:, ::8] = 0
    assert pack(weight).pattern == NM(7, 8)
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    weight[:, ::32] = 0  # 31:32, whose bits take as much as it saves, and more
    assert pack(weight) is None


def test_of_two_axes_the_smaller_one_is_packed():
    """1:32 along the outputs leaves 2:4 along the inputs by chance."""
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[torch.arange(64) // 2, torch.arange(64)] = 1
    assert nm_along(weight != 0) == NM(2, 4)
    packed = pack(weight)
    assert (packed.packing, packed.pattern) == ("out", NM(1, 32))


def test_patterns_are_found_in_which_weights_are_kept():
    half = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    assert nm_along(half) is None and nm_along(half.T) is None  # 30 of 32 would hold, but is not meant
    for pattern in (NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 3), NM(12, 24), NM(3, 4), NM(24, 48)):
        keep = select_mask(torch.rand(48, 96), pattern, "in").keep
        assert nm_along(keep) == pattern and nm_along(keep.T.contiguous()) is None
        keep[:, :5] = False  # dead inputs
        assert nm_along(keep) == pattern
    lines = torch.rand(48, 64).argsort(1) < 32  # as many in each line, which is no 32:64
    assert nm_along(lines) is None and nm_along(torch.cat([lines, lines], 1)) == NM(32, 64)
    assert nm_along(torch.zeros(4, 8, dtype=torch.bool)) == NM(1, 4) and nm_along(torch.ones(4, 8) > 0) is None


@pytest.mark.parametrize("pattern", [NM(4, 8), NM(2, 8), NM(16, 32), NM(64, 128)], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(96, 0), (60, 0), (0, 160), (128, 128)], ids=["rows", "60 rows", "inputs", "both"]
)
def test_a_pattern_is_told_beside_dead_neurons_and_inputs(pattern, outputs, inputs):
    """Even where all lines of an early look are dead, or 2:4 holds besides."""
    scores = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) + 1
    scores[:outputs], scores[:, :inputs] = 0, 0
    keep = select_mask(scores, pattern, "in").keep & (scores > 0)
    assert nm_along(keep) == pattern and nm_along(keep.T) is None


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 2), (3, 4), (1, 8), (5, 8), (12, 24), (8, 32), (40, 64), (72, 96), (64, 128)]),
    st.integers(0, 224),
    st.booleans(),
    st.integers(0, 99),
)
def test_dead_weights_neither_hide_a_pattern_nor_make_one(pattern, dead, half, seed):
    """Dead: any neurons, and the first half of the inputs, which all M divide."""
    generator, wanted = torch.Generator().manual_seed(seed), NM(*pattern)
    alive = torch.ones(256, 768, dtype=torch.bool)
    alive[torch.randperm(256, generator=generator)[:dead]], alive[:, : 384 * half] = False, False
    scores = torch.rand(256, 768, generator=generator)
    keep = select_mask(scores, wanted, "in").keep & alive
    told = nm_along(keep)
    assert told is not None and told.n * wanted.m <= wanted.n * told.m
    assert keep.view(-1, told.m).sum(1).max() == told.n
    for unstructured in (scores < 0.5, scores.argsort(1) < 384, scores < 0.99, scores >= 0):
        assert nm_along(unstructured & alive) is None
