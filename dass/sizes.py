"""What a model takes in memory, from its configuration alone: whole, a block at a time, or an expert at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dass.errors import DassError, told
from dass.models import DTYPES, auto_class, load_config, require_supported
from dass.pruning.blocks import Block
from dass.pruning.layout import find_blocks
from dass.pruning.observe import statistics_bytes
from dass.pruning.pruner import Needs


@dataclass(frozen=True)
class Needed:
    """Bytes of a model that are in memory at once."""

    whole: int
    """All its weights."""
    streamed: int
    """Where its blocks lie on disk."""
    by_expert: int
    """Where its experts come one by one, too."""
    statistics: int = 0
    """What is known of one block, beside its weights."""


def memory_needed(
    source: str,
    revision: str | None,
    dtype: str,
    projections: dict[str, str] | None = None,
    needs: Callable[[Block], Needs] | None = None,
    check: Callable[[list[Block]], object] | None = None,
) -> Needed:
    """What a model takes, from its configuration alone.

    Args:
        needs: what must be seen in a block, such as `BlockPruner.needs`.
        check: is given the blocks, which hold no numbers; None: a model whose blocks are not understood will do, and is
            needed whole.

    Raises:
        DassError: the configuration cannot be read, its model cannot be pruned here, or what `check` raises.
    """
    config = load_config(source, revision)
    require_supported(config)
    advice = "correct its entries"
    with told(f"The config.json of {source} makes no causal language model", advice, Exception), torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=False)
    size, whole = DTYPES[dtype].itemsize, sum(p.numel() for p in empty.parameters())
    try:
        blocks = find_blocks(empty, projections)
    except DassError:
        if check is not None:
            raise
        return Needed(whole * size, whole * size, whole * size)
    if check is not None:
        check(blocks)
    sizes = [size_of(block) for block in blocks]
    outside = whole - sum(one.whole for one in sizes)
    streamed, by_expert = ((outside + at_once(sizes, one_by_one)) * size for one_by_one in (False, True))
    statistics = [statistics_bytes(block, needs(block)) for block in blocks] if needs is not None else [0]
    return Needed(whole * size, streamed, by_expert, max(statistics))


@dataclass(frozen=True)
class Size:
    """How many weights a block has."""

    whole: int
    experts: int
    """All of those that can come one by one."""
    expert: int
    """One of them."""


def size_of(block: Block) -> Size:
    """Count the weights of a block."""
    experts = [getattr(module, key) for module, key in block.experts.values()]
    whole = sum(p.numel() for p in block.module.parameters())
    return Size(whole, sum(p.numel() for p in experts), sum(p[0].numel() for p in experts))


def at_once(sizes: list[Size], by_expert: bool = False) -> int:
    """The weights of blocks that are in memory at most: one is worked on while the next is read; so with experts."""
    each = [one.whole - one.experts * by_expert for one in sizes]
    two = [2 * by_expert * one.expert for one in sizes]
    return max(map(sum, zip(each, [*each[1:], 0], two, strict=True)))
