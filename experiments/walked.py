"""The stage of pruning: the walk over the blocks, and what it leaves behind."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from dass.audit import as_dict, audit
from dass.distributed import everyone, first, gathered, rank, world
from dass.errors import DassError, told
from dass.memory import note_halved
from dass.models import batch_size_for
from dass.progress import progress, say
from dass.pruning.blocks import Block, resident
from dass.pruning.comparison import SHARE, BlockDiagnostics, compare_block, comparison_needs
from dass.pruning.layout import find_blocks
from dass.pruning.pruner import Pruned
from dass.pruning.update import UPDATES
from dass.pruning.walk import Step, walk
from dass.resume import Kept
from dass.saving import rounding
from dass.sparsity import PackedMasks, sparsity_report
from dass.streaming import Shelf, block_path
from experiments.resolve import Plan

Log = Callable[[dict[str, float]], None]
"""Told of each finished block."""


@dataclass
class Walked:
    """What a walk over all blocks leaves behind."""

    projections: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each the pattern, axis, damping
    rare: dict[str, int] = field(default_factory=dict)  # experts that saw too few tokens: how many they saw
    measured: list[BlockDiagnostics] = field(default_factory=list)  # of each block, where methods are compared
    masks: PackedMasks = field(default_factory=PackedMasks)  # where they are needed later
    batch_size: int = 1  # sequences per forward
    halved: int | None = None  # what is left of it, where the memory of the device did not suffice
    hessians: str | None = None  # how their products were made

    def resolved(self) -> dict[str, Any]:
        """What the config left open, or the memory decided, as a record holds it."""
        found: dict[str, Any] = {"batch_size": self.halved or self.batch_size}
        if self.hessians is not None:
            found["hessians"] = self.hessians
        return found | ({"halved_from": {"pruning": self.batch_size}} if self.halved else {})


def counted(plan: Plan, model: PreTrainedModel, shelf: Shelf | None, walked: Walked) -> dict[str, Any]:
    """The sparsity of the model, with what each projection went through."""
    blocks = find_blocks(model, plan.config.model.projections) if plan.pruners or shelf is not None else []
    pruners = [] if plan.compares else list(plan.pruners.values())
    targeted = [p for pruner in pruners for block in blocks for p in pruner.projections(block)]
    sparsity = sparsity_report(model, blocks, targeted, resident if shelf is None else shelf.hold)
    for name, facts in walked.projections.items():
        sparsity["projections"][name] |= facts
    return sparsity


def audited(plan: Plan, model: PreTrainedModel, shelf: Shelf | None) -> dict[str, Any] | None:
    """What hardware can make of the model, as it will be stored; None of a dense model whose blocks are not found."""
    try:
        blocks = find_blocks(model, plan.config.model.projections)
    except DassError:
        return None
    return as_dict(audit(model, blocks, plan.stored, resident if shelf is None else shelf.hold))


@torch.no_grad()
def prune(
    plan: Plan, model: PreTrainedModel, shelf: Shelf | None, kept: Kept, calibration: torch.Tensor | None, log: Log
) -> Walked:
    """Prune the model in place, or on its shelf, from where an earlier run was killed; or compare methods."""
    config = plan.config
    pruners = [pruner.storing(plan.stored) for pruner in plan.pruners.values()]
    blocks = find_blocks(model, config.model.projections)
    plan.check_blocks(blocks)
    if config.calibration.min_expert_tokens is not None and not any(u.routed for block in blocks for u in block.units):
        print("note: calibration.min_expert_tokens has no effect: the model has no experts", file=sys.stderr)
    size = config.batch_size or (batch_size_for(model, calibration.shape[1]) if calibration is not None else 1)
    if any(UPDATES.find(pruner.method.update).whole for pruner in pruners):
        size = 1  # each batch is a step of the training
    if plan.compares and calibration is not None:  # the share that MLPs are watched on ends where a batch does
        size = math.gcd(size, len(range(rank(), math.ceil(SHARE * len(calibration)), world())))
    walked = Walked(batch_size=size)
    needs = partial(comparison_needs, plan.compared) if plan.compares else pruners[0].needs
    start = _goes_on(walked, blocks, shelf, kept, plan.keeps_masks)
    bar = progress(None, "pruning", "block", len(blocks))
    bar.update(start[0])
    stored = rounding(model, str(plan.stored).removeprefix("torch."))
    # what is trained on is rounded at the end alone, also where a killed run goes on
    writes = (lambda name, tensor: tensor) if config.finetune.steps else stored

    def done(index: int, batches: Iterable[torch.Tensor]) -> None:
        if plan.compares or not first(kept.is_due):
            return
        if shelf is not None:
            shelf.settle()
        if rank() == 0:
            kept.keep(index, blocks, partial(_tensors, walked, batches), partial(_facts, walked), writes)
        else:
            gathered(batches)

    def halved(size: int) -> None:
        note_halved(size)
        walked.halved = size

    before = time.perf_counter()
    rare, projections = config.calibration.min_expert_tokens, config.model.projections
    one_by_one = shelf is not None and shelf.by_expert
    fixed = all(pruner.targets == "mlp" for pruner in plan.pruners.values())
    hold = resident if shelf is None else shelf.hold if plan.compares else partial(shelf.change, stored=stored)
    steps = walk(model, calibration, needs, size, rare, projections, hold, start, done, kept.folder, halved, fixed)
    for step in steps:
        counts: list[tuple[int, int]] = []
        if plan.compares:
            walked.measured.append(compare_block(plan.compared, step.block, step.streams, step.outputs, step.rare))
        for part in step.block.parts() if one_by_one else [step.block]:
            pruned = [] if plan.compares else pruners[0].prune(part, step.streams, step.outputs)
            counts.append(note(walked, step, pruned, pruners[0].method.order, plan.keeps_masks))
            del pruned  # with its masks
        step.streams.clear()  # or it would be there beside that of the next block
        zeros, weights = map(sum, zip(*counts, strict=True))
        sparsity = zeros / max(weights, 1)
        before, seconds = time.perf_counter(), time.perf_counter() - before
        log({"block": step.index, "block/seconds": seconds, "block/sparsity": sparsity})
        say(bar, f"{step.block.name}: {seconds:.1f} s, sparsity {sparsity:.4f}")
        bar.update()
    bar.close()
    if shelf is not None:
        shelf.settle()
    walked.halved = min((size for size in everyone(walked.halved) if size is not None), default=None)
    if walked.rare:
        print(
            f"note: {len(walked.rare)} experts saw too few calibration tokens, the fewest {min(walked.rare.values())}: "
            f"each was judged by all tokens of its block instead, as the record says",
            file=sys.stderr,
        )
    return walked


def _facts(walked: Walked) -> dict[str, Any]:
    """What a run that goes on must know of the blocks that are finished, beside tensors."""
    facts = {name: getattr(walked, name) for name in ("batch_size", "halved", "hessians", "projections", "rare")}
    return facts | {"masks": walked.masks.about}


def _tensors(walked: Walked, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the same: what enters the next block, and masks."""
    of_all = enumerate(gathered(batches))
    found = {f"batch {i} of {number}": batch for number, own in of_all for i, batch in enumerate(own)}
    return found | {f"mask {name}": bits for name, bits in walked.masks.bits.items()}


def _goes_on(
    walked: Walked, blocks: list[Block], shelf: Shelf | None, kept: Kept, keeps_masks: bool
) -> tuple[int, list[torch.Tensor]]:
    """Bring back what an earlier run has finished; returns the index of the next block, and what enters it.

    DassError where it is whole by its checksums, and yet cannot be used.
    """
    broken = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError)
    with told(f"What an earlier run left in {kept.folder} cannot be gone on with", "remove it", *broken):
        return _restored(walked, blocks, shelf, kept, keeps_masks)


def _restored(
    walked: Walked, blocks: list[Block], shelf: Shelf | None, kept: Kept, keeps_masks: bool
) -> tuple[int, list[torch.Tensor]]:
    facts = {} if kept.state is None else kept.state.facts
    lacks_masks = keeps_masks and facts.get("masks", {}).keys() != facts.get("projections", {}).keys()
    if kept.state is not None and (facts["batch_size"] != walked.batch_size or lacks_masks):
        print("note: an earlier run was stopped, but with another batch_size or no masks: begins anew", file=sys.stderr)
        kept.forget()
    if (state := kept.state) is None:
        return 0, []
    if state.next > len(blocks):
        raise ValueError(f"it speaks of {state.next} blocks")
    tensors = kept.tensors(state)
    walked.projections, walked.rare, walked.masks.about = facts["projections"], facts["rare"], facts["masks"]
    walked.halved, walked.hessians = facts["halved"], facts["hessians"]
    walked.masks.bits = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("mask ")}
    for block in blocks[: state.next]:
        if shelf is None:
            kept.restore(block)
        else:
            shelf.adopt(block, block_path(kept.folder, block))
    print(f"note: goes on behind block {state.next} of {len(blocks)}, where it was stopped", file=sys.stderr)
    count = sum(name.startswith("batch ") and name.endswith(f" of {rank()}") for name in tensors)
    return state.next, [tensors[f"batch {i} of {rank()}"] for i in range(count)]


def note(walked: Walked, step: Step, pruned: list[Pruned], order: str, keep_masks: bool) -> tuple[int, int]:
    """Keep what is to be known of a finished block, or part of one; returns how many of how many weights are zero."""
    walked.rare |= step.rare
    walked.hessians = next((s.products for s in step.streams.values() if s.with_hessian), walked.hessians)
    for one in pruned:
        mask, name = one.mask, one.projection.name
        walked.projections[name] = {"pattern": str(mask.pattern), "axis": mask.axis}
        if mask.order is not None:
            walked.projections[name]["order"] = order
        if one.chosen is not None:
            walked.projections[name]["chosen"] = one.chosen
        if one.mlp_error is not None:
            walked.projections[name] |= dict(zip(("mlp_error_before", "mlp_error_after"), one.mlp_error, strict=True))
        if one.damping is not None:
            walked.projections[name] |= {"damping": one.damping, "damping_attempts": one.damping_attempts}
        if keep_masks:
            walked.masks.add(name, mask)
    kept = sum((one.mask.keep.sum() for one in pruned), torch.tensor(0))  # the host waits for the device once
    weights = sum(one.mask.keep.numel() for one in pruned)
    return weights - int(kept), weights
