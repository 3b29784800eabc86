"""Ratios of our walk, masks and solver to the work they need and to the reference's, on this machine.

python -m benchmarks.walk          SmolLM2 on the CPU; writes results/benchmark.md
python -m benchmarks.walk --gpu    a random model of LLaMA2-7B's shape; writes results/benchmark_gpu.md
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.reference import loop_mask, reference_walk
from dass.data.assets import packaged_model
from dass.data.calibration import calibration_tokens
from dass.errors import DassError
from dass.models import batch_size_for, load_model, load_tokenizer, parameter_bytes
from dass.pruning.calls import enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Axis, select_mask
from dass.pruning.method import BlockPruner, Method
from dass.pruning.statistics import damped_inverse
from dass.pruning.update import obs_sweep
from dass.pruning.walk import prune_model
from dass.records import git_state, machine_description, package_versions, write_atomically
from dass.stages import peak_resident_memory

REPEATS = 2  # of each timing, interleaved; the fastest counts, since other programs only ever slow one down
CALIBRATION = (32, 512)
ALONG_INPUTS: dict[str, Axis] = dict.fromkeys(("gate", "up", "down"), "in")
METHODS = {
    "wanda": Method("wanda", ALONG_INPUTS, NM(2, 4)),
    "dass": Method("dass", ALONG_INPUTS | {"gate": "out", "up": "out"}, NM(2, 4)),
    "sparsegpt": Method("obs", ALONG_INPUTS, NM(2, 4), "obs"),
}


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    quantity: str
    measured: float
    limit: float
    at_least: bool
    detail: str

    def __str__(self) -> str:
        """As a row of a Markdown table."""
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"| {self.quantity} | {self.measured:.4g} | {bound} | {'yes' if met else '**no**'} | {self.detail} |"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true", help="a random model of LLaMA2-7B's shape on the GPU")
    gpu = parser.parse_args().gpu
    if gpu and not torch.cuda.is_available():
        sys.exit("error: --gpu needs a GPU that torch sees, and there is none.")
    device = torch.device("cuda" if gpu else "cpu")
    rows = gpu_rows() if gpu else [*walk_rows(), *mask_rows(), solver_row(), memory_row()]
    machine, versions, git = machine_description(device), package_versions(), git_state()
    lines = [
        f"# Benchmark on {machine['gpu'] or machine['cpu']}",
        "",
        f"Command `python -m benchmarks.walk{' --gpu' if gpu else ''}`; commit {git['commit']}"
        f"{' with local changes' if git['dirty'] else ''}; {machine['threads']} threads, {machine['memory_gb']} GB; "
        f"torch {versions['torch']}, transformers {versions['transformers']}. Timings are the best of {REPEATS}.",
        "",
        "| quantity | measured | limit | met | detail |",
        "|---|---:|---:|---|---|",
        *map(str, rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_atomically(Path("results") / ("benchmark_gpu.md" if gpu else "benchmark.md"), text)


def ratio(quantity: str, best: dict[str, float], over: str, under: str, limit: float, detail: str, least: bool) -> Row:
    """A row of the quotient of two timings, with both in its detail."""
    return Row(quantity, best[over] / best[under], limit, least, f"{best[over]:.3g} s / {best[under]:.3g} s; {detail}")


def fastest(timings: dict[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, float]:
    """The fastest of several runs of each, interleaved so that a slow spell of the machine hits all alike."""
    best = dict.fromkeys(timings, float("inf"))
    for _ in range(repeats):
        for name, timing in timings.items():
            best[name] = min(best[name], timing())
            print(f"{name}: {best[name]:.3f} s", file=sys.stderr, flush=True)
    return best


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    started = _now()
    work()
    return _now() - started


def _now() -> float:
    """The time once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def needed_forward(model: PreTrainedModel, input_ids: Tensor, batch_size: int) -> float:
    """Seconds of the forward work that a walk over a LLaMA-like model cannot do without.

    Per block: attention once, gate and up once dense, the pruned MLP once (not behind the last block).
    """
    blocks = find_blocks(model)
    activations = enter_first_block(model, blocks, input_ids, batch_size)

    def work() -> None:
        for index, block in enumerate(blocks):
            module, mlp = block.module, block.module.mlp
            for i, hidden in enumerate(activations.batches):
                call = activations.calls[i][index]
                hidden = hidden + module.self_attn(module.input_layernorm(hidden), **call.keywords)[0]
                x = module.post_attention_layernorm(hidden)
                mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
                activations.batches[i] = hidden
            if index + 1 < len(blocks):
                for i, hidden in enumerate(activations.batches):
                    activations.batches[i] = hidden + mlp(module.post_attention_layernorm(hidden))

    return seconds(work)


def time_walks(
    fresh: Callable[[], PreTrainedModel], input_ids: Tensor, with_reference: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the needed forward work, of our walk and of the reference's; and our memory in words, by method."""
    size = batch_size_for(fresh(), input_ids.shape[1])
    memory: dict[str, str] = {}

    def ours(name: str) -> float:
        model = fresh()
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with peak_resident_memory() as host:
            taken = seconds(lambda: prune_model(model, BlockPruner(METHODS[name]), input_ids, size))
        device = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device, " if on_gpu else ""
        memory[name] = f"peak {device}{host[0] / 1e9:.1f} GB on the host, batches of {size}"
        return taken

    def reference(name: str) -> float:
        model = fresh()
        return seconds(lambda: reference_walk(model, input_ids, name, 2, 4))

    timings: dict[str, Callable[[], float]] = {"forward": lambda: needed_forward(fresh(), input_ids, size)}
    timings |= {name: partial(ours, name) for name in METHODS}
    timings |= {f"reference {name}": partial(reference, name) for name in METHODS if with_reference}
    return fastest(timings), memory


def walk_rows() -> list[Row]:
    """Our walk against the needed forward work and against the reference's walk, on SmolLM2 at 2:4."""
    source = str(packaged_model("smollm2_135m"))
    tokens = calibration_tokens(
        "packaged_c4", load_tokenizer(source, None), None, *CALIBRATION, seed=0, bos="tokenizer", join=True
    )
    best, memory = time_walks(partial(load, source), tokens, with_reference=True)
    detail = f"SmolLM2-135M, fp32, 2:4, {CALIBRATION[0]} x {CALIBRATION[1]} tokens"
    return forward_rows(best, 1.10, {name: f"{detail}; {memory[name]}" for name in METHODS}) + [
        ratio(f"{name}: reference walk / ours", best, f"reference {name}", name, 1.4, detail, True) for name in METHODS
    ]


def forward_rows(best: dict[str, float], limit: float, details: dict[str, str]) -> list[Row]:
    """Our walk against the needed forward work, for the methods that do little else."""
    quantity = "pruning time / forward work needed"
    return [ratio(f"{n}: {quantity}", best, n, "forward", limit, details[n], False) for n in ("wanda", "dass")]


def load(source: str) -> PreTrainedModel:
    """A fresh SmolLM2."""
    return load_model(source, None, "float32", torch.device("cpu"))


def mask_rows() -> list[Row]:
    """Mask selection on a LLaMA2-7B gate projection against the loop."""
    scores = torch.rand(11008, 4096, generator=torch.Generator().manual_seed(0))
    axes: tuple[Axis, ...] = ("in", "out")
    rows = []
    for pattern, axis in product((NM(2, 4), NM(4, 8)), axes):
        groups = scores if axis == "in" else scores.T
        loop = partial(seconds, partial(loop_mask, groups, pattern.n, pattern.m))
        ours = partial(seconds, partial(select_mask, scores, pattern, axis))
        best = fastest({"loop": loop, "ours": ours}, repeats=5)
        quantity = f"mask selection {pattern} along '{axis}': loop / ours"
        rows.append(ratio(quantity, best, "loop", "ours", 1.8, "11008 x 4096", True))
    return rows


def solver_row() -> Row:
    """The OBS solver in fp32 against the plain column-by-column algorithm in fp64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(512, 512, generator=generator, dtype=torch.float64)
    x = torch.randn(4096, 512, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(256, 512, generator=generator, dtype=torch.float64)
    keep = select_mask(weight.abs(), NM(2, 4), "in").keep
    hessian = x.T @ x
    factor = damped_inverse(hessian, 0.01, "a layer").factor
    plain = weight.clone()
    for i in range(weight.shape[1]):
        error = torch.where(keep[:, i], 0, plain[:, i]) / factor[i, i]
        plain[:, i:] -= error[:, None] * factor[i, i:]
    plain[~keep] = 0
    factor32 = damped_inverse(hessian.float(), 0.01, "a layer").factor
    ours, _ = obs_sweep(weight.float(), factor32, lambda columns, _: keep[:, columns], 128)
    error = ((ours - plain).norm() / plain.norm()).item()
    return Row("SparseGPT solver: relative difference to column by column", error, 1e-4, False, "fp32 against fp64")


def memory_row() -> Row:
    """Peak resident memory of a whole run in a process of its own, beyond the model's size."""
    size = parameter_bytes(load(str(packaged_model("smollm2_135m")))) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"results_dir={folder}", "calibration.n_sequences=128", "calibration.seq_len=512"]
        command = [sys.executable, "-m", "experiments.prune", "tracking=none", "evaluation.n_windows=4", *settings]
        process = subprocess.Popen([*command, "method=sparsegpt"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise DassError("The run whose memory was to be measured failed: see its message above.")
    peak = usage.ru_maxrss * 1024 / 1e9
    detail = f"{peak:.2f} GB at the peak, {size:.2f} GB of weights; SparseGPT, 128 x 512 tokens, Python and all"
    return Row("peak memory of a run - model's size, GB", peak - size, 1.0, False, detail)


def gpu_rows() -> list[Row]:
    """DaSS, Wanda and SparseGPT on a random model of LLaMA2-7B's shape in bf16, 128 x 2048 tokens."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )

    def fresh() -> PreTrainedModel:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return model.eval().requires_grad_(False)

    input_ids = torch.randint(0, 32000, (128, 2048), generator=torch.Generator().manual_seed(0))
    best, memory = time_walks(fresh, input_ids, with_reference=False)
    limits = {"wanda": 60, "dass": 60, "sparsegpt": 180}
    seconds_rows = [Row(f"{name}: seconds", best[name], limits[name], False, memory[name]) for name in METHODS]
    return forward_rows(best, 1.15, memory) + seconds_rows


if __name__ == "__main__":
    main()
