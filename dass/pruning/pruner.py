"""How a method prunes one block: order, masks, then updates, for the projections of one input together."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dass.errors import Answers, DassError, finite, require_all, require_finite
from dass.pruning.blocks import ATTENTION_ROLES, MLP_ROLES, Block, Projection
from dass.pruning.criteria import CRITERIA
from dass.pruning.masks import Mask, keep_most_important, require_divisible, select_mask
from dass.pruning.method import Method
from dass.pruning.mlp import reconstructed
from dass.pruning.outputs import Outputs
from dass.pruning.products import extent_of
from dass.pruning.reordering import put_in_order
from dass.pruning.statistics import Statistics, Streams
from dass.pruning.update import UPDATES, Choose, Rows, require_obeyed, require_pairs

Needs = dict[str, bool]
"""What a method must see in a block, by what is read (`Projection.reads`): whether with its Hessian."""


@dataclass(frozen=True)
class Pruned:
    """What happened to one projection."""

    projection: Projection
    mask: Mask
    damping: float | None = None
    """The share of the mean diagonal that the Hessian needed; None where no Hessian was used."""
    damping_attempts: int | None = None
    chosen: str | None = None
    """Which of several candidates pruned it, see `AdaptivePruner`."""
    mlp_error: tuple[float, float] | None = None
    """Of the MLPs of its block before and after they were trained, see `Reference.error`; None where they were not."""


@dataclass(frozen=True)
class BlockPruner:
    """A method with the choice of projections: what is done to each block."""

    method: Method
    targets: Literal["mlp", "all"] = "mlp"
    exclude: str | None = None
    """A regular expression; projections whose full name it matches somewhere stay dense."""
    stored: torch.dtype | None = None
    """What the weights will be rounded to, where it is another dtype than the model's."""

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

    def storing(self, dtype: torch.dtype) -> "BlockPruner":
        """The same, whose weights will be rounded to `dtype`."""
        return replace(self, stored=dtype)

    def masking(self) -> "BlockPruner":
        """The same without its update."""
        known = CRITERIA.find(self.method.criterion).parameters()
        own = {name: value for name, value in self.method.parameters.items() if name in known}
        return replace(self, method=replace(self.method, update="none", parameters=own))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that may be pruned."""
        return MLP_ROLES if self.targets == "mlp" else MLP_ROLES + ATTENTION_ROLES

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that are pruned."""
        chosen = [p for p in block.projections if p.role in self.roles]
        return [p for p in chosen if not (self.exclude and re.search(self.exclude, p.name))]

    def check(self, blocks: list[Block]) -> None:
        """Refuse a pattern that does not fit a layer, before anything heavy is done.

        Raises:
            DassError: M does not divide a width, or there is nothing to prune.
        """
        for block in blocks:
            if self.targets == "all" and not block.attention:
                raise DassError(
                    f"targets=all: the attention of {block.name} is not made of q, k, v (or one qkv) and o: use mlp.",
                    field="targets",
                )
        names = [p.name for block in blocks for p in block.projections if p.role in self.roles]
        if self.exclude and not any(re.search(self.exclude, name) for name in names):
            raise DassError(
                f"exclude={self.exclude} matches none of {names[0]} to {names[-1]}: correct or remove it.", "exclude"
            )
        projections = [p for block in blocks for p in self.projections(block)]
        if not projections:
            raise DassError(f"exclude={self.exclude} leaves nothing to prune: narrow it.", field="exclude")
        for p in projections:
            require_divisible(p.weight, self.method.pattern, self.method.axis_for(p.role), p.name)

    def needs(self, block: Block) -> Needs:
        """What must be seen in this block."""
        found: Needs = {}
        roles = {p.role for p in self.projections(block)}
        looks_inside = self.method.order == "matched" and "o" in roles and bool({"v", "qkv"} & roles)
        for p in self.projections(block):
            needs = self.method.needs_for(p.role)
            if own := needs - {"intermediate_norm"}:
                found[p.reads] = found.get(p.reads, False) or "hessian" in own
            unit = block.unit_of(p)
            if "intermediate_norm" in needs and unit is not None:
                found.setdefault(unit.intermediate, False)
            if looks_inside and p.role in ("qkv", "o"):  # by what they read heads are told, and sorted
                found.setdefault(p.reads, False)
        return found

    @torch.no_grad()
    def prune(self, block: Block, streams: Streams, outputs: Outputs | None = None) -> list[Pruned]:
        """Choose the masks of a block and set its weights, those of one input together.

        Only updates of whole MLPs look at the outputs of the block.
        The host waits for the device before a weight is changed and at the end, once more for each Hessian, and where
        an order is looked for.

        Raises:
            DassError: scores or new weights that are not finite, or a Hessian that cannot be factorised; names the
                layer.
        """
        if UPDATES.find(self.method.update).whole:
            return reconstructed(self.method, self.stored, block, streams, outputs, self.masking().prune)
        by_input: dict[str, list[Projection]] = {}
        for p in self.projections(block):
            by_input.setdefault(p.reads, []).append(p)
        scores = partial(self.scores, block, streams=streams)
        orders = put_in_order(block, self.method, self.projections(block), streams, scores)
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
        return [replace(one, mask=replace(one.mask, order=orders.get(one.projection.name))) for one in pruned]

    @torch.no_grad()
    def scores(self, block: Block, p: Projection, streams: Streams) -> Tensor:
        """The importance of each weight of a projection by its criterion, as the weights are, of their shape."""
        answers: Answers = []
        statistics = self._statistics(block, [p], streams, answers)
        found = self._importance(_accumulable(p.weight), self._own(p, statistics), p.role)
        require_finite(found, f"The importance scores of {p.name}", answers)
        require_all(answers)
        return found

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
            weight, largest = _accumulable(p.weight), torch.finfo(self.stored or p.weight.dtype).max
            rows.append(Rows(p.name, weight, largest, method.pattern, method.axis_for(p.role), mask, choose))
        needs = {name for p in group for name in update.needs_for(p.role)}
        result = update.function(rows, statistics.only(needs), **method.parameters_of(update))
        require_pairs(update, result, rows)
        inverse = next(iter(statistics.inverses.values()), None)
        damping = (inverse.damping, inverse.attempts) if inverse else (None, None)
        for p, (weight, mask) in zip(group, result, strict=True):
            if method.update != "none":
                require_obeyed(method.update, p.name, p.weight, weight, mask, answers)
            if extent_of(weight) != extent_of(p.weight):  # else it was changed in place
                p.weight.copy_(weight)
            require_finite(weight, f"The updated weights of {p.name}", answers)
            if method.update != "none":
                stored = self.stored or p.weight.dtype
                answers.append((partial(_too_large, p, stored), finite(weight.to(stored))))
        return [Pruned(p, mask, *damping) for p, (_, mask) in zip(group, result, strict=True)]

    def _statistics(self, block: Block, group: list[Projection], streams: Streams, answers: Answers) -> Statistics:
        """What the group's method may ask for."""
        names = " and ".join(p.name for p in group)
        stream, unit = streams.get(group[0].reads), block.unit_of(group[0])
        hidden = streams.get(unit.intermediate) if unit else None
        needs = {name for p in group for name in self.method.needs_for(p.role)}
        statistics = Statistics(
            input_norm=stream.norm() if stream else None,
            intermediate_norm=hidden.norm() if hidden else None,
            # the stream may hold a Hessian for another method's sake
            hessian=stream.hessian if stream and "hessian" in needs else None,  # type: ignore[arg-type]
            name=names,
        )
        for name, seen in (("input_norm", stream), ("intermediate_norm", hidden)):
            if seen:
                what = f"The calibration statistics of {names} ({name})"
                require_finite(getattr(statistics, name), what, answers, seen.since)
        return statistics

    def _own(self, p: Projection, statistics: Statistics) -> Statistics:
        """The part that the criterion of a projection has declared."""
        return statistics.only(self.method.criterion_for(p.role).needs_for(p.role))

    def _importance(self, weight: Tensor, statistics: Statistics, role: str) -> Tensor:
        entry = self.method.criterion_for(role)
        parameters = self.method.parameters_of(entry) if self.method._owner(role) else {}
        version = weight._version
        scores: Any = entry.function(weight, role, statistics, **parameters)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            given = f"scores {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"{type(scores).__name__}"
            raise DassError(
                f"The criterion {self.method.criterion} gives {given} for a weight {tuple(weight.shape)}: it must "
                f"return one score for each weight."
            )
        if weight._version != version:
            raise DassError(
                f"The criterion {self.method.criterion} changes the weights that it scores: compute in new tensors "
                f"(abs, not abs_)."
            )
        return scores


def _choice(method: Method, score: Callable[..., Tensor], statistics: Statistics, role: str) -> Choose:
    """Which of some columns' weights to keep, as they stand while an update sweeps over them."""

    def choose(columns: slice, weight: Tensor) -> Tensor:
        scores = score(weight, statistics=statistics.columns(columns))
        return keep_most_important(scores, method.pattern, method.axis_for(role))

    return choose


def _too_large(p: Projection, stored: torch.dtype) -> DassError:
    largest, dtype = torch.finfo(stored).max, str(stored).removeprefix("torch.")
    return DassError(
        f"The updated weights of {p.name} exceed {largest:g}, the largest that {dtype} holds: compute with "
        f"model.dtype=bfloat16, or let the update obs clip them with method.clip=true.",
        field="model.dtype",
    )


def _accumulable(weight: Tensor) -> Tensor:
    """A weight in fp32, or fp64 where it is fp64."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
