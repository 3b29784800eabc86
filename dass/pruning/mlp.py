"""The MLPs of a block, trained on the calibration inputs to give what they gave when they were dense."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dass.distributed import world
from dass.errors import DassError
from dass.pruning.blocks import Block, Projection, kept_of_parameters
from dass.pruning.outputs import Outputs, added, squared_error
from dass.pruning.statistics import Streams
from dass.pruning.update import UPDATES, update

if TYPE_CHECKING:
    from dass.pruning.method import Method
    from dass.pruning.pruner import Pruned

HELD_OUT = 0.25
"""Of the sequences, the first ones: on them it is judged whether training still helps."""
PATIENCE = 2
"""Epochs in a row without an improvement there, after which it ends."""


@dataclass(frozen=True)
class Reference:
    """What a block gave, and how to see what it gives now."""

    block: Block
    outputs: Outputs
    dense: list[Tensor]
    """Its outputs, batch by batch, with dense weights."""
    held_out: list[Tensor]
    """The same of the sequences that nothing is trained on."""
    first: int
    """How many sequences these are."""
    count: int
    """And with those that are trained on."""
    stored: torch.dtype
    """What the weights will be rounded to."""
    scale: float
    """||Y||^2 of what the MLPs added to the output of the block, on the sequences that are held out."""

    @property
    def error(self) -> float:
        """||Y' - Y||^2 / ||Y||^2 of the MLPs with the weights as they are, on the sequences that are held out."""
        return squared_error(self.held_out, self.outputs(sequences=range(self.first))) / self.scale


def reconstructed(
    method: "Method",
    stored: torch.dtype | None,
    block: Block,
    streams: Streams,
    outputs: Outputs | None,
    prune: Callable[[Block, Streams, Outputs], list["Pruned"]],
) -> list["Pruned"]:
    """Prune a block, then let the method's update work on its MLPs as a whole.

    Args:
        stored: what the weights will be rounded to; None: to the model's dtype.

    Raises:
        DassError: what `prune` raises, or no outputs to look at.
    """
    update = UPDATES.find(method.update)
    parameters = method.parameters_of(update)
    count = min(int(parameters["sequences"]), max((stream.n_sequences for stream in streams.values()), default=0))
    if outputs is None or not count:
        raise DassError(f"The update {method.update} needs the outputs of {block.name}: walk over the blocks.")
    if world() > 1:  # each would train on other sequences, and none on all
        raise DassError(f"The update {method.update} is for one process, not {world()}: start one.", "method.update")
    stored = stored or block.units[0].projections["down"].weight.dtype
    with in_fp32(block):
        dense = reference(block, outputs, count, stored)
        pruned = prune(block, streams, outputs)
        kept = [(one.projection, one.mask.keep) for one in pruned if block.unit_of(one.projection) is not None]
        before = dense.error
        update.function(kept, dense, **parameters)
        errors, trained = (before, dense.error), {p.name for p, _ in kept}
    return [replace(one, mlp_error=errors) if one.projection.name in trained else one for one in pruned]


def reference(block: Block, outputs: Outputs, count: int, stored: torch.dtype) -> Reference:
    """Of a dense block, over the first `count` sequences; a quarter of them, and one at least, is held out."""
    first = max(1, round(HELD_OUT * count))
    held_out = list(outputs(sequences=range(first)))
    dense = list(outputs(sequences=range(first, count))) if first < count else []
    scale = added(block, held_out, lambda: outputs(sequences=range(first)))
    return Reference(block, outputs, dense, held_out, first, count, stored, scale or 1.0)


@update("input_norm", positive=("sequences", "epochs", "learning_rate"), whole=True)
def mlp(
    kept: list[tuple[Projection, Tensor]],
    dense: Reference,
    sequences: int = 16,
    epochs: int = 4,
    learning_rate: float = 0.003,
) -> None:
    """min ||Y' - Y||^2 over the kept weights of gate, up and down, Y what the dense MLPs gave (AdamW, fp32).

    A step is a batch of the walk. The rate falls to 0 along a line. What is left in the weights is what did best on
    the sequences that are held out, the weights as they were among it.

    sequences: of the calibration, the first ones; a quarter of them is held out.
    epochs: at most; fewer where two in a row did not help.
    learning_rate: of the first step.
    """
    masks = kept_of_parameters(kept)
    parameters = {place: place[0].get_parameter(place[1]) for place in masks}
    steps = epochs * len(dense.dense)
    if not steps or not parameters:
        return
    before = [p.requires_grad for p in parameters.values()]
    for p in parameters.values():
        p.requires_grad_(True)
    hooks = [p.register_hook(masks[place].mul) for place, p in parameters.items()]  # where pruned, it stays an exact 0
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    best, least, idle = _copies(parameters.values()), dense.error, 0
    try:
        for _ in range(epochs):
            with torch.enable_grad():
                outputs = dense.outputs(sequences=range(dense.first, dense.count))
                for wanted, output in zip(dense.dense, outputs, strict=True):
                    (output - wanted).square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
            exact = _copies(parameters.values())
            _put(parameters.values(), [values.to(dense.stored) for values in exact])
            error = dense.error
            best, least, idle = (_copies(parameters.values()), error, 0) if error < least else (best, least, idle + 1)
            _put(parameters.values(), exact)
            if idle == PATIENCE:
                break
    finally:
        for hook in hooks:
            hook.remove()
        for p, wanted_gradient in zip(parameters.values(), before, strict=True):
            p.requires_grad_(wanted_gradient)
        _put(parameters.values(), best)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _put(tensors: Iterable[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextmanager
def in_fp32(block: Block) -> Iterator[None]:
    """A block whose narrower weights are fp32 for a while; then they are rounded to what they were."""
    narrow = [(p, p.dtype) for p in block.module.parameters() if p.is_floating_point() and p.element_size() < 4]
    for p, _ in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in narrow:
            p.data = p.data.to(dtype)
