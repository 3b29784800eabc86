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
from dass.pruning.masks import Mask
from dass.pruning.pruner import BlockPruner
from dass.training.masked import Judge, Keep

Dense = dict[tuple[nn.Module, str], Tensor]
"""Copies of whole parameters, by the module and the name there."""


def dense_weights(pruner: BlockPruner | AdaptivePruner, blocks: list[Block]) -> Dense:
    """What pruning is about to change."""
    return {(p.module, p.parameter_name): p.parameter.clone() for block in blocks for p in pruner.projections(block)}


@torch.no_grad()
def put_back(dense: Dense, keep: Keep) -> None:
    """Give the pruned weights their dense values again, for masks to hide."""
    for (module, name), before in dense.items():
        weight = module.get_parameter(name)
        weight.copy_(torch.where(keep[module, name], weight, before))


def judged(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor],
    choose: Callable[[PreTrainedModel], Mapping[str, Mask]],
    losses: Callable[[PreTrainedModel], list[float]],
) -> Judge:
    """Judge a model in training by its loss, and its mask by what the method would choose now.

    The method is applied anew to the trained kept weights and the dense values of the pruned ones, which training does
    not reach, as it was to the dense model; to zeros no criterion would give a chance.

    Args:
        model: its weights, not adapters, will be trained.
        masks: under which it is, bool, by projection.
        choose: prunes a model by the method, see `prune_model`.
        losses: gives the mean token loss of each held-out window.

    Returns:
        A judge that gives `loss` and its `windows`; `overlap`, `jaccard` of the new mask with the one at the start; and
        `exchanged`, the loss with the new mask (and the method's update) in its place, with its `exchanged_windows`.
    """
    other = copy.deepcopy(model)

    def judge(step: int) -> dict[str, Any]:
        for name, weight in model.named_parameters():  # what the masks hide, too
            other.get_parameter(name.replace("parametrizations.", "").removesuffix(".original")).copy_(weight)
        found = choose(other)
        now, then = losses(model), losses(other)
        return {
            "loss": sum(now) / len(now),
            "windows": now,
            "overlap": jaccard(list(masks.values()), [found[name].keep for name in masks]),
            "exchanged": sum(then) / len(then),
            "exchanged_windows": then,
        }

    return judge
