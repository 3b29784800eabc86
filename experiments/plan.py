"""What pruning a model would take, from its config alone: parameters, share removed, operations, memory, time.

python -m experiments.plan model=llama2_7b device=h100
python -m experiments.plan model=llama31_405b device=h200 sparsity=unstructured
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from dass.errors import DassError
from dass.models import load_config, require_supported
from dass.names import unknown
from dass.planning.architecture import Architecture, config_from, read_architecture
from dass.planning.costs import (
    Workload,
    plan_evaluation,
    plan_load,
    plan_pruning,
    share_removed,
    targeted_weights,
    weights_held,
)
from dass.planning.devices import DEVICES, Device, Stage
from dass.planning.experts import expert_tokens
from dass.pruning.pruner import BlockPruner
from experiments.app import run_app
from experiments.fingerprint import source_of
from experiments.methods import compared
from experiments.schema import CalibrationConfig, EvaluationConfig, ModelConfig, PruneConfig, SparsityConfig

COUNTS = (1, 8)  # of devices
METHODS = ("magnitude", "wanda", "sparsegpt", "dass")
WIKITEXT2_TOKENS = 341_469  # of its test split by LLaMA-2's tokenizer: 166 windows of 2048; others give other numbers


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
    memory: str = "resident"
    efficiency: float | None = None
    launch_us: float | None = None
    disk_gb_s: float | None = None
    debug: bool = False


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def main(config: DictConfig) -> None:
    """Print the plan of a composed config; DassError where a value or combination means nothing."""
    typed: PlanConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    if typed.device not in DEVICES:
        raise unknown("The device", typed.device, DEVICES, "device")
    given = {name: getattr(typed, name) for name in ("efficiency", "launch_us", "disk_gb_s")}
    device = replace(DEVICES[typed.device], **{name: value for name, value in given.items() if value is not None})
    pruners = compared(PruneConfig(sparsity=typed.sparsity, targets=typed.targets), METHODS)
    calibration = typed.calibration
    if calibration.n_sequences is None or calibration.seq_len is None:
        raise DassError(
            f"calibration={calibration.name} does not say how much it reads: give `calibration.n_sequences` and "
            f"`calibration.seq_len`."
        )
    if typed.memory not in ("resident", "stream"):
        raise DassError(f"memory={typed.memory} is unknown here: choose resident or stream.", "memory")
    streams = typed.memory == "stream"
    windows = evaluation_size(typed.evaluation)
    model = read_architecture(transformers_config(typed.model), typed.model.projections)
    work = Workload(typed.dtype, calibration.n_sequences, calibration.seq_len, typed.batch_size, streams)
    work = replace(work, by_expert=model.in_experts > 0 and model.streamed * work.bytes_each > device.memory_gb * 1e9)

    shared = shared_stages(model, work, windows)
    stages = [stage_row("each", stage.name, [stage], device, work) for stage in shared]
    for name, pruner in pruners.items():
        own = plan_pruning(model, pruner, work)
        stages += [stage_row(name, stage.name, [stage], device, work) for stage in own]
        stages.append(stage_row(name, "whole run", [*shared, *own], device, work))

    print(f"# {typed.model.name}, {typed.dtype}, on {device.name}: an estimate\n")
    tables = [parameter_rows(model), removal_rows(model, pruners["wanda"]), stages]
    tables.append([count_row(model, name, pruner, device, work, windows) for name, pruner in pruners.items()])
    least = calibration.min_expert_tokens
    tables.append([row for name, pruner in pruners.items() if (row := expert_row(model, name, pruner, work, least))])
    for rows in filter(None, tables):
        aligned = ["left" if key in ("Method", "Stage") or not i else "right" for i, key in enumerate(rows[0])]
        print(tabulate(rows, "keys", "pipe", disable_numparse=True, colalign=aligned), "\n")
    print("\n".join(f"- {note}" for note in notes(model, device, work, typed.evaluation, windows)))


def shared_stages(model: Architecture, work: Workload, windows: tuple[int, int] | None) -> list[Stage]:
    """Those of every method."""
    return [plan_load(model, work)] + ([plan_evaluation(model, work, *windows)] if windows is not None else [])


def transformers_config(model: ModelConfig) -> Any:
    """The transformers config of `model.architecture`, else that of the model's folder or hub page."""
    if model.name == "local" and model.path is None and not model.architecture:
        raise DassError("model=local needs a folder: give `model.path=DIR`.", field="model.path")
    config = config_from(model.architecture) if model.architecture else load_config(source_of(model), model.revision)
    require_supported(config)
    return config


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


def parameter_rows(model: Architecture) -> list[dict[str, str]]:
    """Parameters by role."""
    counts = model.parameters | {"all": model.total}
    return [{"Role": role, "Parameters": f"{n:,}", "Share": f"{n / model.total:.1%}"} for role, n in counts.items()]


def removal_rows(model: Architecture, pruner: BlockPruner) -> list[dict[str, str]]:
    """What the pattern removes of the targeted weights, of the linear layers', of all parameters."""
    targeted, pattern = targeted_weights(model, pruner), pruner.method.pattern
    removed, title = share_removed(pattern) * targeted, f"{pattern} on {pruner.targets} removes"
    wholes = {"targeted": targeted, "linear layers but the head": model.linear, "all": model.total}
    return [{title: of, "Weights": f"{n:,}", "Share removed": f"{removed / n:.1%}"} for of, n in wholes.items()]


def stage_row(method: str, name: str, stages: list[Stage], device: Device, work: Workload) -> dict[str, str]:
    """What some stages take, one after the other."""
    flops, seconds = sum(stage.flops for stage in stages), sum(stage.seconds(device, work.dtype) for stage in stages)
    peak = max(stage.peak_bytes for stage in stages) / 1e9
    count = math.ceil(peak / device.memory_gb)
    return {
        "Method": method,
        "Stage": name,
        "Operations": f"{flops / 1e12:,.3g} TFLOP" if flops < 1e15 else f"{flops / 1e15:,.1f} PFLOP",
        "Memory traffic": f"{sum(stage.moved_bytes for stage in stages) / 1e9:,.0f} GB",
        "Time": time_words(seconds),
        "Peak memory": f"{peak:,.1f} GB",
        "Fits": "yes" if count == 1 else f"no: {count} x {device.name}" + " or memory=stream" * (not work.streams),
    }


def time_words(seconds: float) -> str:
    """In the unit that suits."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_row(
    model: Architecture,
    name: str,
    pruner: BlockPruner,
    device: Device,
    work: Workload,
    windows: tuple[int, int] | None,
) -> dict[str, str]:
    """A whole run: its memory whole and streamed, and its time on one device and on several."""

    def staged(streams: bool, by_expert: bool = False) -> tuple[list[Stage], float]:
        own = replace(work, streams=streams, by_expert=by_expert)
        stages = [*shared_stages(model, own, windows), *plan_pruning(model, pruner, own)]
        return stages, max(stage.peak_bytes for stage in stages) / 1e9

    whole, peak = staged(False)
    streamed, least = staged(True, work.by_expert)
    if least > device.memory_gb and model.in_experts and not work.by_expert:  # by what is known of them all
        streamed, least = staged(True, True)
    row = {"Method": name, "Memory": f"{peak:,.1f} GB", "Streamed": f"{least:,.1f} GB"}
    for count in COUNTS:
        fits = peak <= count * device.memory_gb
        seconds = sum(stage.shared(count).seconds(device, work.dtype) for stage in (whole if fits else streamed))
        words = time_words(seconds) + ("" if fits else " (streamed)")
        row[f"{count} x {device.name}"] = words if fits or least <= device.memory_gb else "does not fit"
    return row


def expert_row(
    model: Architecture, name: str, pruner: BlockPruner, work: Workload, least: int | None
) -> dict[str, str] | None:
    """What a method needs of each expert; None where there is nothing to need. `least`: min_expert_tokens."""
    found = expert_tokens(model, pruner, work, least)
    if found is None:
        return None
    return {
        "Method": name,
        "Tokens of an expert": f"{found.expected:,.0f}",
        "Needed": f"{found.needed:,}",
        "Falls back below": f"{found.share:.1%} of an even share",
        "Enough at a tenth of it": f"{found.enough(work, 0.1):,} calibration tokens",
        "Each that falls back": f"{found.fallback_flops / 1e12:,.3g} TFLOP",
    }


def notes(
    model: Architecture, device: Device, work: Workload, evaluation: EvaluationConfig, windows: tuple[int, int] | None
) -> list[str]:
    """What the numbers rest on."""
    reached = device.efficiency
    found = [
        f"Times are estimates, none is measured: each is the largest of operations / ({reached:g} x peak), traffic / "
        f"({reached:g} x {device.bandwidth_gb_s:g} GB/s), small operations in a chain x {device.launch_us:g} µs, "
        f"weights from disk at {device.disk_gb_s:g} GB/s; and the traffic between products is added. Peaks: "
        f"{device.tflops_16bit:g} TFLOP/s in 16 bits, {device.tflops_fp32:g} in fp32, in which the solver is, and "
        "statistics of fp32 activations (those of 16 bits are multiplied in 16 bits and summed in fp32). Tokenising is "
        "left out.",
        f"Memory is that of {work.batch_size} sequence(s) per forward, without the allocator's waste; GB are 10^9 "
        "bytes.",
        f"Reading all blocks takes {model.in_blocks * work.bytes_each / device.disk_gb_s / 1e9:.3g} s, each while the "
        "one before is worked on: a stage takes as long as the slower of the two." + by_expert_words(model, work)
        if work.streams
        else f"The walk is taken to hold the whole model on one device; memory=stream holds two blocks of it at most, "
        f"{'their experts one by one, ' * work.by_expert}with embedding and head "
        f"{weights_held(model, replace(work, streams=True)) / 1e9:,.1f} GB of weights.",
        f"{COUNTS[-1]} devices: at best, with sequences and matrices divided evenly among them and one disk; a run of "
        "this repository uses one.",
        f"Calibration: {work.n_sequences} x {work.seq_len} tokens.",
    ]
    if windows is not None:
        guess = f", if the tokenizer makes {WIKITEXT2_TOKENS:,} tokens of WikiText-2's test split, as LLaMA-2's does"
        known = evaluation.n_windows is not None
        found.append(f"Evaluation: {windows[0]} windows of {windows[1]} tokens{'' if known else guess}.")
    if model.active_experts is not None:
        found.append(
            f"Experts are counted as if routers were even, {model.active_experts} per token; that experts which see "
            "too few tokens are run on all of them once more is not counted: the last table says when that is and what "
            "it takes; routers are not even, and an expert with a tenth of an even share is no rare thing."
        )
    return found


def by_expert_words(model: Architecture, work: Workload) -> str:
    """What streaming expert by expert takes; nothing where blocks fit."""
    if not work.by_expert:
        return ""
    blocks, experts = (count * work.bytes_each / 1e9 for count in (model.streamed, model.by_expert))
    return (
        f" Two blocks do not fit, with embedding and head {blocks:,.1f} GB of weights: their experts come one by one, "
        f"{experts:,.1f} GB of weights at a time, and are read in each of {work.passes} forwards: a larger batch_size "
        "reads less. The statistics of all experts of a block are held at once."
    )


if __name__ == "__main__":
    run_app(main, "plan")
