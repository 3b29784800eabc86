"""What 2:4 gains on a GPU: dense products against torch's semi-structured ones, on the MLPs of real models.

python -m benchmarks.speed        writes results/benchmark_speed.md and, with a GPU, its figure

Each product is compared with the dense one before it is timed, and a mask that a kernel would break is refused: its
cells stay empty, with the reason below the table. Without a GPU the table says that nothing was measured, unless it
holds what another machine measured.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils.benchmark import Timer

from dass.audit import KERNELS
from dass.errors import DassError, first_line
from dass.kernels import require_executable, semi_structured
from dass.models import resolve_device
from dass.pruning.masks import NM, Axis, select_mask
from dass.records import git_state, machine_description, package_versions, write_atomically
from report.figures import draw, write_figure
from report.grid import MISSING, Grid, as_markdown, to_markdown

SHAPES = {"LLaMA2-7B": (4096, 11008), "LLaMA2-70B": (8192, 28672), "Mistral 7B": (4096, 14336)}
SHAPES |= {"Gemma 7B": (3072, 24576)}
"""Width d and intermediate width f."""
TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Decoding multiplies a token of each sequence of a batch, prefill all tokens of a prompt."""
PRODUCTS = ("gate, up", "down", "MLP", "backward")
DENSE = "dense"
CLOSE = 1e-2  # relative, of a product summed in another order in 16 bits
SECONDS = 0.5  # that each timing takes at least
NOT_MEASURED = "not measured"
NO_GPU = f"no GPU: {NOT_MEASURED}"
LEGEND = (
    "Microseconds: median ± half the interquartile range; in brackets the speed-up over dense. gate, up and down: one "
    "product each, 2:4 along the inputs; MLP: all three with the activation; backward: dX = dY W of a gate or up that "
    "DaSS pruned, 2:4 along the outputs, whose forward product no kernel executes. 1 to 64 tokens: decoding; more: "
    f"prefill. {MISSING}: the kernel has failed."
)

Work = Callable[[Tensor], Tensor]
Build = Callable[[str], Work]
"""From the name of an engine, `dense` or one of `KERNELS`, to what it computes."""


@dataclass(frozen=True)
class Timing:
    """One piece of work by one engine; microseconds."""

    model: str
    product: str
    tokens: int
    engine: str
    median: float
    spread: float
    fault: str = ""
    """Why it has no times, which are NaN then."""


def layer(weight: Tensor, engine: str) -> Work:
    """y = x W^T by an engine; on the CPU, which lacks the product, through its packer and back.

    Raises:
        DassError: the kernel would break the mask, or takes no such shape and dtype.
    """
    if engine == DENSE:
        return partial(linear, weight=weight)
    if weight.is_cuda:
        return partial(linear, weight=semi_structured(weight, engine))
    require_executable(weight, kernel=engine)
    packed = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return partial(linear, weight=sparse_semi_structured_to_dense_cutlass(*packed))


def products(d: int, f: int, device: torch.device) -> dict[str, tuple[int, Build]]:
    """By its name each piece of work: the width of what it reads, and how it is built. Weights are bf16."""
    gate, up = (pruned((f, d), "in", device) for _ in range(2))
    down, of_dass = pruned((d, f), "in", device), pruned((f, d), "out", device)

    def mlp(engine: str) -> Work:
        of_gate, of_up, of_down = (layer(weight, engine) for weight in (gate, up, down))
        return lambda x: of_down(silu(of_gate(x)) * of_up(x))

    return {
        "gate, up": (d, partial(layer, gate)),
        "down": (f, partial(layer, down)),
        "MLP": (d, mlp),
        "backward": (f, partial(layer, of_dass.T.contiguous())),  # dX = dY W = dY (W^T)^T
    }


def pruned(shape: tuple[int, int], axis: Axis, device: torch.device) -> Tensor:
    """A random matrix in bf16 that is 2:4 along an axis, of outputs about as large as its inputs."""
    weight = torch.randn(shape, device=device) * math.sqrt(2 / shape[1])
    return weight.masked_fill(~select_mask(weight.abs(), NM(2, 4), axis).keep, 0).bfloat16()


def verified(build: Build, engine: str, x: Tensor) -> Work:
    """The work by an engine; DassError where it gives another result than the dense one."""
    work, expected = build(engine), build(DENSE)(x).float()
    error = ((work(x).float() - expected).norm() / expected.norm()).item()
    if not error <= CLOSE:
        raise DassError(f"The product by {engine} differs from the dense one by {error:.2%}: do not use this kernel.")
    return work


@torch.no_grad()
def measure(
    shapes: dict[str, tuple[int, int]], tokens: tuple[int, ...], device: torch.device, seconds: float = SECONDS
) -> list[Timing]:
    """Time all products of all shapes by all engines that the device has."""
    engines, found = [DENSE, *(KERNELS if device.type == "cuda" else ["CUTLASS"])], []
    for model, (d, f) in shapes.items():
        for product, (width, build) in products(d, f, device).items():
            for count in tokens:
                x = torch.randn(count, width, device=device).bfloat16()
                for engine in engines:
                    median, spread, fault = math.nan, math.nan, ""
                    try:
                        work = verified(build, engine, x)
                        timer = Timer("work(x)", globals={"work": work, "x": x})
                        taken = timer.blocked_autorange(min_run_time=seconds)
                        median, spread = 1e6 * taken.median, 1e6 * taken.iqr / 2
                    except (RuntimeError, DassError) as error:  # a kernel does not run on this GPU, or is wrong
                        fault = first_line(error)
                        print(f"note: {engine} fails on {product} of {model} with {count} tokens: {fault}", flush=True)
                    found.append(Timing(model, product, count, engine, median, spread, fault))
    return found


def grid(timings: list[Timing], facts: dict[str, str]) -> Grid:
    """The table; without timings each cell says that nothing was measured."""
    measured = {(one.model, one.product, one.tokens, one.engine): one for one in timings}
    rows = []
    for model, product, engine in dict.fromkeys((one.model, one.product, one.engine) for one in timings) or [
        (model, product, engine) for model in SHAPES for product in PRODUCTS for engine in (DENSE, *KERNELS)
    ]:
        row = {"Model": model, "Product": product, "Engine": engine}
        for count in sorted({one.tokens for one in timings}) or TOKENS:
            own, dense = (measured.get((model, product, count, name)) for name in (engine, DENSE))
            row[f"{count} tokens"] = NOT_MEASURED if own is None or dense is None else cell(own, dense)
        rows.append(row)
    faults = Counter(f"{one.engine}: {one.fault}" for one in timings if one.fault)
    notes = "\n".join(f"- {as_markdown(fault)} ({count} of the cells)" for fault, count in faults.items())
    legend = f"{LEGEND}\n\n{notes}" if notes else LEGEND
    return Grid("Speed of 2:4 on the MLPs of real models, bf16", pd.DataFrame(rows), facts, legend, words=3)


def cell(own: Timing, dense: Timing) -> str:
    """A timing, with its speed-up over the dense one."""
    if math.isnan(own.median):
        return MISSING
    return f"{own.median:.1f} ± {own.spread:.1f}" + ("" if own is dense else f" ({dense.median / own.median:.2f}x)")


def figure(timings: list[Timing]) -> Figure:
    """Speed-up over dense by the number of tokens, a panel for each product and model."""
    frame = pd.DataFrame([asdict(one) for one in timings])
    keys = ["model", "product", "tokens"]
    dense = frame[frame.engine == DENSE].set_index(keys)["median"].rename("dense")
    points = frame[frame.engine != DENSE].join(dense, on=keys)
    gain, panel = points.dense / points["median"], points.model + ", " + points["product"]
    points = points.assign(y=gain, error=gain * points.spread / points["median"], x=points.tokens.map(math.log2))
    points = points.assign(panel=panel, ylabel="speed-up", label=points.engine, method=points.engine)
    points = points.assign(rank=0, source=None, is_open=False)
    return draw(points, "tokens, as a power of 2", "2:4 by torch's kernels, over dense")


def main(output: Path = Path("results"), device: str = "auto") -> None:
    """Measure where there is a GPU; write the table, and the figure of what was measured."""
    where, path = resolve_device(device), output / "benchmark_speed.md"
    if where.type != "cuda" and path.is_file() and NO_GPU not in path.read_text(encoding="utf-8"):
        print(f"There is no GPU to measure on, and {path} holds measurements: it stays as it is.")
        return
    machine = machine_description(where)
    timings = measure(SHAPES, TOKENS, where) if where.type == "cuda" else []
    facts = {"machine": machine["gpu"] or NO_GPU, "torch": package_versions()["torch"]}
    facts |= {"commit": str(git_state()["commit"]), "command": "make benchmark-speed"}
    text = to_markdown([grid(timings, facts)])
    write_atomically(path, text)
    if timings:
        write_figure(partial(figure, timings), output / "figures", "benchmark_speed")
    print(text)


if __name__ == "__main__":
    main()
