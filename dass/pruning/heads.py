"""Neuron order inside attention: what a head of v writes, and o reads, can be permuted together."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dass.distributed import first
from dass.pruning.blocks import Block, Projection
from dass.pruning.statistics import Streams

NEAR = 0.05
"""By how much of its norm what a head of o read of a token may differ from what v wrote; 16-bit numbers round."""


@dataclass(frozen=True)
class Heads:
    """The heads of the values. The rows of one can be permuted if the columns that read it are, alike."""

    v: Projection
    """v, or the qkv that holds it."""
    o: Projection
    rows: Tensor
    """Of v, `(n_kv_heads, head_dim)`."""
    columns: Tensor
    """Of o, by query head that reads them, `(n_kv_heads, g, head_dim)`."""

    def keep(self, v: Tensor, o: Tensor) -> bool:
        """Whether permutations move values within their head alone, and o reads them in the same order."""
        if v.shape != self.v.weight.shape[:1] or o.shape != self.o.weight.shape[1:]:
            return False
        rest = torch.ones_like(v, dtype=torch.bool)
        rest[self.rows] = False
        if not torch.equal(v[rest], torch.arange(len(v))[rest]):
            return False
        for rows, columns in zip(self.rows, self.columns, strict=True):
            found = v[rows] - rows[0]
            inside = bool((found >= 0).all() and (found < len(rows)).all())
            if not inside or not torch.equal(o[columns], columns[:, found]):
                return False
        return True

    def fit(self, streams: Streams) -> bool:
        """Whether each head of o read of the first token what these rows wrote.

        In causal attention it attends to itself alone, so that it reads its own values as they are; where something is
        added to or taken from them (a sink, a clip), they do not fit.
        """
        x, read = (streams[p.reads].first for p in (self.v, self.o))
        if x is None or read is None:
            return False
        written = self.v.weight.to(x.dtype) @ x
        if self.v.bias is not None:
            written = written + self.v.bias.to(x.dtype)
        found = read[self.columns.to(read.device)]
        expected = written.to(read.device)[self.rows.to(read.device)][:, None]
        size = found.norm(dim=-1)
        return bool((((found - expected).norm(dim=-1) <= NEAR * size) & (size > 0)).all())


def heads_of(block: Block, m: int) -> list[Heads]:
    """What the heads of a block may be: one answer, where v is a matrix of its own; two ways to stack q, k and v.

    None where attention is built otherwise, or has something that would have to be permuted along, or M does not divide
    a head.
    """
    mixer, o = block.mixer, block.attention.get("o")
    v = block.attention.get("v", block.attention.get("qkv"))
    size = getattr(mixer, "head_dim", getattr(mixer, "head_size", None))
    if mixer is None or v is None or o is None or not isinstance(size, int) or size % m:
        return []
    written, read = v.weight.shape[0], o.weight.shape[1]
    others = [name for name, p in mixer.named_parameters() if p.shape in ((written,), (read,), (size,))]
    if not all(name.endswith("bias") or name.startswith(("q_", "k_")) for name in others):
        return []
    queries = block.attention["q"].weight.shape[0] if v.role == "v" else read
    values = written if v.role == "v" else (written - read) // 2
    if queries != read or values < size or values % size or read % values or (v.role == "qkv" and read % size):
        return []
    rows, columns = torch.arange(written), torch.arange(read).view(values // size, -1, size)
    if v.role == "v":
        return [Heads(v, o, rows.view(-1, size), columns)]
    # all q, all k, all v; or, for each head of k and v, the q that read it, k, v
    stacked = [rows[-values:].view(-1, size), rows.view(values // size, -1, size)[:, -1]]
    return [Heads(v, o, one, columns) for one in stacked if written == read + 2 * values]


def known_heads(block: Block, m: int, streams: Streams) -> Heads | None:
    """The heads of a block; None where they cannot be told.

    Where q, k and v are one matrix, what o read of the first token tells how they are stacked, in the first process.
    """
    found = heads_of(block, m)
    return next((one for one in found if one.v.role == "v" or first(partial(one.fit, streams))), None)
