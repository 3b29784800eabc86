"""The masks of a model that was pruned elsewhere: its zeros."""

import sys
from collections import Counter

from dass.errors import DassError
from dass.pruning.blocks import Block, kept_of_parameters
from dass.training.masked import Keep

PRUNED = 0.25
"""A projection with at least this share of zeros is taken for a pruned one.

Below the usual ratios, and above the exact zeros of dense weights that were stored in 4 or 5 bits: 5 % of them, and
20 % of one matrix of Qwen2.5-Coder 0.5B.
"""


def kept_weights(blocks: list[Block]) -> Keep:
    """The masks of a model that is pruned already: the zeros of each projection that has enough of them stay zeros.

    Each projection is judged by itself, so that what was left dense (attention, most often) is trained as a whole; a
    note tells how many were taken for pruned ones, by role.

    Raises:
        DassError: there is no pruned matrix.
    """
    projections = [p for block in blocks for p in block.projections]
    taken = [p for p in projections if (p.weight == 0).float().mean() >= PRUNED]
    if not taken:
        raise DassError(
            f"No matrix of the model is pruned (none has {PRUNED:.0%} of zeros): give `masks=DIR`, which a milder "
            f"ratio needs, or the folder of a pruned model.",
            "masks",
        )
    roles = ", ".join(f"{count} {role}" for role, count in Counter(p.role for p in taken).items())
    print(f"note: {len(taken)} of {len(projections)} matrices are pruned by their zeros: {roles}", file=sys.stderr)
    return kept_of_parameters((p, p.weight != 0) for p in taken)
