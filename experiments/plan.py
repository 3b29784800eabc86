"""What pruning a model would take, from its config alone: parameters, share removed, operations, memory, time.

python -m experiments.plan model=llama2_7b device=h100
python -m experiments.plan model=llama31_405b device=h200 sparsity=unstructured
"""

import math
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from dass.errors import DassError
from dass.models import load_config
from dass.planning.architecture import Architecture, config_from, read_architecture
from dass.planning.costs import (
    Workload,
    plan_evaluation,
    plan_load,
    plan_pruning,
    share_removed,
    targeted_weights,
)
from dass.planning.device import Assumptions, Device, Stage, seconds
from dass.planning.devices import DEVICES
from dass.pruning.method import BlockPruner
from experiments.app import run_app
from experiments.methods import pruners_of
from experiments.resolve import source_of
from experiments.schema import CalibrationConfig, EvaluationConfig, ModelConfig, PruneConfig, SparsityConfig

METHODS = ("magnitude", "wanda", "sparsegpt", "dass")
WIKITEXT2_TOKENS = 341_469  # of its test split by LLaMA-2's tokenizer: 166 windows of 2048; others give other numbers
STAGE_HEADERS = ("Method", "Stage", "Operations", "Memory traffic", "Time", "Peak memory", "Fits")


@dataclass
class PlanConfig:
    """conf/plan.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: str = "h100"
    dtype: str = "bfloat16"
    targets: str = "mlp"
    batch_size: int = 1
    efficiency: float | None = None
    launch_us: float = 5
    disk_gb_s: float = 1
    debug: bool = False


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def main(config: DictConfig) -> None:
    """Print the plan of a composed config; DassError where a value or combination means nothing."""
    typed: PlanConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    device = find_device(typed.device)
    assumed = Assumptions(
        device.efficiency if typed.efficiency is None else typed.efficiency, typed.launch_us, typed.disk_gb_s
    )
    pruners = pruners_of(PruneConfig(method={"methods": list(METHODS)}, sparsity=typed.sparsity, targets=typed.targets))
    calibration = typed.calibration
    if calibration.n_sequences is None or calibration.seq_len is None:
        raise DassError(
            f"calibration={calibration.name} does not say how much it reads: give `calibration.n_sequences` and "
            f"`calibration.seq_len`."
        )
    work = Workload(typed.dtype, calibration.n_sequences, calibration.seq_len, typed.batch_size)
    windows = evaluation_size(typed.evaluation)
    model = read_architecture(transformers_config(typed.model))

    shared = [plan_load(model, work)]
    if windows is not None:
        shared.append(plan_evaluation(model, work, *windows))
    stages = {name: plan_pruning(model, pruner, work) for name, pruner in pruners.items()}
    rows = [_row("each", stage, device, typed.dtype, assumed) for stage in shared]
    for name, own in stages.items():
        rows += [_row(name, stage, device, typed.dtype, assumed) for stage in own]
        rows.append(_sum(name, shared + own, device, typed.dtype, assumed))
    print(f"# {typed.model.name}, {typed.dtype}, on {device.name}: an estimate\n")
    print(parameter_table(model), "\n")
    print(removal_table(model, pruners["wanda"]), "\n")
    print(tabulate(rows, STAGE_HEADERS, "pipe", disable_numparse=True, colalign=("left", "left", *["right"] * 5)), "\n")
    print("\n".join(f"- {note}" for note in notes(typed, model, device, assumed, work, windows)))


def transformers_config(model: ModelConfig) -> Any:
    """The transformers config of `model.architecture`, else that of the model's folder or hub page."""
    if model.architecture:
        return config_from(model.architecture)
    if model.name == "local" and model.path is None:
        raise DassError("model=local needs a folder: give `model.path=DIR`.")
    return load_config(source_of(model), model.revision)


def find_device(name: str) -> Device:
    """A device by its name; DassError lists those that there are."""
    if name not in DEVICES:
        raise DassError(
            f"device={name} is unknown: choose one of {', '.join(DEVICES)}, or add it to dass/planning/devices.py."
        )
    return DEVICES[name]


def evaluation_size(evaluation: EvaluationConfig) -> tuple[int, int] | None:
    """Windows and tokens per window; None without an evaluation."""
    if evaluation.name == "none":
        return None
    if evaluation.seq_len is None:
        raise DassError(f"evaluation={evaluation.name} is not of windows of text: plan with another, or none.")
    if evaluation.n_windows is not None:
        return evaluation.n_windows, evaluation.seq_len
    if evaluation.name != "wikitext2":
        raise DassError(f"evaluation={evaluation.name} does not say how much it reads: give `evaluation.n_windows`.")
    return WIKITEXT2_TOKENS // max(evaluation.seq_len, 1), evaluation.seq_len


def parameter_table(model: Architecture) -> str:
    """Parameters by role."""
    rows = [[role, f"{count:,}", f"{count / model.total:.1%}"] for role, count in model.parameters.items()]
    rows.append(["all", f"{model.total:,}", "100.0%"])
    return tabulate(
        rows, ("Role", "Parameters", "Share"), "pipe", disable_numparse=True, colalign=("left", *["right"] * 2)
    )


def removal_table(model: Architecture, pruner: BlockPruner) -> str:
    """What the pattern removes, of the targeted weights, of those of linear layers, of all parameters."""
    targeted, pattern = targeted_weights(model, pruner), pruner.method.pattern
    removed = share_removed(pattern) * targeted
    wholes = {"targeted": targeted, "linear layers but the head": model.linear, "all": model.total}
    rows = [[of, f"{whole:,}", f"{removed / whole:.1%}"] for of, whole in wholes.items()]
    headers = (f"{pattern} on {pruner.targets} removes", "Weights", "Share removed")
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left", *["right"] * 2))


def notes(
    config: PlanConfig,
    model: Architecture,
    device: Device,
    assumed: Assumptions,
    work: Workload,
    windows: tuple[int, int] | None,
) -> list[str]:
    """What the numbers rest on."""
    found = [
        f"Times are estimates, none is measured: each is the largest of operations / ({assumed.efficiency:g} x peak), "
        f"traffic / ({assumed.efficiency:g} x {device.bandwidth_gb_s:g} GB/s), small operations in a chain x "
        f"{assumed.launch_us:g} µs, weights from disk at {assumed.disk_gb_s:g} GB/s. Peaks: {device.tflops_16bit:g} "
        f"TFLOP/s in 16 bits, {device.tflops_fp32:g} in fp32, in which statistics and solver are. Tokenising is left "
        "out.",
        f"Memory is that of {config.batch_size} sequence(s) per forward, without the allocator's waste; GB are 10^9 "
        "bytes.",
        "The walk holds the whole model on one device; more devices and offloading are not implemented.",
        f"Calibration: {work.n_sequences} x {work.seq_len} tokens.",
    ]
    if windows is not None:
        note = f"Evaluation: {windows[0]} windows of {windows[1]} tokens"
        if config.evaluation.n_windows is None:
            note += (
                f", if the tokenizer makes {WIKITEXT2_TOKENS:,} tokens of WikiText-2's test split, as LLaMA-2's does"
            )
        found.append(note + ".")
    if model.refusal is not None:
        found.append(
            f"Experts are counted as if each were pruned by the tokens routed to it ({model.blocks[0].active} of "
            f"{model.blocks[0].experts} per token, evenly), but the walk refuses this model today: {model.refusal}"
        )
    return found


def _row(method: str, stage: Stage, device: Device, dtype: str, assumed: Assumptions) -> list[str]:
    time = _time(seconds(stage, device, dtype, assumed))
    moved = f"{stage.moved_bytes / 1e9:,.0f} GB"
    return [method, stage.name, _operations(stage.flops), moved, time, *_memory(stage.peak_bytes, device)]


def _sum(method: str, stages: list[Stage], device: Device, dtype: str, assumed: Assumptions) -> list[str]:
    time = _time(sum(seconds(stage, device, dtype, assumed) for stage in stages))
    flops, moved = sum(s.flops for s in stages), sum(s.moved_bytes for s in stages)
    memory = _memory(max(s.peak_bytes for s in stages), device)
    return [method, "whole run", _operations(flops), f"{moved / 1e9:,.0f} GB", time, *memory]


def _memory(peak_bytes: float, device: Device) -> tuple[str, str]:
    """The peak, and how many such devices hold it."""
    count = math.ceil(peak_bytes / (device.memory_gb * 1e9))
    return f"{peak_bytes / 1e9:,.1f} GB", "yes" if count == 1 else f"no: {count} x {device.name} or offload"


def _operations(flops: float) -> str:
    return f"{flops / 1e12:,.3g} TFLOP" if flops < 1e15 else f"{flops / 1e15:,.1f} PFLOP"


def _time(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


if __name__ == "__main__":
    run_app(main, "plan")
