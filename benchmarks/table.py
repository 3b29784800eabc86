"""The rows of a benchmark: what was measured, its limit, and whether that is met; and timings in turn."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal

import torch

from dass.stages import Stages

REPEATS = 3  # of each timing; the fastest counts, since other programs only ever slow one down
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
    """Seconds and peak memory of each piece of work, see `Stages`, each run several times; interleaved.

    Of work in parts (see `part_seconds`) the fastest of each part counts, and of the memory the least: a slow spell of
    the machine is shorter than a walk, and seldom meets the same block twice.

    Args:
        prepare: makes what is needed for the work of a name, and returns the work that is timed.
    """
    best: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[float]] = {}
    for name in list(names) * repeats:
        work, stages = prepare(name), Stages(device)
        with stages.measure(name):
            seconds = part_seconds(work, device)
        parts[name] = [min(pair) for pair in zip(parts.get(name, seconds), seconds, strict=True)]
        run = stages.as_dict()[name]
        best[name] = min(best.get(name, run), run, key=lambda stage: stage["peak_memory_gb"])
        print(f"{name}: {sum(seconds):.3f} s, the fastest parts {sum(parts[name]):.3f} s", file=sys.stderr, flush=True)
    return {name: stage | {"seconds": sum(parts[name])} for name, stage in best.items()}


def part_seconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each part of a generator's work, which yields between them; of other work those of the whole."""
    started, found = time.perf_counter(), []
    pieces = work()
    for _ in chain(pieces if isinstance(pieces, Iterator) else (), [None]):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
        started = time.perf_counter()
    return found
