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
    """Seconds of each piece of work, and its peak memory on a GPU, each run several times.

    Of work in parts (see `timed_parts`) the fastest of each part counts, and of the memory the least. On the CPU all go
    on part by part in turn, so that a slow spell of the machine meets each of them; on a GPU, which has room for one
    model and tells its memory, one goes behind the other.

    Args:
        prepare: makes what is needed for the work of a name, and returns the work that is timed.
    """
    names = list(names)
    best: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[float]] = {}
    for turn in ([[name] for name in names] if device.type == "cuda" else [names]) * repeats:
        works, stages = [prepare(name) for name in turn], Stages(device)
        with stages.measure("turn"):
            timed = zip(*zip(*(timed_parts(work, device) for work in works), strict=True), strict=True)
        run = stages.as_dict()["turn"]
        for name, seconds in zip(turn, timed, strict=True):
            parts[name] = [min(pair) for pair in zip(parts.get(name, seconds), seconds, strict=True)]
            best[name] = min(best.get(name, run), run, key=lambda stage: stage["peak_gpu_memory_gb"] or 0)
            print(
                f"{name}: {sum(seconds):.3f} s, the fastest parts {sum(parts[name]):.3f} s", file=sys.stderr, flush=True
            )
    return {
        name: {"seconds": sum(parts[name]), "peak_gpu_memory_gb": one["peak_gpu_memory_gb"]}
        for name, one in best.items()
    }


def timed_parts(work: Callable[[], object], device: torch.device) -> Iterator[float]:
    """Do a generator's work part by part, as it yields between them, or other work as a whole; the seconds of each."""
    started = time.perf_counter()
    pieces = work()
    for _ in chain(pieces if isinstance(pieces, Iterator) else (), [None]):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter() - started
        started = time.perf_counter()
