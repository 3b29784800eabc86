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
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.reference import loop_mask, reference_walk
from dass.data.assets import packaged_model
from dass.data.calibration import calibration_tokens
from dass.errors import DassError
from dass.models import batch_size_for, load_model, load_tokenizer, parameter_bytes
from dass.pruning.blocks import find_blocks
from dass.pruning.masks import NM, Axis, select_mask
from dass.pruning.method import BlockPruner, Method
from dass.pruning.statistics import damped_inverse
from dass.pruning.update import obs_sweep
from dass.pruning.walk import enter_first_block, prune_model
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
    rows = gpu_rows(device) if gpu else [*walk_rows(), *mask_rows(), solver_row(), memory_row()]
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


def fastest(timings: dict[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, float]:
    """The fastest of several runs of each, interleaved so that a slow spell of the machine hits all alike."""
    best = dict.fromkeys(timings, float("inf"))
    for _ in range(repeats):
        for name, timing in timings.items():
            best[name] = min(best[name], timing())
            print(f"{name}: {best[name]:.3f} s", file=sys.stderr, flush=True)
    return best


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Wall time of some work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


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

    return seconds(work, model.device)


def walk_rows() -> list[Row]:
    """Our walk against the needed forward work and against the reference's walk, on SmolLM2 at 2:4."""
    source, device = str(packaged_model("smollm2_135m")), torch.device("cpu")
    tokenizer = load_tokenizer(source, None)
    input_ids = calibration_tokens("packaged_c4", tokenizer, None, *CALIBRATION, 0, "tokenizer", True)
    size = batch_size_for(load(source), CALIBRATION[1])

    def ours(method: str) -> float:
        model = load(source)
        return seconds(lambda: prune_model(model, BlockPruner(METHODS[method]), input_ids, size), device)

    def reference(method: str) -> float:
        model = load(source)
        return seconds(lambda: reference_walk(model, input_ids, method, 2, 4), device)

    timings: dict[str, Callable[[], float]] = {"forward": lambda: needed_forward(load(source), input_ids, size)}
    timings |= {f"ours {name}": partial(ours, name) for name in METHODS}
    timings |= {f"reference {name}": partial(reference, name) for name in METHODS}
    best = fastest(timings)
    tokens = f"SmolLM2-135M, fp32, 2:4, {CALIBRATION[0]} x {CALIBRATION[1]} tokens"
    rows = [
        Row(
            f"{name}: pruning time / forward work needed",
            best[f"ours {name}"] / best["forward"],
            1.10,
            False,
            f"{best[f'ours {name}']:.1f} s / {best['forward']:.1f} s; {tokens}",
        )
        for name in ("wanda", "dass")
    ]
    return rows + [
        Row(
            f"{name}: reference walk / ours",
            best[f"reference {name}"] / best[f"ours {name}"],
            1.4,
            True,
            f"{best[f'reference {name}']:.1f} s / {best[f'ours {name}']:.1f} s; {tokens}",
        )
        for name in METHODS
    ]


def load(source: str) -> PreTrainedModel:
    """A fresh SmolLM2."""
    return load_model(source, None, "float32", torch.device("cpu"))


def mask_rows() -> list[Row]:
    """Mask selection on a LLaMA2-7B gate projection against the loop."""
    scores = torch.rand(11008, 4096, generator=torch.Generator().manual_seed(0))
    rows = []
    for pattern in (NM(2, 4), NM(4, 8)):
        axes: tuple[Axis, ...] = ("in", "out")
        for axis in axes:
            groups = scores if axis == "in" else scores.T
            loop = partial(seconds, partial(loop_mask, groups, pattern.n, pattern.m))
            ours = partial(seconds, partial(select_mask, scores, pattern, axis))
            best = fastest({"loop": loop, "ours": ours}, repeats=5)
            detail = f"{best['loop']:.2f} s / {best['ours']:.2f} s; 11008 x 4096"
            rows.append(
                Row(
                    f"mask selection {pattern} along '{axis}': loop / ours",
                    best["loop"] / best["ours"],
                    1.8,
                    True,
                    detail,
                )
            )
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


def gpu_rows(device: torch.device) -> list[Row]:
    """DaSS, Wanda and SparseGPT on a random model of LLaMA2-7B's shape in bf16, 128 x 2048 tokens."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    input_ids = torch.randint(0, 32000, (128, 2048), generator=torch.Generator().manual_seed(0))

    def fresh() -> PreTrainedModel:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return model.eval().requires_grad_(False)

    def forward() -> float:
        model = fresh()
        return needed_forward(model, input_ids, batch_size_for(model, 2048))

    memory: dict[str, str] = {}

    def ours(name: str) -> float:
        model = fresh()
        torch.cuda.reset_peak_memory_stats(device)
        size = batch_size_for(model, 2048)
        with peak_resident_memory() as host:
            taken = seconds(lambda: prune_model(model, BlockPruner(METHODS[name]), input_ids, size), device)
        on_device = torch.cuda.max_memory_allocated(device) / 1e9
        memory[name] = f"peak {on_device:.1f} GB on the device, {host[0] / 1e9:.1f} GB on the host, batches of {size}"
        return taken

    best = fastest({"forward": forward} | {name: partial(ours, name) for name in METHODS})
    rows = [
        Row(f"{name}: pruning time / forward work needed", best[name] / best["forward"], 1.15, False, memory[name])
        for name in ("wanda", "dass")
    ]
    limits = {"wanda": 60, "dass": 60, "sparsegpt": 180}
    return rows + [Row(f"{name}: seconds", best[name], limits[name], False, memory[name]) for name in METHODS]


if __name__ == "__main__":
    main()
