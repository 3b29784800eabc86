"""How the streamed walk grows with the width, the depth and the tokens, beside the plan's formulae.

python -m benchmarks.scaling                    measures all, and writes results/benchmark_scaling.md, .csv and a figure
python -m benchmarks.scaling WIDTH DEPTH TOKENS METHOD FOLDER     one measurement, as a line of JSON

Models are random, of LLaMA2-7B's proportions, in bf16 on disk and fp32 in memory; each measurement is a process of its
own on one thread. Time is what the processor spent on it, which other programs on the machine hardly change.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.walk import METHODS
from dass.planning.architecture import read_architecture
from dass.planning.costs import Workload, plan_pruning
from dass.progress import progress
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import walk
from dass.records import git_state, machine_description, write_atomically
from dass.saving import rounding
from dass.streaming import load_streamed
from report.figures import METHOD_STYLE, PANEL_HEIGHT, POINT, write_figure
from report.grid import Grid, to_markdown

AXES = {"width": (512, 1024, 2048, 4096), "depth": (2, 4, 8, 16), "tokens": (256, 512, 1024, 2048, 4096)}
MIDDLE = {"width": 1024, "depth": 4, "tokens": 1024}  # where two axes stand while the third varies
SEQ_LEN, VOCABULARY, HEAD = 128, 512, 128
TERMS = ("calibration walk", "statistics", "factorisation", "OBS sweep")
OUT = Path("results")
LEGEND = (
    "Exponent: slope of log time (or memory) over the log of what varies, ± its standard error; in brackets what the "
    "plan's counts give over the same points. Time is processor seconds of the whole walk, memory the peak of the "
    "process less that before the model."
)
FIT_LEGEND = (
    "Time = sum of the plan's operations over the rate of their kind, and a constant; rates fitted over all points "
    "with none below 0. Residual: measured over fitted, less 1."
)


def config_of(width: int, depth: int) -> LlamaConfig:
    """LLaMA2-7B's proportions: f = 2.6875 d."""
    sizes = {"hidden_size": width, "intermediate_size": 43 * width // 16, "num_attention_heads": width // HEAD}
    return LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=depth, **sizes)


def measure(width: int, depth: int, tokens: int, method: str, folder: str) -> dict[str, float]:
    """Prune a streamed model at 2:4; processor seconds and bytes."""
    place, device = Path(folder) / "model", torch.device("cpu")
    torch.manual_seed(0)
    LlamaForCausalLM(config_of(width, depth)).to(torch.bfloat16).save_pretrained(place)
    return _measured(place, tokens, method, device)


def _measured(place: Path, tokens: int, method: str, device: torch.device) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, pruner = _peak(), BlockPruner(METHODS[method])
    input_ids = torch.randint(VOCABULARY, (tokens // SEQ_LEN, SEQ_LEN))
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch, torch.no_grad():
        model, shelf = load_streamed(str(place), None, "float32", device, Path(scratch))
        stored, started = rounding(model, "float32"), time.process_time()
        for step in walk(model, input_ids, pruner.needs, 4, hold=lambda block: shelf.change(block, stored)):
            pruner.prune(step.block, step.streams, step.outputs)
        return {"seconds": time.process_time() - started, "bytes": _peak() - before}


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def planned(width: int, depth: int, tokens: int, method: str) -> dict[str, float]:
    """The operations of each stage by the plan, and its peak of memory for two blocks."""
    model = read_architecture(config_of(width, depth))
    work = Workload("float32", tokens // SEQ_LEN, SEQ_LEN, 4, streams=True)
    stages = plan_pruning(model, BlockPruner(METHODS[method]), work)
    flops = {stage.name: stage.flops for stage in stages}
    return {term: flops.get(term, 0.0) for term in TERMS} | {"planned": max(stage.peak_bytes for stage in stages)}


def points() -> list[dict[str, Any]]:
    """Where to measure: each axis by itself, with each method; from the smallest."""
    found = [
        MIDDLE | {axis: value} | {"axis": axis, "method": method}
        for (axis, values), method in product(AXES.items(), METHODS)
        for value in values
    ]
    return sorted(found, key=lambda one: one["width"] ** 2 * one["depth"] * (one["tokens"] + one["width"]))


def slope(x: Any, y: Any) -> tuple[float, float]:
    """The exponent b of y = a x^b, and its standard error."""
    fitted = stats.linregress(np.log(x), np.log(y))
    return float(fitted.slope), float(fitted.stderr)


def exponent_grid(measured: pd.DataFrame, facts: dict[str, str]) -> Grid:
    """Measured exponents beside those of the plan's counts."""
    rows = []
    for (axis, method), own in measured.groupby(["axis", "method"], sort=False):
        flops = own[list(TERMS)].sum(axis=1)
        row = {"Over": str(axis), "Method": str(method), "From": str(own[axis].min()), "To": str(own[axis].max())}
        for name, values, plan in (("Time", own.seconds, flops), ("Memory", own.bytes, own.planned)):
            found, error = slope(own[axis], values)
            row[name] = f"{found:.2f} ± {error:.2f} ({slope(own[axis], plan)[0]:.2f})"
        rows.append(row)
    return Grid("Exponents of the streamed walk", pd.DataFrame(rows), facts, LEGEND)


def fit(measured: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Seconds for each operation of `TERMS`, and of a constant; and the fitted seconds of each point."""
    counts = np.column_stack([measured[list(TERMS)].to_numpy(), np.ones(len(measured))])
    weights = 1 / measured.seconds.to_numpy()  # relative errors count, so that small points do too
    rates, _ = nnls(counts * weights[:, None], np.ones(len(measured)))
    return rates, counts @ rates


def fit_grid(measured: pd.DataFrame) -> Grid:
    """The rate of each kind of operation, and how far the points lie from the fit."""
    rates, fitted = fit(measured)
    rows = [
        {"Kind": term, "GFLOP/s": f"{1e-9 / rate:.1f}" if rate else "—"}
        for term, rate in zip(TERMS, rates, strict=False)
    ]
    residuals = measured.seconds / fitted - 1
    facts = {"constant": f"{rates[-1]:.2f} s"} | {
        f"residuals, {method}": f"{own.min():+.0%} to {own.max():+.0%}, root mean square {(own**2).mean() ** 0.5:.0%}"
        for method, own in residuals.groupby(measured.method, sort=False)
    }
    return Grid("The plan's formulae, fitted", pd.DataFrame(rows), facts, FIT_LEGEND, words=1)


def scaling_figure(measured: pd.DataFrame) -> Figure:
    """Time above, memory below, over each axis; lines: the plan's formulae, fitted."""
    measured = measured.assign(fitted=fit(measured)[1])
    base = float(np.median(measured.bytes / measured.planned))
    figure = Figure(figsize=(6.9, 2 * PANEL_HEIGHT + 0.4), layout="constrained")
    rows = (("seconds", "fitted", 1.0, "time of the walk [s]"), ("bytes", "planned", base, "peak memory [GB]"))
    for panels, (name, line, scale, label) in zip(figure.subplots(2, len(AXES)), rows, strict=True):
        unit = 1e9 if name == "bytes" else 1.0
        for axes, axis in zip(panels, AXES, strict=True):
            for method, own in measured[measured.axis == axis].groupby("method", sort=False):
                style, own = METHOD_STYLE[str(method)], own.sort_values(axis)
                axes.plot(own[axis], own[name] / unit, style.marker, color=style.color, markersize=POINT["markersize"])
                axes.plot(own[axis], scale * own[line] / unit, color=style.color, linewidth=0.8, label=str(method))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(axis)
        panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Measure what `benchmark_scaling.csv` does not hold yet of this machine, and write the tables and the figure."""
    path, known = OUT / "benchmark_scaling.csv", ["width", "depth", "tokens", "axis", "method"]
    here = {"machine": machine_description(torch.device("cpu"))["cpu"], "commit": git_state()["commit"]}
    found = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = [one for one in found if one["machine"] == here["machine"]]  # an exponent is that of one machine
    bar = progress(points(), "scaling", "point")
    for point in bar:
        if any({name: one[name] for name in known} == point for one in done):
            continue
        sizes = (point["width"], point["depth"], point["tokens"], point["method"])
        with tempfile.TemporaryDirectory(dir=".") as folder:
            command = [sys.executable, "-m", "benchmarks.scaling", *map(str, sizes), folder]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        done.append(point | json.loads(out.splitlines()[-1]) | planned(*sizes) | here)
        write_atomically(path, pd.DataFrame(done).to_csv(index=False))
    measured = pd.DataFrame(done)
    facts = {"model": "random, f = 2.6875 d, bf16 on disk, computed in fp32, 2:4", "machine": here["machine"]}
    facts |= {"threads": "1", "commit": ", ".join(measured.commit.unique()), "command": "make benchmark-scaling"}
    text = to_markdown([exponent_grid(measured, facts), fit_grid(measured)])
    write_atomically(path.with_suffix(".md"), text)
    write_figure(lambda: scaling_figure(measured), OUT / "figures", "benchmark_scaling")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        width, depth, tokens = map(int, sys.argv[1:4])
        print(json.dumps(measure(width, depth, tokens, *sys.argv[4:])))
