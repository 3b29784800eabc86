"""How many calibration tokens an expert can expect, and what those that see too few cost."""

from dataclasses import dataclass

from dass.planning.architecture import Architecture
from dass.planning.costs import Workload
from dass.pruning.observe import EXPERT_TOKENS
from dass.pruning.pruner import BlockPruner


@dataclass(frozen=True)
class ExpertTokens:
    """What one method needs of each expert of a model, see `dass.pruning.observe.require_enough_tokens`."""

    expected: float
    """Calibration tokens of an expert, were the router even."""
    needed: int
    """Fewer, and it is judged by all tokens of its block instead."""
    fallback_flops: float
    """Operations of running all tokens through one expert, as each such expert is."""

    @property
    def share(self) -> float:
        """An expert falls back whose router sends it less than this share of what an even one would."""
        return self.needed / self.expected

    def enough(self, work: Workload, share: float) -> int:
        """Calibration tokens with which an expert that gets this share of an even one's tokens has enough."""
        return round(work.tokens * self.share / share)


def expert_tokens(
    model: Architecture, pruner: BlockPruner, work: Workload, least: int | None = None
) -> ExpertTokens | None:
    """Of the experts that need the most; None where the model has none, or the method looks at no token.

    Args:
        least: tokens that an expert needs; None: see `EXPERT_TOKENS`.
    """
    found = None
    for b in model.blocks:
        needs = pruner.needs(b.block)
        for unit in (unit for unit in b.block.units if unit.routed):
            inputs = {p.reads: b.inputs[p.reads] for p in unit.projections.values()}
            seen = [(needs[reads], one.features) for reads, one in inputs.items() if reads in needs]
            wanted = [least or (features if with_hessian else EXPERT_TOKENS) for with_hessian, features in seen]
            one = next(iter(inputs.values()))
            if wanted and (found is None or max(wanted) > found.needed):
                weights = sum(p.weight.numel() for p in unit.projections.values())
                found = ExpertTokens(work.tokens * one.runs / one.copies, max(wanted), 2.0 * work.tokens * weights)
    return found
