"""Ratios of our walk, masks and solver to the work they need and to the reference's, on this machine.

python -m benchmarks.walk          SmolLM2 on the CPU; writes results/benchmark.md
python -m benchmarks.walk --gpu    a random model of LLaMA2-7B's shape; writes results/benchmark_gpu.md
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.counted import LLAMA2_70B, counted_block, planned_block
from benchmarks.orders import order_row
from benchmarks.reference import loop_mask, reference_walk, sparsegpt_layer
from benchmarks.table import CPU, REPEATS, fastest, ratio, row
from dass.data.assets import packaged_model
from dass.data.calibration import calibration_tokens
from dass.errors import DassError
from dass.models import batch_size_for, load_model, load_tokenizer, parameter_bytes
from dass.planning.devices import DEVICES
from dass.pruning.calls import enter_first_block
from dass.pruning.criteria import obs
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Axis, keep_most_important, select_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import Statistics, damped_inverse
from dass.pruning.update import obs_sweep
from dass.pruning.walk import walk
from dass.records import git_state, machine_description, package_versions, write_atomically

CALIBRATION = (32, 512)
COUNTED = "LLaMA2-7B at 2:4, bf16, 128 x 2048 tokens, on an H100 that is not there"
STREAMED = "LLaMA2-70B at 2:4, bf16, 128 x 2048 tokens, blocks from disk; all that lies on such a GPU"
ALONG_INPUTS: dict[str, Axis] = dict.fromkeys(("gate", "up", "down"), "in")
METHODS = {
    "wanda": Method("wanda", ALONG_INPUTS, NM(2, 4)),
    "dass": Method("dass", ALONG_INPUTS | {"gate": "out", "up": "out"}, NM(2, 4)),
    "sparsegpt": Method("obs", ALONG_INPUTS, NM(2, 4), "obs"),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true", help="a random model of LLaMA2-7B's shape on the GPU")
    gpu = parser.parse_args().gpu
    if gpu and not torch.cuda.is_available():
        sys.exit("error: --gpu needs a GPU that torch sees, and there is none.")
    device = torch.device("cuda" if gpu else "cpu")
    memory = [] if gpu else [memory_row()]  # first: a child's peak counts what its parent held when it was forked
    rows = (
        gpu_rows()
        if gpu
        else [*walk_rows(), matched_row(), *mask_rows(), solver_row(), solver_speed_row(), *memory, *counted_rows()]
    )
    machine, versions, git = machine_description(device), package_versions(), git_state()
    text = f"""# Benchmark on {machine["gpu"] or machine["cpu"]}

Command `python -m benchmarks.walk{" --gpu" if gpu else ""}`; commit {git["commit"]}\
{" with local changes" if git["dirty"] else ""}; {machine["threads"]} threads, {machine["memory_gb"]} GB; \
torch {versions["torch"]}, transformers {versions["transformers"]}. Of {REPEATS} runs of each the fastest counts, of \
walks block by block{"" if gpu else ", of which those of one number follow each other"}.

| quantity | measured | limit | met | detail |
|---|---:|---:|---|---|
"""
    text += "".join(f"{one}\n" for one in rows)
    print(text)
    write_atomically(Path("results") / ("benchmark_gpu.md" if gpu else "benchmark.md"), text)


def needed_forward(model: PreTrainedModel, input_ids: Tensor, batch_size: int) -> Callable[[], Iterator[None]]:
    """The forward work that a walk over a LLaMA-like model cannot do without, with a pause in each block.

    Per block: attention once, gate and up once dense, the pruned MLP once (not behind the last block).
    """
    blocks = find_blocks(model)
    with torch.no_grad():
        activations = enter_first_block(model, blocks, input_ids.to(model.device).split(batch_size))

    @torch.no_grad()
    def work() -> Iterator[None]:
        for index, block in enumerate(blocks):
            module, mlp = block.module, block.module.mlp
            for i, hidden in enumerate(activations.batches):
                call = activations.calls[i][index]
                hidden = hidden + module.self_attn(module.input_layernorm(hidden), **call.keywords)[0]
                x = module.post_attention_layernorm(hidden)
                mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
                activations.batches[i] = hidden
            yield
            if index + 1 < len(blocks):
                for i, hidden in enumerate(activations.batches):
                    activations.batches[i] = hidden + mlp(module.post_attention_layernorm(hidden))

    return work


def pruning(model: PreTrainedModel, name: str, input_ids: Tensor, batch_size: int) -> Iterator[None]:
    """Our walk, with a pause in each block once it is pruned."""
    pruner, pruned = BlockPruner(METHODS[name]), []
    for step in walk(model, input_ids, pruner.needs, batch_size):
        pruned += pruner.prune(step.block, step.streams, step.outputs)
        yield


def time_walks(
    fresh: Callable[[], PreTrainedModel], input_ids: Tensor, with_reference: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the needed forward work, of our walk and of the reference's; our batches and memory, in words."""
    device, size = fresh().device, batch_size_for(fresh(), input_ids.shape[1])

    def prepare(name: str) -> Callable[[], object]:
        if name == "forward":
            return needed_forward(fresh(), input_ids, size)
        if name in METHODS:
            return partial(pruning, fresh(), name, input_ids, size)
        return partial(reference_walk, fresh(), input_ids, name.removeprefix("reference "), 2, 4)

    best = fastest(["forward", *METHODS, *(f"reference {name}" for name in METHODS if with_reference)], prepare, device)
    memory = {}
    for name in METHODS:
        gpu = best[name]["peak_gpu_memory_gb"]
        memory[name] = f"batches of {size}" + (f", peak {gpu:.1f} GB on the device" if gpu is not None else "")
    return {name: stage["seconds"] for name, stage in best.items()}, memory


def walk_rows() -> list[str]:
    """Our walk against the needed forward work and against the reference's walk, on SmolLM2 at 2:4."""
    tokenizer = load_tokenizer(str(packaged_model("smollm2_135m")), None)
    tokens = calibration_tokens("packaged_c4", tokenizer, None, *CALIBRATION, seed=0, bos="tokenizer", join=True)
    best, memory = time_walks(smollm2, tokens, with_reference=True)
    detail = f"SmolLM2-135M, fp32, 2:4, {CALIBRATION[0]} x {CALIBRATION[1]} tokens"
    return forward_rows(best, 1.10, {name: f"{detail}; {memory[name]}" for name in METHODS}) + [
        ratio(f"{name}: reference walk / ours", best[f"reference {name}"], best[name], "at least", 1.4, detail)
        for name in METHODS
    ]


def forward_rows(best: dict[str, float], limit: float, details: dict[str, str]) -> list[str]:
    """Our walk against the needed forward work, for the methods that do little else."""
    return [
        ratio(
            f"{name}: pruning time / forward work needed", best[name], best["forward"], "at most", limit, details[name]
        )
        for name in ("wanda", "dass")
    ]


def smollm2() -> PreTrainedModel:
    """A fresh SmolLM2, in memory of its own: the first write to a page of a mapped file is the loader's cost."""
    model = load_model(str(packaged_model("smollm2_135m")), None, "float32", CPU)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def matched_row() -> str:
    """How long the order `matched` is looked for in all blocks of SmolLM2, and what orders keep."""
    tokenizer = load_tokenizer(str(packaged_model("smollm2_135m")), None)
    tokens = calibration_tokens("packaged_c4", tokenizer, None, 8, 512, seed=0, bos="tokenizer", join=True)
    return order_row(smollm2(), tokens, 60, "SmolLM2-135M, 2:4, 8 x 512 tokens, all blocks")


def mask_rows() -> list[str]:
    """Mask selection on a LLaMA2-7B gate projection against the loop."""
    scores = torch.rand(11008, 4096, generator=torch.Generator().manual_seed(0))
    axes: tuple[Axis, ...] = ("in", "out")
    rows = []
    for pattern, axis in product((NM(2, 4), NM(4, 8)), axes):
        loop = partial(loop_mask, scores if axis == "in" else scores.T, pattern.n, pattern.m)
        works = {"loop": loop, "ours": partial(select_mask, scores, pattern, axis)}
        best = fastest(works, works.__getitem__, CPU, repeats=5)
        quantity = f"mask selection {pattern} along '{axis}': loop / ours"
        rows.append(ratio(quantity, best["loop"]["seconds"], best["ours"]["seconds"], "at least", 1.8, "11008 x 4096"))
    return rows


def solver_row() -> str:
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
    quantity = "SparseGPT solver: relative difference to column by column"
    return row(quantity, error, "at most", 1e-4, "fp32 against fp64")


def solver_speed_row(out_features: int = 4096, in_features: int = 11008) -> str:
    """SparseGPT's factorisation and sweep at 2:4 against the reference's, on a down projection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(in_features // 4, in_features, generator=generator)
    weight, hessian = torch.randn(out_features, in_features, generator=generator), x.T @ x / len(x)
    hessian.diagonal().add_(1)

    def ours() -> None:
        statistics = Statistics(hessian=lambda: hessian)
        factor = statistics.inverse(0.01).factor
        obs_sweep(
            weight, factor, lambda at, w: keep_most_important(obs(w, "down", statistics.columns(at)), NM(2, 4), "in"), 4
        )

    works = {"reference": lambda: sparsegpt_layer(weight.clone(), hessian.clone(), 2, 4), "ours": ours}
    best = fastest(works, works.__getitem__, CPU)
    detail = f"factorisation and sweep at 2:4, {out_features} x {in_features}"
    return ratio(
        "SparseGPT solver: reference / ours",
        best["reference"]["seconds"],
        best["ours"]["seconds"],
        "at least",
        1.5,
        detail,
    )


def counted_rows() -> list[str]:
    """What an H100 would do for one block of LLaMA2-7B, counted; the plan's seconds against those of the counts."""
    rows, device = [], DEVICES["h100"]
    for name, method in METHODS.items():
        pruner = BlockPruner(method)
        counts, peak = counted_block(pruner, device)
        _, streamed = counted_block(pruner, device, LLAMA2_70B, n_blocks=80, streams=True)
        planned, sweeps = planned_block(pruner, device), method.update == "obs"
        terms = (
            f"{counts.launching:.3g} s launches, {counts.arithmetic:.3g} s arithmetic, {counts.traffic:.3g} s traffic"
        )
        off = max(planned / counts.seconds, counts.seconds / planned)
        rows += [
            row(f"{name}: launches per block", counts.launches, "at most", 60000 if sweeps else 1000, COUNTED),
            row(f"{name}: waits per block", counts.waits, "at most", 5, COUNTED),
            row(f"{name}: peak per block beyond the weights, GB", peak / 1e9, "at most", 10, COUNTED),
            row(f"{name}: peak of LLaMA2-70B, streamed, GB", streamed / 1e9, "at most", device.memory_gb, STREAMED),
            row(
                f"{name}: counted and planned seconds differ by a factor",
                off,
                "at most",
                1.5,
                f"{COUNTED}: {counts.seconds:.3g} s counted ({terms}), {planned:.3g} s by experiments.plan",
            ),
        ]
    return rows


def memory_row() -> str:
    """Peak resident memory of a whole run in a process of its own, beyond the model's size."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"results_dir={folder}", "calibration.n_sequences=128", "calibration.seq_len=512"]
        command = [sys.executable, "-m", "experiments.prune", "tracking=none", "evaluation.n_windows=4", *settings]
        process = subprocess.Popen([*command, "method=sparsegpt"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise DassError("The run whose memory was to be measured failed: see its message above.")
    peak, size = usage.ru_maxrss * 1024 / 1e9, parameter_bytes(smollm2()) / 1e9
    detail = f"{peak:.2f} GB at the peak, {size:.2f} GB of weights; SparseGPT, 128 x 512 tokens, Python and all"
    return row("peak memory of a run - model's size, GB", peak - size, "at most", 0.8, detail)


def gpu_rows() -> list[str]:
    """DaSS, Wanda and SparseGPT on a random model of LLaMA2-7B's shape in bf16, 128 x 2048 tokens."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )

    def fresh() -> PreTrainedModel:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)

    input_ids = torch.randint(0, 32000, (128, 2048), generator=torch.Generator().manual_seed(0))
    best, memory = time_walks(fresh, input_ids, with_reference=False)
    limits = {"wanda": 60, "dass": 60, "sparsegpt": 180}
    seconds_rows = [row(f"{name}: seconds", best[name], "at most", limits[name], memory[name]) for name in METHODS]
    return forward_rows(best, 1.15, memory) + seconds_rows


if __name__ == "__main__":
    main()
