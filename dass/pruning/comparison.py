"""What several methods would do to each block of the dense model, measured in one walk that prunes nothing.

In each block every method prunes the same dense weights on the same dense inputs, is measured, and the dense weights
are put back.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import ROLES, Block, Projection
from dass.pruning.pruner import BlockPruner, Needs
from dass.pruning.statistics import Streams

ALPHA = 0.5  # the paper's exponent of n

ByRole = dict[str, dict[str, float | None]]
"""One number for each method (or pair of methods) and role; a role that a method leaves dense is absent."""


@dataclass(frozen=True)
class NormSpread:
    """How far apart the intermediate norms n_i = ||h_i|| of a block are; where they are alike, DaSS brings nothing."""

    cv: float | None
    """Coefficient of variation: standard deviation over mean. None where all norms are 0."""
    p90_p10: float | None
    """The 90th over the 10th percentile. None where the 10th is 0."""
    reordered: float
    """`reordered_share` at the paper's alpha, mean of gate and up: how much of |W|'s order DaSS changes."""


@dataclass(frozen=True)
class BlockDiagnostics:
    """What was measured on one block; over all its units, where it has several."""

    name: str
    errors: ByRole
    """By method and role, `relative_error`. None where the dense output is 0."""
    jaccard: ByRole
    """By pair of methods, such as `wanda|dass`, and role: `jaccard` of the kept weights."""
    norms: NormSpread


def check_comparison(pruners: Mapping[str, BlockPruner]) -> None:
    """Raise DassError where methods cannot be compared."""
    if len(pruners) < 2:
        raise DassError("A comparison needs at least two methods: name them.", field="method.methods")
    for what, found in (
        ("pattern", {str(pruner.method.pattern) for pruner in pruners.values()}),
        ("targets", {pruner.targets for pruner in pruners.values()}),
    ):
        if len(found) > 1:
            raise DassError(
                f"The methods to compare differ in their {what} ({', '.join(sorted(found))}): give all the same."
            )
    if any(pruner.method.order != "released" for pruner in pruners.values()):
        raise DassError("Methods are compared in the released order of the neurons alone: use it.", "method.order")


def comparison_needs(pruners: Mapping[str, BlockPruner], block: Block) -> Needs:
    """The Hessian of every input of a projection that is pruned, and the intermediate norms.

    With the Hessian the errors are those of the calibration tokens, exactly.
    """
    targeted = {p.reads for p in _targets(pruners, block)}
    readers = [p.reads for p in block.projections]
    intermediate = {unit.intermediate for unit in block.units}
    return {reads: reads in targeted for reads in readers if reads in targeted or reads in intermediate}


@torch.no_grad()
def compare_block(pruners: Mapping[str, BlockPruner], block: Block, streams: Streams) -> BlockDiagnostics:
    """Measure every method on a block and leave its weights as they were.

    Args:
        pruners: by the name of the method.
        streams: of `comparison_needs`.

    Raises:
        DassError: what `BlockPruner.prune` raises for one of the methods.
    """
    targets = _targets(pruners, block)
    dense = {p.name: p.weight.clone() for p in targets}
    hessians = {reads: stream.hessian() for reads, stream in streams.items() if stream.with_hessian}
    energies: dict[str, dict[str, tuple[float, float]]] = {}
    kept: dict[str, dict[str, Tensor]] = {}
    for name, pruner in pruners.items():
        try:
            pruned = pruner.prune(block, streams)
            energies[name] = {
                one.projection.name: output_energies(
                    dense[one.projection.name], one.projection.weight, hessians[one.projection.reads]
                )
                for one in pruned
            }
            kept[name] = {one.projection.name: one.mask.keep for one in pruned}
        finally:
            for p in targets:
                p.weight.copy_(dense[p.name])
    errors: ByRole = {}
    overlaps: ByRole = {}
    for name, own in energies.items():
        errors[name] = {}
        for role, names in _by_role(targets, own).items():
            errors[name][role] = _quotient(sum(own[n][0] for n in names), sum(own[n][1] for n in names))
    for one, other in combinations(pruners, 2):
        overlaps[f"{one}|{other}"] = {
            role: jaccard([kept[one][n] for n in names], [kept[other][n] for n in names])
            for role, names in _by_role(targets, kept[one].keys() & kept[other].keys()).items()
        }
    return BlockDiagnostics(block.name, errors, overlaps, norm_spread(block, streams))


def diagnostics(measured: list[BlockDiagnostics]) -> dict[str, Any]:
    """All measurements for a record: lists over the blocks, None where there is no number.

    `{"errors": {method: {role: [...]}}, "jaccard": {"one|other": {role: [...]}}, "norms": {"cv": [...], ...}}`
    """
    norms = [asdict(block.norms) for block in measured]
    return {
        "errors": _over_depth([block.errors for block in measured]),
        "jaccard": _over_depth([block.jaccard for block in measured]),
        "norms": {name: [one[name] for one in norms] for name in NormSpread.__dataclass_fields__},
    }


def output_energies(dense: Tensor, pruned: Tensor, hessian: Tensor) -> tuple[float, float]:
    """||X D^T||_F^2 = tr(D H D^T) of the difference D = W - W', and the same of W; up to a factor in H = X^T X.

    Args:
        dense: W, `(out_features, in_features)`.
        pruned: W', of the same shape.
        hessian: `(in_features, in_features)`, fp32 or fp64; reckoned in its dtype.
    """
    difference, whole = dense.to(hessian.dtype) - pruned.to(hessian.dtype), dense.to(hessian.dtype)
    energies = [((w @ hessian) * w).sum(dtype=torch.float64).item() for w in (difference, whole)]
    return energies[0], energies[1]


def jaccard(one: list[Tensor], other: list[Tensor]) -> float:
    """The weights that both masks keep, over those that at least one keeps; bool, in pairs of the same shape.

    Two random masks that keep a share k have k / (2 - k): a third for a half.
    """
    both = sum((a & b).sum() for a, b in zip(one, other, strict=True))
    either = sum((a | b).sum() for a, b in zip(one, other, strict=True))
    return (both / either).item()


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


def norm_spread(block: Block, streams: Streams) -> NormSpread:
    """How far apart the intermediate norms n of a block are, and what that does to its weights."""
    norms = {unit.name: streams[unit.intermediate].norm() for unit in block.units}
    norm = torch.cat(list(norms.values()))
    p10, p90 = torch.quantile(norm, norm.new_tensor([0.1, 0.9])).tolist()
    shares = [
        reordered_share(p.weight, norms[unit.name])
        for unit in block.units
        for role, p in unit.projections.items()
        if role != "down"
    ]
    return NormSpread(
        cv=_quotient(norm.std(correction=0).item(), norm.mean().item()),
        p90_p10=_quotient(p90, p10),
        reordered=sum(shares) / len(shares),
    )


def _targets(pruners: Mapping[str, BlockPruner], block: Block) -> list[Projection]:
    """The projections of a block that at least one method prunes."""
    names = {p.name for pruner in pruners.values() for p in pruner.projections(block)}
    return [p for p in block.projections if p.name in names]


def _by_role(projections: list[Projection], names: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for p in projections:
        if p.name in names:
            found.setdefault(p.role, []).append(p.name)
    return found


def _quotient(numerator: float, denominator: float) -> float | None:
    """None where the denominator is 0: JSON has no infinity."""
    return numerator / denominator if denominator else None


def _over_depth(blocks: list[ByRole]) -> dict[str, dict[str, list[float | None]]]:
    """From one table a block to one list over the blocks for each name and role."""
    names = dict.fromkeys(name for block in blocks for name in block)
    return {
        name: {
            role: [block[name].get(role) for block in blocks]
            for role in ROLES
            if any(role in block[name] for block in blocks)
        }
        for name in names
    }
