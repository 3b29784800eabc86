"""What several methods would do to each block of the dense model, measured in one walk that prunes nothing.

In each block every method prunes the same dense weights on the same dense inputs, is measured, and the dense weights
are put back.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import ROLES, Block, Projection
from dass.pruning.outputs import Outputs, added, squared_error
from dass.pruning.pruner import BlockPruner, Needs
from dass.pruning.statistics import Streams
from dass.pruning.units import Expert, experts_of, written

ALPHA = 0.5  # the paper's exponent of n
SHARE = 0.25  # of the calibration sequences that the error of a whole MLP is measured on
WHOLE = "mlp"  # stands among the roles for all of a block's MLP

ByRole = dict[str, dict[str, float | None]]
"""One number for each method (or pair of methods) and role; a role that a method leaves dense is absent."""


@dataclass(frozen=True)
class NormSpread:
    """How far apart the norms are that methods go by: where they are alike, a method brings nothing.

    DaSS goes by the intermediate norms n_i = ||h_i||, Wanda in gate and up by those of their inputs, ||x_j||.
    """

    cv: float | None
    """Coefficient of variation of n: standard deviation over mean. None where all norms are 0."""
    p90_p10: float | None
    """The 90th over the 10th percentile of n. None where the 10th is 0."""
    reordered: float
    """`reordered_share` at the paper's alpha, mean of gate and up: how much of |W|'s order DaSS changes."""
    input_cv: float | None
    """`cv` of the input norms of gate and up."""
    input_p90_p10: float | None
    """`p90_p10` of the input norms of gate and up."""


@dataclass(frozen=True)
class BlockDiagnostics:
    """What was measured on one block; over all its units, where it has several."""

    name: str
    errors: ByRole
    """By method and role, ||Y' - Y||^2 / ||Y||^2 of the outputs. None where the dense output is 0.

    And by method for `mlp`: of what the MLP adds to the output of the block, all its projections pruned.
    """
    kept: ByRole
    """By method and role, `kept_importance` by the method's own criterion."""
    jaccard: ByRole
    """By pair of methods, such as `wanda|dass`, and role: `jaccard` of the kept weights."""
    norms: NormSpread
    zeros: float
    """Share of exact zeros among the intermediate activations, as relu leaves them."""
    experts: list[Expert]
    """Of a block with a router each by itself."""


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
    """The Hessian of every input of a projection that is pruned, and the norms of all that an MLP reads.

    With the Hessian the errors are those of the calibration tokens, exactly.
    """
    targeted = {p.reads for p in _targets(pruners, block)}
    read = targeted | {p.reads for p in _mlp(block)}
    return {p.reads: p.reads in targeted for p in block.projections if p.reads in read}


@torch.no_grad()
def compare_block(
    pruners: Mapping[str, BlockPruner],
    block: Block,
    streams: Streams,
    outputs: Outputs,
    rare: Mapping[str, int] = MappingProxyType({}),
) -> BlockDiagnostics:
    """Measure every method on a block and leave its weights as they were.

    Args:
        pruners: by the name of the method.
        streams: of `comparison_needs`.
        outputs, rare: see `Step`.

    Raises:
        DassError: what `BlockPruner.prune` raises for one of the methods.
    """
    targets, mlp = _targets(pruners, block), _mlp(block)
    dense = {p.name: p.weight.clone() for p in (*targets, *mlp)}
    hessians = {reads: stream.hessian() for reads, stream in streams.items() if stream.with_hessian}
    whole = {p.name: output_energy(dense[p.name], hessians[p.reads]) for p in targets}
    dense_outputs = list(outputs(SHARE))
    errors: ByRole = {}
    kept: ByRole = {}
    masks: dict[str, dict[str, Tensor]] = {}
    by_mlp = added(block, dense_outputs, lambda: outputs(SHARE))
    of_units, by_units = written(block, outputs, SHARE), {}
    try:
        for name, pruner in pruners.items():
            masks[name] = {one.projection.name: one.mask.keep for one in pruner.prune(block, streams, outputs)}
            pruned = [p for p in targets if p.name in masks[name]]
            lost = {
                p.name: output_energy(dense[p.name].to(hessians[p.reads].dtype) - p.weight, hessians[p.reads])
                for p in pruned
            }
            _put(dense, block.attention.values())  # what the MLP reads stays dense
            moved = squared_error(dense_outputs, outputs(SHARE))
            if any(unit.routed for unit in block.units):
                by_units[name] = written(block, outputs, SHARE)
            _put(dense, mlp)
            shares = {p.name: kept_importance(pruner.scores(block, p, streams), masks[name][p.name]) for p in pruned}
            by_role = _by_role(targets, masks[name])
            errors[name] = {
                role: _quotient(sum(lost[n] for n in names), sum(whole[n] for n in names))
                for role, names in by_role.items()
            }
            if any(p.name in masks[name] for p in mlp):
                errors[name][WHOLE] = _quotient(moved, by_mlp)
            kept[name] = {role: _mean([shares[n] for n in names]) for role, names in by_role.items()}
    finally:
        _put(dense, [*targets, *mlp])
    overlaps: ByRole = {}
    for one, other in combinations(pruners, 2):
        overlaps[f"{one}|{other}"] = {
            role: jaccard([masks[one][n] for n in names], [masks[other][n] for n in names])
            for role, names in _by_role(targets, masks[one].keys() & masks[other].keys()).items()
        }
    experts = experts_of(block, of_units, by_units, streams, rare)
    return BlockDiagnostics(block.name, errors, kept, overlaps, norm_spread(block, streams), of_units.zeros, experts)


def diagnostics(measured: list[BlockDiagnostics]) -> dict[str, Any]:
    """All measurements for a record: lists over the blocks, None where there is no number.

    `{"errors": {method: {role: [...]}}, "kept": (alike), "jaccard": {"one|other": {role: [...]}},
    "norms": {"cv": [...], ...}, "zeros": [...], "experts": [{"block", "index", "tokens", "errors"}, ...]}`
    """
    norms = [asdict(block.norms) for block in measured]
    return {
        "errors": _over_depth([block.errors for block in measured]),
        "kept": _over_depth([block.kept for block in measured]),
        "jaccard": _over_depth([block.jaccard for block in measured]),
        "norms": {name: [one[name] for one in norms] for name in NormSpread.__dataclass_fields__},
        "zeros": [block.zeros for block in measured],
        "experts": [asdict(expert) for block in measured for expert in block.experts],
    }


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """||X W^T||_F^2 = tr(W H W^T), up to a factor in H = X^T X.

    Args:
        weight: W, or what W lost, `(out_features, in_features)`.
        hessian: `(in_features, in_features)`, fp32 or fp64; reckoned in its dtype.
    """
    wide = weight.to(hessian.dtype)
    return ((wide @ hessian) * wide).sum(dtype=torch.float64).item()


def kept_importance(scores: Tensor, keep: Tensor) -> float | None:
    """The share of the scores that a mask keeps: 1 if nothing that counts is lost. None where all scores are 0."""
    kept, whole = ((scores * part).sum(dtype=torch.float64).item() for part in (keep, 1))
    return _quotient(kept, whole)


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
    """How far apart the norms of what an MLP reads are, and what those of its neurons do to its weights."""
    norms = {p.name: streams[p.reads].norm() for p in _mlp(block)}
    cv, p90_p10 = _spread([norms[unit.projections["down"].name] for unit in block.units])
    input_cv, input_p90_p10 = _spread([norms[unit.projections["up"].name] for unit in block.units])
    shares = [
        reordered_share(p.weight, norms[unit.projections["down"].name])
        for unit in block.units
        for role, p in unit.projections.items()
        if role != "down"
    ]
    return NormSpread(cv, p90_p10, sum(shares) / len(shares), input_cv, input_p90_p10)


def _spread(norms: list[Tensor]) -> tuple[float | None, float | None]:
    """Standard deviation over mean, and 90th over 10th percentile."""
    norm = torch.cat(norms)
    p10, p90 = torch.quantile(norm, norm.new_tensor([0.1, 0.9])).tolist()
    return _quotient(norm.std(correction=0).item(), norm.mean().item()), _quotient(p90, p10)


def _mlp(block: Block) -> list[Projection]:
    """The projections of its MLPs."""
    return [p for unit in block.units for p in unit.projections.values()]


def _targets(pruners: Mapping[str, BlockPruner], block: Block) -> list[Projection]:
    """The projections of a block that at least one method prunes."""
    names = {p.name for pruner in pruners.values() for p in pruner.projections(block)}
    return [p for p in block.projections if p.name in names]


def _put(dense: Mapping[str, Tensor], projections: Iterable[Projection]) -> None:
    """Write the dense weights back, where there is a copy."""
    for p in projections:
        if p.name in dense:
            p.weight.copy_(dense[p.name])


def _by_role(projections: list[Projection], names: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for p in projections:
        if p.name in names:
            found.setdefault(p.role, []).append(p.name)
    return found


def _quotient(numerator: float, denominator: float) -> float | None:
    """None where the denominator is 0: JSON has no infinity."""
    return numerator / denominator if denominator else None


def _mean(values: list[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return _quotient(sum(found), len(found))


def _over_depth(blocks: list[ByRole]) -> dict[str, dict[str, list[float | None]]]:
    """From one table a block to one list over the blocks for each name and role."""
    names = dict.fromkeys(name for block in blocks for name in block)
    return {
        name: {
            role: [block[name].get(role) for block in blocks]
            for role in (*ROLES, WHOLE)
            if any(role in block[name] for block in blocks)
        }
        for name in names
    }
