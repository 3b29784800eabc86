"""Sparse weights in fewer bytes, bit for bit the same when unpacked.

A matrix is the values that are not zero, and which they are: under N:M one digit for each group of M, as many digits
in a byte as fit (2:4 has 6 patterns, so three groups of 4 in a byte, 2/3 bit a weight); else a bit a weight. N:M along
the outputs is packed as N:M along the inputs of the transposed matrix.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dass.pruning.masks import NM, keep_most_important, nm_along

Packing = Literal["in", "out", "bitmask"]
"""N:M along the inputs, along the outputs, or neither."""


@dataclass(frozen=True)
class Packed:
    """A matrix `(..., out_features, in_features)`, packed. Its lines are rows, or columns where packed along `out`."""

    shape: tuple[int, ...]
    packing: Packing
    pattern: NM | None
    """None of a bitmask."""
    values: Tensor
    """Line by line, of the matrix's dtype; under N:M exactly N for each group, zeros among them."""
    codes: Tensor
    """uint8: which weights they are, see `encode`."""
    negative: Tensor | None = None
    """uint8, a bit for each weight of all lines: which zeros are negative; None where none is."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return sum(part.nbytes for part in (self.values, self.codes, self.negative) if part is not None)


def digits_per_byte(pattern: NM) -> int | None:
    """How many groups of M share a byte; None where a bit for each weight is no larger.

    C(M, N) patterns of a group are as many values of a digit: d digits fit where C(M, N)^d <= 256.
    """
    if pattern.m > 16:
        return None
    base = math.comb(pattern.m, pattern.n)
    digits = next(d for d in range(8, -1, -1) if base**d <= 256)
    return digits if digits * pattern.m > 8 else None


def encode(keep: Tensor, pattern: NM | None) -> Tensor:
    """Which weights are kept, as bytes `(length,)` uint8.

    Args:
        keep: `(lines, length)` bool; under a pattern exactly N in each M of a line.
        pattern: None: a bit for each weight.
    """
    digits = None if pattern is None else digits_per_byte(pattern)
    if pattern is None or digits is None:
        return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=None))
    table, lookup = _patterns(pattern), torch.zeros(2**pattern.m, dtype=torch.int32)
    powers = 2 ** torch.arange(pattern.m, dtype=torch.int32)
    lookup[table.int() @ powers] = torch.arange(len(table), dtype=torch.int32)
    found = lookup[keep.cpu().reshape(-1, pattern.m).int() @ powers]
    found = torch.nn.functional.pad(found, (0, -len(found) % digits)).view(-1, digits)
    return (found @ len(table) ** torch.arange(digits, dtype=torch.int32)).to(torch.uint8)


def encoded_bytes(weights: int, pattern: NM | None) -> int:
    """How many bytes `encode` makes of so many weights."""
    digits = None if pattern is None else digits_per_byte(pattern)
    return -(-weights // 8) if pattern is None or digits is None else -(-weights // (pattern.m * digits))


def decode(codes: Tensor, shape: tuple[int, int], pattern: NM | None) -> Tensor:
    """What `encode` was given, `(lines, length)` bool.

    Raises:
        ValueError: the bytes are not as many as of this shape, or mean no pattern.
    """
    digits = None if pattern is None else digits_per_byte(pattern)
    if len(codes) != encoded_bytes(math.prod(shape), pattern):
        raise ValueError(f"{len(codes)} bytes are not those of {shape[0]} x {shape[1]} weights")
    if pattern is None or digits is None:
        bits = np.unpackbits(codes.numpy(), count=math.prod(shape)).astype(bool)
        return torch.from_numpy(bits).view(shape)
    table = _patterns(pattern)
    return table[_digits(codes, len(table), digits, math.prod(shape) // pattern.m)].view(shape)


def pack(weight: Tensor) -> Packed | None:
    """A matrix packed by what its zeros obey; None where nothing is gained.

    Args:
        weight: `(..., out_features, in_features)`, floating point, on the CPU.
    """
    packing, pattern = packing_of(weight)
    if packing is None:
        return None
    lines = _lines(weight, packing)
    keep = lines != 0
    if pattern is not None:  # groups with fewer than N keep zeros besides
        keep = keep_most_important(keep.to(torch.int8), pattern, "in")
    negative = (lines == 0) & lines.signbit()
    signs = encode(negative, None) if negative.any() else None
    return Packed(tuple(weight.shape), packing, pattern, lines[keep], encode(keep, pattern), signs)


def packing_of(weight: Tensor) -> tuple[Packing | None, NM | None]:
    """How `pack` packs a matrix, and by which N:M; None and None where that gains nothing."""
    inputs, outputs = (nm_along(_lines(weight, axis) != 0) for axis in ("in", "out"))
    kept = int(torch.count_nonzero(weight))
    return chosen_packing(inputs, outputs, weight.numel(), kept, weight.element_size())[:2]


def chosen_packing(
    inputs: NM | None, outputs: NM | None, weights: int, kept: int, size: int
) -> tuple[Packing | None, NM | None, int]:
    """How a matrix is packed, by which N:M, and how many bytes it has then, but for the signs of negative zeros.

    Args:
        inputs, outputs: the N:M along them, if any.
        weights, kept: how many there are, and are not zero.
        size: of one, in bytes.
    """
    dense, axes = weights * size, dict[Packing, NM | None]({"in": inputs, "out": outputs})
    ways: list[tuple[Packing, NM | None, int]] = [
        (axis, pattern, weights * pattern.n // pattern.m * size + encoded_bytes(weights, pattern))
        for axis, pattern in axes.items()
        if pattern is not None
    ]
    for found in (*sorted(ways, key=lambda way: way[2]), ("bitmask", None, kept * size + encoded_bytes(weights, None))):
        if found[2] < dense:
            return found
    return None, None, dense


def unpack(packed: Packed) -> Tensor:
    """The matrix again, bit for bit."""
    lines = _lines(torch.empty(packed.shape, dtype=packed.values.dtype, device="meta"), packed.packing)
    shape = (lines.shape[0], lines.shape[1])
    whole = torch.zeros(shape, dtype=packed.values.dtype)
    whole[decode(packed.codes, shape, packed.pattern)] = packed.values
    if packed.negative is not None:
        whole[decode(packed.negative, shape, None)] = -0.0
    if packed.packing == "out":
        return whole.view(*packed.shape[:-2], *packed.shape[:-3:-1]).transpose(-1, -2).contiguous()
    return whole.view(packed.shape)


def product(packed: Packed, x: Tensor) -> tuple[Tensor, int]:
    """y = W x, a token's product straight from the packed form, and how many bytes of W it reads.

    A reference: y_i = sum over the kept weights of row i of value * x_j.

    Args:
        packed: of a matrix `(out_features, in_features)`.
        x: `(in_features,)`, floating point on the CPU; y is of its dtype, rounded once, from sums in fp32 or wider.
    """
    line, place = _places(packed)
    i, j = (place, line) if packed.packing == "out" else (line, place)
    wide = torch.promote_types(x.dtype, torch.float32)  # values are added one by one, and 16 bits lose the small ones
    y = torch.zeros(packed.shape[0], dtype=wide).index_add_(0, i, packed.values.to(wide) * x.to(wide)[j])
    return y.to(x.dtype), packed.values.nbytes + packed.codes.nbytes


def _places(packed: Packed) -> tuple[Tensor, Tensor]:
    """Of each value its line and its place in the line, int64; of N:M by looking up its group's digit."""
    lines, length = packed.shape if packed.packing != "out" else packed.shape[::-1]
    pattern = packed.pattern
    digits = None if pattern is None else digits_per_byte(pattern)
    if pattern is None or digits is None:
        found = decode(packed.codes, (lines, length), pattern).nonzero()
        return found[:, 0], found[:, 1]
    table = _patterns(pattern)
    inside = table.nonzero()[:, 1].view(len(table), pattern.n)  # of each pattern the places that it keeps
    groups = torch.arange(lines * length // pattern.m)
    at = inside[_digits(packed.codes, len(table), digits, len(groups))] + pattern.m * groups[:, None]
    return (at // length).flatten(), (at % length).flatten()


def _digits(codes: Tensor, base: int, digits: int, count: int) -> Tensor:
    """The digits of all bytes, the lowest first, `(count,)` int64."""
    found = codes.long()[:, None] // base ** torch.arange(digits) % base
    if int(codes.max()) >= base**digits or found.flatten()[count:].any():
        raise ValueError("a byte stands for no pattern")
    return found.flatten()[:count]


def _patterns(pattern: NM) -> Tensor:
    """All ways to keep N of M, `(C(M, N), M)` bool."""
    ways = [[i in kept for i in range(pattern.m)] for kept in combinations(range(pattern.m), pattern.n)]
    return torch.tensor(ways)


def _lines(weight: Tensor, packing: str) -> Tensor:
    """A matrix, or several, line by line: `(lines, length)`."""
    turned = weight.transpose(-1, -2) if packing == "out" else weight
    return turned.reshape(-1, turned.shape[-1])
