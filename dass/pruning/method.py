"""A pruning method: criterion x group axis x pattern x update, and how it prunes one block."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dass.errors import Answers, DassError, finite, require_all, require_finite
from dass.pruning.blocks import ATTENTION_ROLES, MLP_ROLES, ROLES, Block, Projection
from dass.pruning.criteria import CRITERIA
from dass.pruning.masks import AXES, NM, Axis, Mask, Pattern, keep_most_important, select_mask
from dass.pruning.products import extent_of
from dass.pruning.registry import Entry, Value
from dass.pruning.statistics import Statistics, Streams
from dass.pruning.update import UPDATES, Choose, Rows

Needs = dict[str, bool]
"""What a method must see in a block, by what is read (`Projection.reads`): whether with its Hessian."""


@dataclass(frozen=True)
class Method:
    """One point in the space of one-shot pruning methods."""

    criterion: str
    """A name in `CRITERIA`. `obs` with the update `obs` chooses from the already updated weights, as SparseGPT does."""
    axis: Mapping[str, Axis]
    """The group axis of each role; a role that is absent is pruned by Wanda's rule (wanda along `in`)."""
    pattern: Pattern
    update: str = "none"
    """A name in `UPDATES`."""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    """Those of the criterion and of the update, such as DaSS's alpha; one that both have is given to both."""

    def __post_init__(self) -> None:
        """Refuse what means nothing, with the reason."""
        entries = (CRITERIA.find(self.criterion), UPDATES.find(self.update))
        known = dict.fromkeys(name for entry in entries for name in entry.parameters())
        for name, value in self.parameters.items():
            owner = next((entry for entry in entries if name in entry.parameters()), None)
            if owner is None:
                raise DassError(
                    f"The criterion {self.criterion} with the update {self.update} has no parameter `{name}` (it has: "
                    f"{', '.join(known) or 'none'}): remove it.",
                    field=f"method.{name}",
                )
            owner.checked(name, value)
        for role, axis in self.axis.items():
            if role not in ROLES or axis not in AXES:
                raise DassError(
                    f"The axis {role}={axis} is unknown: roles are {', '.join(ROLES)}, axes are {', '.join(AXES)}.",
                    field=f"method.axis.{role}",
                )

    def _owner(self, role: str) -> str | None:
        """The role whose axis this one has: a fused qkv is pruned as q."""
        return next((r for r in (role, "q" if role == "qkv" else role) if r in self.axis), None)

    def criterion_for(self, role: str) -> Entry:
        """The equation that scores a projection of this role."""
        return CRITERIA.find(self.criterion if self._owner(role) else "wanda")

    def axis_for(self, role: str) -> Axis:
        """The axis along which the weights of a projection of this role compete."""
        owner = self._owner(role)
        return self.axis[owner] if owner else "in"

    def all_parameters(self) -> dict[str, Value]:
        """The parameters of criterion and update, defaults included."""
        defaults = CRITERIA.find(self.criterion).parameters() | UPDATES.find(self.update).parameters()
        return defaults | dict(self.parameters)

    def parameters_of(self, entry: Entry) -> dict[str, Value]:
        """The parameters that one of them is called with."""
        return {n: entry.checked(n, v) for n, v in self.all_parameters().items() if n in entry.parameters()}

    def needs_for(self, role: str) -> set[str]:
        """The fields of `Statistics` that criterion and update read for a projection of this role."""
        return self.criterion_for(role).needs_for(role) | UPDATES.find(self.update).needs_for(role)

    def chooses_while_sweeping(self, role: str) -> bool:
        """Whether the mask comes out of the OBS sweep itself instead of being fixed before it."""
        return self.update == "obs" and self.criterion_for(role) is CRITERIA.find("obs")


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
    """A method with the choice of projections: what is done to each block."""

    method: Method
    targets: Literal["mlp", "all"] = "mlp"
    exclude: str | None = None
    """A regular expression; projections whose full name it matches somewhere stay dense."""

    def __post_init__(self) -> None:
        """Refuse unknown targets and broken regular expressions."""
        if self.targets not in ("mlp", "all"):
            raise DassError(f"targets={self.targets} is unknown: choose mlp or all.", field="targets")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise DassError(
                f"exclude={self.exclude} is not a regular expression ({error}): correct it.", field="exclude"
            ) from error

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that may be pruned."""
        return MLP_ROLES if self.targets == "mlp" else MLP_ROLES + ATTENTION_ROLES

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that are pruned."""
        if self.targets == "all" and not block.attention:
            raise DassError(
                f"targets=all: the attention of {block.name} is not made of q, k, v (or one qkv) and o: use mlp.",
                field="targets",
            )
        chosen = [p for p in block.projections if p.role in self.roles]
        return [p for p in chosen if not (self.exclude and re.search(self.exclude, p.name))]

    def check(self, blocks: list[Block]) -> None:
        """Refuse a pattern that does not fit a layer, before anything heavy is done.

        Raises:
            DassError: M does not divide a width, or there is nothing to prune.
        """
        projections = [p for block in blocks for p in self.projections(block)]
        if not projections:
            raise DassError(f"exclude={self.exclude} leaves nothing to prune: narrow it.", field="exclude")
        for p in projections:
            width = p.weight.shape[0 if self.method.axis_for(p.role) == "out" else 1]
            if isinstance(self.method.pattern, NM) and width % self.method.pattern.m:
                raise DassError(
                    f"{p.name} is {width} wide along '{self.method.axis_for(p.role)}', which M={self.method.pattern.m} "
                    f"does not divide: choose another pattern or leave the layer out with `exclude`.",
                    field="sparsity",
                )

    def needs(self, block: Block) -> Needs:
        """What must be seen in this block."""
        found: Needs = {}
        for p in self.projections(block):
            needs = self.method.needs_for(p.role)
            if own := needs - {"intermediate_norm"}:
                found[p.reads] = found.get(p.reads, False) or "hessian" in own
            unit = block.unit_of(p)
            if "intermediate_norm" in needs and unit is not None:
                found.setdefault(unit.intermediate, False)
        return found

    @torch.no_grad()
    def prune(self, block: Block, streams: Streams) -> list[Pruned]:
        """Choose the masks of a block and set its weights, those of one input together.

        The host waits for the device before a weight is changed and at the end, and once more for each Hessian.

        Raises:
            DassError: scores or new weights that are not finite, or a Hessian that cannot be factorised; names the
                layer.
        """
        by_input: dict[str, list[Projection]] = {}
        for p in self.projections(block):
            by_input.setdefault(p.reads, []).append(p)
        before: Answers = []
        after: Answers = []
        chosen = []
        for group in by_input.values():
            statistics = self._statistics(block, group, streams, before)
            chosen.append((group, statistics, [self._mask(p, statistics, before) for p in group]))
        require_all(before)
        pruned: list[Pruned] = []
        while chosen:  # a factor of a Hessian goes with its group
            pruned += self._update(*chosen.pop(0), after)
        require_all(after)
        return pruned

    def _mask(self, p: Projection, statistics: Statistics, answers: Answers) -> Mask | None:
        """Which weights of a projection are kept; None where the update is to choose."""
        method, weight = self.method, _accumulable(p.weight)
        require_finite(weight, f"The weights of {p.name}", answers)
        if method.chooses_while_sweeping(p.role):
            return None
        scores = self._importance(weight, self._own(p, statistics), p.role)
        return select_mask(scores, method.pattern, method.axis_for(p.role), p.name, answers)

    def _update(
        self, group: list[Projection], statistics: Statistics, masks: list[Mask | None], answers: Answers
    ) -> list[Pruned]:
        """Set the weights of the projections that read one input; they share its statistics and its factorisation."""
        method, update = self.method, UPDATES.find(self.method.update)
        rows = []
        for p, mask in zip(group, masks, strict=True):
            choose = _choice(method, partial(self._importance, role=p.role), self._own(p, statistics), p.role)
            weight, largest = _accumulable(p.weight), torch.finfo(p.weight.dtype).max
            rows.append(Rows(p.name, weight, largest, method.pattern, method.axis_for(p.role), mask, choose))
        needs = {name for p in group for name in update.needs_for(p.role)}
        result = update.function(rows, statistics.only(needs), **method.parameters_of(update))
        inverse = next(iter(statistics.inverses.values()), None)
        damping = (inverse.damping, inverse.attempts) if inverse else (None, None)
        for p, (weight, _) in zip(group, result, strict=True):
            if extent_of(weight) != extent_of(p.weight):  # else it was changed in place
                p.weight.copy_(weight)
            require_finite(weight, f"The updated weights of {p.name}", answers)
            if weight.dtype != p.weight.dtype:
                answers.append((_too_large(p), finite(p.weight)))
        return [Pruned(p, mask, *damping) for p, (_, mask) in zip(group, result, strict=True)]

    def _statistics(self, block: Block, group: list[Projection], streams: Streams, answers: Answers) -> Statistics:
        """What the group's method may ask for."""
        names = " and ".join(p.name for p in group)
        stream, unit = streams.get(group[0].reads), block.unit_of(group[0])
        seen = unit is not None and unit.intermediate in streams
        needs = {name for p in group for name in self.method.needs_for(p.role)}
        statistics = Statistics(
            input_norm=stream.norm() if stream else None,
            intermediate_norm=streams[unit.intermediate].norm() if unit and seen else None,
            # the stream may hold a Hessian for another method's sake
            hessian=stream.hessian if stream and "hessian" in needs else None,  # type: ignore[arg-type]
            name=names,
        )
        for name in ("input_norm", "intermediate_norm"):
            if statistics.has(name):
                require_finite(getattr(statistics, name), f"The calibration statistics of {names} ({name})", answers)
        return statistics

    def _own(self, p: Projection, statistics: Statistics) -> Statistics:
        """The part that the criterion of a projection has declared."""
        return statistics.only(self.method.criterion_for(p.role).needs_for(p.role))

    def _importance(self, weight: Tensor, statistics: Statistics, role: str) -> Tensor:
        entry = self.method.criterion_for(role)
        parameters = self.method.parameters_of(entry) if self.method._owner(role) else {}
        scores = entry.function(weight, role, statistics, **parameters)
        if scores.shape != weight.shape:
            raise DassError(
                f"The criterion {self.method.criterion} gives scores {tuple(scores.shape)} for a weight "
                f"{tuple(weight.shape)}: it must return one score for each weight."
            )
        return scores


def _choice(method: Method, score: Callable[..., Tensor], statistics: Statistics, role: str) -> Choose:
    """Which of some columns' weights to keep, as they stand while an update sweeps over them."""

    def choose(columns: slice, weight: Tensor) -> Tensor:
        scores = score(weight, statistics=statistics.columns(columns))
        return keep_most_important(scores, method.pattern, method.axis_for(role))

    return choose


def _too_large(p: Projection) -> DassError:
    largest, dtype = torch.finfo(p.weight.dtype).max, str(p.weight.dtype).removeprefix("torch.")
    return DassError(
        f"The updated weights of {p.name} exceed {largest:g}, the largest that {dtype} holds: compute with "
        f"model.dtype=bfloat16, or let the update obs clip them with method.clip=true.",
        field="model.dtype",
    )


def _accumulable(weight: Tensor) -> Tensor:
    """A weight in fp32, or fp64 where it is fp64."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
