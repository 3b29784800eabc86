"""The rows of a benchmark: what was measured, its limit, and whether that is met; and timings in turn."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from dass.stages import Stages

REPEATS = 3  # of each timing, interleaved; the fastest counts, since other programs only ever slow one down
CPU = torch.device("cpu")
Bound = Literal["at least", "at most"]


def row(quantity: str, measured: float, bound: Bound, limit: float, detail: str) -> str:
    """A row of the Markdown table."""
    met = measured >= limit if bound == "at least" else measured <= limit
    return f"| {quantity} | {measured:.4g} | {bound} {limit:g} | {'yes' if met else '**no**'} | {detail} |"


def ratio(quantity: str, over: float, under: float, bound: Bound, limit: float, detail: str) -> str:
    """The row of the quotient of two timings, with both in its detail."""
    return row(quantity, over / under, bound, limit, f"{over:.3g} s / {under:.3g} s; {detail}")


def fastest(
    names: Iterable[str], prepare: Callable[[str], Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> dict[str, dict[str, Any]]:
    """The fastest of several runs of each piece of work, see `Stages`; interleaved: a slow spell hits all alike.

    Args:
        prepare: makes what is needed for the work of a name, and returns the work that is timed.
    """
    best: dict[str, dict[str, Any]] = {}
    for name in list(names) * repeats:
        work, stages = prepare(name), Stages(device)
        with stages.measure(name):
            work()
        run = stages.as_dict()[name]
        best[name] = min(best.get(name, run), run, key=lambda stage: stage["seconds"])
        print(f"{name}: {best[name]['seconds']:.3f} s", file=sys.stderr, flush=True)
    return best
