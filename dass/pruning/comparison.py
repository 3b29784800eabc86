"""What several methods would do to each block of the dense model, measured in one walk that prunes nothing.

The walk takes a `Comparison` in place of a `BlockPruner`. In each block every method prunes the same dense weights on
the same dense inputs, is measured, and the dense weights are put back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import INPUT_OF_ROLE, Block, Projection
from dass.pruning.method import BlockPruner, Pruned, Streams
from dass.pruning.statistics import InputStream

ALPHA = 0.5  # the paper's exponent of n

ByRole = dict[str, dict[str, float | None]]
"""One number for each method (or pair of methods) and role; a role that a method leaves dense is absent."""


@dataclass(frozen=True)
class NormSpread:
    """How far apart the intermediate norms n_i = ||h_i|| of one MLP are; where they are alike, DaSS brings nothing."""

    cv: float | None
    """Coefficient of variation: standard deviation over mean. None where all norms are 0."""
    p90_p10: float | None
    """The 90th over the 10th percentile. None where the 10th is 0."""
    reordered: float
    """`reordered_share` at the paper's alpha, mean of gate and up: how much of |W|'s order DaSS changes."""


@dataclass(frozen=True)
class BlockDiagnostics:
    """What was measured on one block."""

    name: str
    errors: ByRole
    """By method and role, `relative_error`. None where the dense output is 0."""
    jaccard: ByRole
    """By pair of methods, such as `wanda|dass`, and role: `jaccard` of the kept weights."""
    norms: NormSpread


@dataclass(frozen=True)
class Comparison:
    """Methods that are compared on every block; stands in for the `BlockPruner` of `prune_model`."""

    pruners: Mapping[str, BlockPruner]
    """By the method's name."""
    measured: list[BlockDiagnostics] = field(default_factory=list, init=False)
    """Grows by one with each block of the walk."""

    def __post_init__(self) -> None:
        """Refuse methods that cannot be compared."""
        if len(self.pruners) < 2:
            raise DassError("A comparison needs at least two methods: name them in `method.methods`.")
        for what, found in (
            ("pattern", {str(pruner.method.pattern) for pruner in self.pruners.values()}),
            ("targets", {pruner.targets for pruner in self.pruners.values()}),
        ):
            if len(found) > 1:
                raise DassError(
                    f"The methods to compare differ in their {what} ({', '.join(sorted(found))}): give all the same."
                )

    def check(self, blocks: list[Block]) -> None:
        """Refuse a pattern that does not fit a layer; see `BlockPruner.check`."""
        for pruner in self.pruners.values():
            pruner.check(blocks)

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that at least one method prunes."""
        targets = {p.role for pruner in self.pruners.values() for p in pruner.projections(block)}
        return [p for role, p in block.projections.items() if role in targets]

    def open_streams(self, block: Block) -> Streams:
        """Empty statistics with Hessian for every input of a projection that is pruned, and for the intermediate.

        With the Hessian the errors are those of the calibration tokens, exactly.
        """
        targeted = {INPUT_OF_ROLE[p.role] for p in self.projections(block)}
        readers = {INPUT_OF_ROLE[role]: p.linear.weight for role, p in block.projections.items()}
        return {
            source: InputStream(weight.shape[1], weight.dtype, weight.device, source in targeted)
            for source, weight in readers.items()
            if source in targeted or source == "intermediate"
        }

    def prune(self, block: Block, streams: Streams) -> list[Pruned]:
        """Measure every method on a block and leave its weights as they were, so that nothing is returned as pruned.

        Raises:
            DassError: what `BlockPruner.prune` raises for one of the methods.
        """
        dense = {p.role: p.linear.weight.clone() for p in self.projections(block)}
        hessians = {source: stream.hessian() for source, stream in streams.items() if stream.with_hessian}
        errors: ByRole = {}
        kept: dict[str, dict[str, Tensor]] = {}
        for name, pruner in self.pruners.items():
            try:
                pruned = {one.projection.role: one for one in pruner.prune(block, streams)}
                errors[name] = {
                    role: relative_error(dense[role], one.projection.linear.weight, hessians[INPUT_OF_ROLE[role]])
                    for role, one in pruned.items()
                }
                kept[name] = {role: one.mask.keep for role, one in pruned.items()}
            finally:
                for role, weight in dense.items():
                    block.projections[role].linear.weight.copy_(weight)
        overlaps: ByRole = {
            f"{one}|{other}": {
                role: jaccard(keep, kept[other][role]) for role, keep in kept[one].items() if role in kept[other]
            }
            for one, other in combinations(self.pruners, 2)
        }
        norm = streams["intermediate"].norm()
        self.measured.append(BlockDiagnostics(block.name, errors, overlaps, norm_spread(block, norm)))
        return []

    def as_dict(self) -> dict[str, Any]:
        """All measurements for a record: lists over the blocks, None where there is no number.

        `{"errors": {method: {role: [...]}}, "jaccard": {"one|other": {role: [...]}}, "norms": {"cv": [...], ...}}`
        """
        norms = [asdict(block.norms) for block in self.measured]
        return {
            "errors": _over_depth([block.errors for block in self.measured]),
            "jaccard": _over_depth([block.jaccard for block in self.measured]),
            "norms": {name: [one[name] for one in norms] for name in NormSpread.__dataclass_fields__},
        }


def relative_error(dense: Tensor, pruned: Tensor, hessian: Tensor) -> float | None:
    """||X W^T - X W'^T||_F^2 / ||X W^T||_F^2 = tr(D H D^T) / tr(W H W^T) with D = W - W', H = X^T X up to a factor.

    Args:
        dense: W, `(out_features, in_features)`.
        pruned: W', of the same shape.
        hessian: `(in_features, in_features)`, fp32 or fp64; the error is computed in its dtype.

    Returns:
        The error, or None where the dense output is 0.
    """
    energies = []
    for weight in (dense.to(hessian.dtype) - pruned.to(hessian.dtype), dense.to(hessian.dtype)):
        energies.append(((weight @ hessian) * weight).sum(dtype=torch.float64).item())
    return _quotient(*energies)


def jaccard(one: Tensor, other: Tensor) -> float:
    """The weights that both masks keep, over those that at least one keeps; bool, of the same shape.

    Two random masks that keep a share k have k / (2 - k): a third for a half.
    """
    return ((one & other).sum() / (one | other).sum()).item()


def reordered_share(weight: Tensor, norm: Tensor, alpha: float = ALPHA) -> float:
    """The share of pairs within a column whose order by |W_ij| is the other way round by |W_ij| n_i^alpha.

    0 where all n are equal; 1/2 where n alone decides. Of all pairs those of neighbouring rows are taken, which N:M
    compares: neurons stand in no order, so that they are a fair sample.

    Args:
        weight: of gate or up, `(f, in_features)`.
        norm: n, `(f,)`.
    """
    importance = weight.detach().to(norm.dtype).abs()
    weighted = importance * norm[:, None] ** alpha
    return (importance.diff(dim=0).sign() * weighted.diff(dim=0).sign() < 0).double().mean().item()


def norm_spread(block: Block, norm: Tensor) -> NormSpread:
    """How far apart the intermediate norms n `(f,)` of a block are, and what that does to its weights."""
    p10, p90 = torch.quantile(norm, norm.new_tensor([0.1, 0.9])).tolist()
    shares = [reordered_share(block.projections[role].linear.weight, norm) for role in ("gate", "up")]
    return NormSpread(
        cv=_quotient(norm.std(correction=0).item(), norm.mean().item()),
        p90_p10=_quotient(p90, p10),
        reordered=sum(shares) / len(shares),
    )


def _quotient(numerator: float, denominator: float) -> float | None:
    """None where the denominator is 0: JSON has no infinity."""
    return numerator / denominator if denominator else None


def _over_depth(blocks: list[ByRole]) -> dict[str, dict[str, list[float | None]]]:
    """From one table a block to one list over the blocks for each name and role."""
    names = dict.fromkeys(name for block in blocks for name in block)
    return {
        name: {
            role: [block[name].get(role) for block in blocks]
            for role in INPUT_OF_ROLE
            if any(role in block[name] for block in blocks)
        }
        for name in names
    }
