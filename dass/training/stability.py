"""Whether the weights that a criterion has chosen stay the right ones while the kept ones are trained."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import Block
from dass.pruning.comparison import jaccard
from dass.pruning.layout import find_blocks
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from dass.training.masked import Judge, Keep

Dense = dict[tuple[nn.Module, str], Tensor]
"""Copies of whole parameters, by the module and the name there."""


def dense_weights(pruner: BlockPruner | AdaptivePruner, blocks: list[Block]) -> Dense:
    """What pruning is about to change."""
    return {(p.module, p.parameter_name): p.parameter.clone() for block in blocks for p in pruner.projections(block)}


@torch.no_grad()
def put_back(dense: Dense) -> Keep:
    """Give the pruned weights their dense values again, for masks to hide; the masks, by parameter."""
    keep = {}
    for (module, name), before in dense.items():
        weight = module.get_parameter(name)
        keep[module, name] = weight != 0
        weight.copy_(torch.where(weight != 0, weight, before))
    return keep


def judged(
    model: PreTrainedModel,
    pruner: BlockPruner | AdaptivePruner,
    calibration: Tensor | None,
    losses: Callable[[PreTrainedModel], list[float]],
    projections: Mapping[str, str] | None = None,
) -> Judge:
    """Judge a model in training by its loss, and its mask by what the method would choose now.

    The method is applied anew to the trained kept weights and the dense values of the pruned ones, which training does
    not reach, as it was to the dense model; to zeros no criterion would give a chance.

    Args:
        model: pruned, with nothing but zeros where it is; its weights, not adapters, will be trained.
        losses: gives the mean token loss of each held-out window.
        projections: a regular expression for each role, where the layout is not known.

    Returns:
        A judge that gives `loss` and its `windows`; `overlap`, `jaccard` of the new mask with the one at the start; and
        `exchanged`, the loss with the new mask (and the method's update) in its place, with its `exchanged_windows`.
    """
    fixed = {p.name: p.weight != 0 for block in find_blocks(model, projections) for p in pruner.projections(block)}
    other = copy.deepcopy(model)

    def judge(step: int) -> dict[str, Any]:
        for name, weight in model.named_parameters():  # what the masks hide, too
            other.get_parameter(name.replace("parametrizations.", "").removesuffix(".original")).copy_(weight)
        masks: Mapping[str, Any] = prune_model(other, pruner, calibration, projections=projections)
        now, then = losses(model), losses(other)
        return {
            "loss": sum(now) / len(now),
            "windows": now,
            "overlap": jaccard(list(fixed.values()), [masks[name].keep for name in fixed]),
            "exchanged": sum(then) / len(then),
            "exchanged_windows": then,
        }

    return judge
