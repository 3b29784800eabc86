"""A pruning method as four values, criterion x group axis x pattern x update, and how it prunes one block."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dass.errors import DassError, require_finite
from dass.pruning.blocks import INPUT_OF_ROLE, MLP_ROLES, Block, Projection
from dass.pruning.criteria import Criterion, find_criterion
from dass.pruning.masks import AXES, NM, Axis, Mask, Pattern, keep_most_important, select_mask
from dass.pruning.statistics import DampedInverse, InputStream, Statistics, damped_inverse
from dass.pruning.update import obs_sweep

Streams = dict[str, InputStream]
"""The statistics of a block's inputs, by the names in `INPUT_OF_ROLE`."""


@dataclass(frozen=True)
class Method:
    """One point in the space of one-shot pruning methods."""

    criterion: str
    """A name in `CRITERIA`. `obs` with the update `obs` chooses from the already updated weights, as SparseGPT does."""
    axis: Mapping[str, Axis]
    """The group axis of each role; a role that is absent is pruned by Wanda's rule (wanda along `in`)."""
    pattern: Pattern
    update: Literal["none", "obs"] = "none"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """The criterion's own, such as DaSS's alpha."""
    damping: float = 0.01
    """For the OBS solver and score: the share of the Hessian's mean diagonal that is added to it."""
    block_size: int = 128
    """Columns of SparseGPT's unstructured comparison groups."""

    def __post_init__(self) -> None:
        """Refuse what means nothing, with the reason."""
        known = find_criterion(self.criterion).parameters()
        for name, value in self.parameters.items():
            if name not in known:
                raise DassError(
                    f"The criterion {self.criterion} has no parameter `{name}` (it has: {', '.join(known) or 'none'}): "
                    f"remove `method.{name}`."
                )
            if not 0 <= value < float("inf"):
                raise DassError(f"method.{name}={value} must be a finite number of at least 0.")
        for role, axis in self.axis.items():
            if role not in INPUT_OF_ROLE or axis not in AXES:
                raise DassError(
                    f"method.axis.{role}={axis} is unknown: roles are {', '.join(INPUT_OF_ROLE)}, "
                    f"axes are {', '.join(AXES)}."
                )
        if self.update not in ("none", "obs"):
            raise DassError(f"method.update={self.update} is unknown: choose none or obs.")
        if not self.damping > 0:
            raise DassError(f"method.damping={self.damping} must be above 0: it makes the Hessian invertible.")
        if self.block_size < 1:
            raise DassError(f"method.block_size={self.block_size} must be at least 1.")

    def criterion_for(self, role: str) -> Criterion:
        """The equation that scores a projection of this role."""
        return find_criterion(self.criterion if role in self.axis else "wanda")

    def axis_for(self, role: str) -> Axis:
        """The axis along which the weights of a projection of this role compete."""
        return self.axis.get(role, "in")

    def all_parameters(self) -> dict[str, float]:
        """The criterion's parameters, defaults included."""
        return find_criterion(self.criterion).parameters() | dict(self.parameters)

    def needs_for(self, role: str) -> set[str]:
        """The fields of `Statistics` that criterion and update read for a projection of this role."""
        return set(self.criterion_for(role).needs_for(role)) | ({"inverse_factor"} if self.update == "obs" else set())

    def chooses_while_sweeping(self, role: str) -> bool:
        """Whether the mask comes out of the OBS sweep itself instead of being fixed before it."""
        return self.update == "obs" and self.criterion_for(role) is find_criterion("obs")


@dataclass(frozen=True)
class Pruned:
    """What happened to one projection."""

    projection: Projection
    mask: Mask
    damping: float | None = None
    """The share of the mean diagonal that the Hessian needed; None where no Hessian was used."""
    damping_attempts: int | None = None


@dataclass(frozen=True)
class BlockPruner:
    """A method with the choice of projections: what the walk applies to each block."""

    method: Method
    targets: Literal["mlp", "all"] = "mlp"
    exclude: str | None = None
    """A regular expression; projections whose full name it matches somewhere stay dense."""

    def __post_init__(self) -> None:
        """Refuse unknown targets and broken regular expressions."""
        if self.targets not in ("mlp", "all"):
            raise DassError(f"targets={self.targets} is unknown: choose mlp or all.")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise DassError(f"exclude={self.exclude} is not a regular expression ({error}): correct it.") from error

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that are pruned."""
        if self.targets == "all" and (missing := [role for role in INPUT_OF_ROLE if role not in block.projections]):
            raise DassError(f"targets=all: {block.name} has no projection in the role {', '.join(missing)}; use mlp.")
        roles = MLP_ROLES if self.targets == "mlp" else tuple(INPUT_OF_ROLE)
        chosen = [block.projections[role] for role in roles]
        return [p for p in chosen if not (self.exclude and re.search(self.exclude, p.name))]

    def check(self, blocks: list[Block]) -> None:
        """Refuse a pattern that does not fit a layer, before anything heavy is done.

        Raises:
            DassError: M does not divide a width, or there is nothing to prune.
        """
        projections = [p for block in blocks for p in self.projections(block)]
        if not projections:
            raise DassError(f"exclude={self.exclude} leaves nothing to prune: narrow the expression.")
        for p in projections:
            width = p.linear.weight.shape[0 if self.method.axis_for(p.role) == "out" else 1]
            if isinstance(self.method.pattern, NM) and width % self.method.pattern.m:
                raise DassError(
                    f"{p.name} is {width} wide along '{self.method.axis_for(p.role)}', which M={self.method.pattern.m} "
                    f"does not divide: choose another pattern or leave the layer out with `exclude`."
                )

    def open_streams(self, block: Block) -> Streams:
        """Empty statistics for every input that the method needs to see in this block."""
        hessian_of: dict[str, bool] = {}
        for p in self.projections(block):
            needs = self.method.needs_for(p.role)
            if own := needs - {"intermediate_norm"}:
                source = INPUT_OF_ROLE[p.role]
                hessian_of[source] = hessian_of.get(source, False) or "inverse_factor" in own
            if "intermediate_norm" in needs:
                hessian_of.setdefault("intermediate", False)
        readers = {INPUT_OF_ROLE[role]: p.linear.weight for role, p in block.projections.items()}
        return {
            source: InputStream(readers[source].shape[1], readers[source].dtype, readers[source].device, with_hessian)
            for source, with_hessian in hessian_of.items()
        }

    def prune(self, block: Block, streams: Streams) -> list[Pruned]:
        """Choose the masks of a block and set its weights, those of one input together.

        Raises:
            DassError: scores or new weights that are not finite, or a Hessian that cannot be factorised; names the
                layer.
        """
        by_input: dict[str, list[Projection]] = {}
        for p in self.projections(block):
            by_input.setdefault(INPUT_OF_ROLE[p.role], []).append(p)
        return [pruned for source, group in by_input.items() for pruned in self._prune_group(source, group, streams)]

    def _prune_group(self, source: str, group: list[Projection], streams: Streams) -> list[Pruned]:
        """Prune the projections that read one input; they share its statistics and its factorisation."""
        stream = streams.get(source)
        names = " and ".join(p.name for p in group)
        for name, one in streams.items():
            require_finite(one.norm(), f"The calibration statistics of {names} ({name})")
        inverse = None
        # the stream may hold a Hessian for another method's sake
        if stream is not None and any("inverse_factor" in self.method.needs_for(p.role) for p in group):
            inverse = damped_inverse(stream.hessian(), self.method.damping, names)
        statistics = Statistics(
            input_norm=stream.norm() if stream is not None else None,
            intermediate_norm=streams["intermediate"].norm() if "intermediate" in streams else None,
            inverse_factor=inverse.factor if inverse else None,
        )
        weights = {p.name: _accumulable(p.linear.weight) for p in group}
        for name, weight in weights.items():
            require_finite(weight, f"The weights of {name}")
        masks = {
            p.name: select_mask(
                self._importance(weights[p.name], p.role, statistics),
                self.method.pattern,
                self.method.axis_for(p.role),
                p.name,
            )
            for p in group
            if not self.method.chooses_while_sweeping(p.role)
        }
        if self.method.update == "none":
            for p in group:
                p.linear.weight.masked_fill_(~masks[p.name].keep, 0)
        else:
            assert inverse is not None
            masks = self._repair(group, weights, masks, inverse)
        damping = (inverse.damping, inverse.attempts) if inverse else (None, None)
        return [Pruned(p, masks[p.name], *damping) for p in group]

    def _repair(
        self, group: list[Projection], weights: dict[str, Tensor], masks: dict[str, Mask], inverse: DampedInverse
    ) -> dict[str, Mask]:
        """One OBS sweep over the stacked rows of all projections of one input; sets the weights, returns the masks."""
        pattern, sizes = self.method.pattern, [len(weights[p.name]) for p in group]
        stacked = torch.cat([weights[p.name] for p in group])
        stacked[:, inverse.dead] = 0

        # N:M along the inputs looks at one row at a time, so all rows of the stack can be looked at together
        row_by_row = isinstance(pattern, NM) and all(
            p.name not in masks and self.method.axis_for(p.role) != "out" for p in group
        )

        def choose(columns: slice, weight: Tensor) -> Tensor:
            statistics = Statistics(inverse_factor=inverse.factor[columns, columns])
            if row_by_row:
                return keep_most_important(self._importance(weight, group[0].role, statistics), pattern, "in")
            return torch.cat(
                [
                    masks[p.name].keep[:, columns]
                    if p.name in masks
                    else keep_most_important(
                        self._importance(rows, p.role, statistics), pattern, self.method.axis_for(p.role)
                    )
                    for p, rows in zip(group, weight.split(sizes), strict=True)
                ]
            )

        choose_every = pattern.m if isinstance(pattern, NM) else self.method.block_size
        new, keep = obs_sweep(stacked, inverse.factor, choose, choose_every)
        for p, new_rows, keep_rows in zip(group, new.split(sizes), keep.split(sizes), strict=True):
            p.linear.weight.copy_(new_rows)
            require_finite(p.linear.weight, f"The updated weights of {p.name}")
            axis = self.method.axis_for(p.role)
            if isinstance(pattern, NM):
                swept = Mask(keep_rows, pattern, "in" if axis == "layer" else axis)
            else:
                swept = Mask(keep_rows, pattern, axis, column_block=choose_every)
            masks.setdefault(p.name, swept)
        return masks

    def _importance(self, weight: Tensor, role: str, statistics: Statistics) -> Tensor:
        parameters = self.method.parameters if role in self.method.axis else {}
        scores = self.method.criterion_for(role).importance(weight, role, statistics, **parameters)
        if scores.shape != weight.shape:
            raise DassError(
                f"The criterion {self.method.criterion} gives scores {tuple(scores.shape)} for a weight "
                f"{tuple(weight.shape)}: it must return one score for each weight."
            )
        return scores


def _accumulable(weight: Tensor) -> Tensor:
    """A weight in fp32, or fp64 where it is fp64."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
