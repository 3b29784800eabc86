"""Peak memory of models whose blocks lie on disk, by the operating system's own count, and what streaming costs.

python -m benchmarks.memory                     writes models with LLaMA2-7B's blocks, and results/benchmark_memory.md
python -m benchmarks.memory FOLDER METHOD MODE  one measurement, as a line of JSON: METHOD wanda, dass or obs
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dass.evaluation.perplexity import perplexity
from dass.models import load_model
from dass.progress import progress
from dass.pruning.masks import NM, Axis
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import walk
from dass.records import git_state, machine_description, write_atomically
from dass.saving import round_to, rounding
from dass.streaming import load_streamed
from report.grid import Grid, to_markdown

DEPTHS = (4, 8, 16)
WIDTH, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 512
SEQUENCES, SEQ_LEN = 4, 128
ROWS: dict[str, Axis] = {"gate": "in", "up": "in", "down": "in"}
METHODS = {
    "wanda": Method("wanda", ROWS, NM(2, 4)),
    "dass": Method("dass", {"gate": "out", "up": "out", "down": "in"}, NM(2, 4)),
    "obs": Method("obs", ROWS, NM(2, 4), "obs"),
}
BLOCK = 4 * (4 * WIDTH**2 + 3 * WIDTH * INTERMEDIATE)  # bytes in fp32
SQUARES = 2 * 4 * INTERMEDIATE**2  # a Hessian and its factor
LIMIT, FLAT, COST = 3 * BLOCK + 1.5e9, 1.05, 1.2
LEGEND = (
    "Peak: of the whole process, from loading to the perplexity. Limit: three blocks in fp32 and 1.5 GB, with "
    "SparseGPT a Hessian and its factor more; and within 5 % of the peak of the fewest blocks. Cost: seconds of the "
    "walk over those of the walk in memory, one run each. Equal: weights and losses are bit for bit those in memory."
)


def measure(folder: str, method: str, mode: str) -> dict[str, Any]:
    """Prune and evaluate a model, `mode` stream or resident; peak memory, seconds and a hash of what came out."""
    torch.manual_seed(0)
    device, pruner = torch.device("cpu"), BlockPruner(METHODS[method]).storing(torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, SEQ_LEN))
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch, torch.no_grad():
        model, shelf = (
            load_streamed(folder, None, "float32", device, Path(scratch))
            if mode == "stream"
            else (load_model(folder, None, "float32", device), None)
        )
        stored, more = rounding(model, "bfloat16"), {}
        if shelf is not None:
            more = {"hold": lambda block: shelf.change(block, stored)}
        started = time.perf_counter()
        for step in walk(model, tokens, pruner.needs, SEQUENCES, **more):
            pruner.prune(step.block, step.streams, step.outputs)
            for p in step.block.projections:
                digest.update(p.weight.numpy().tobytes())
        seconds = time.perf_counter() - started
        if shelf is None:
            round_to(model, "bfloat16")
        losses = perplexity(model, tokens.split(SEQUENCES), shelf).losses
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"peak": 1024 * int(peak[1]), "seconds": seconds, "sha256": digest.hexdigest(), "losses": losses}


def write_model(folder: Path, depth: int) -> None:
    """A random model in bf16 with so many of LLaMA2-7B's blocks, made block by block."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS}
    torch.manual_seed(depth)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=depth, **sizes))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="1GB")


def apart(folder: Path, method: str, mode: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", str(folder), method, mode]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Measure all, and write the table."""
    rows: list[dict[str, str]] = []
    fewest: dict[str, float] = {}
    misses = 0
    bar = progress(None, "memory", "run", len(METHODS) * (len(DEPTHS) + 1))
    with tempfile.TemporaryDirectory(dir=".") as place:
        for depth in DEPTHS:
            folder = Path(place) / f"{depth}_blocks"
            subprocess.run([sys.executable, "-m", "benchmarks.memory", str(folder), str(depth)], check=True)
            for method in METHODS:
                found = apart(folder, method, "stream")
                bar.update()
                row = {"Method": method, "Blocks": str(depth), "Peak [GB]": f"{found['peak'] / 1e9:.2f}"}
                limit = LIMIT + (SQUARES if method == "obs" else 0)
                limit = min(limit, FLAT * fewest.setdefault(method, found["peak"]))
                row |= {"Limit [GB]": f"{limit / 1e9:.2f}", "Walk [s]": f"{found['seconds']:.1f}"}
                kept = found["peak"] <= limit
                if depth == DEPTHS[0]:
                    whole = apart(folder, method, "resident")
                    bar.update()
                    cost = found["seconds"] / whole["seconds"]
                    equal = (found["sha256"], found["losses"]) == (whole["sha256"], whole["losses"])
                    row |= {"In memory [GB]": f"{whole['peak'] / 1e9:.2f}", "Cost": f"{cost:.2f}"}
                    row["Equal"] = "yes" if equal else "no"
                    kept &= cost <= COST and equal
                rows.append(row | {"Kept": "yes" if kept else "no"})
                misses += not kept
            for file in folder.iterdir():
                file.unlink()
    bar.close()
    machine = machine_description(torch.device("cpu"))
    facts = {
        "model": f"d {WIDTH}, f {INTERMEDIATE}, bf16 on disk before and behind, computed in fp32",
        "data": f"{SEQUENCES} x {SEQ_LEN} random tokens, 2:4",
    }
    facts |= {"machine": f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']:g} GB"}
    facts |= {"commit": f"{git_state()['commit']}", "command": "make benchmark-memory"}
    text = to_markdown([Grid("Peak memory of streamed models", pd.DataFrame(rows).fillna("—"), facts, LEGEND)])
    write_atomically(Path("results/benchmark_memory.md"), text)
    print(text)
    if misses:
        sys.exit(f"error: {misses} of {len(rows)} rows miss a limit")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif len(sys.argv) == 3:
        write_model(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        print(json.dumps(measure(*sys.argv[1:])))
