"""Weights as torch's semi-structured tensors, which sparse tensor cores multiply by; and never a mask that they break.

torch's packers take any matrix and keep 2 of 4 along the inputs, of fp32 1 of 2: of DaSS's gate and up, 2:4 along the
outputs, they drop 3/16 of the kept weights without a word, and of any 2:4 in fp32 a sixth. Each is looked at first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dass.audit import ACCELERATED, KERNELS, audit_matrix, audited, executed, kernels_for, obeys
from dass.errors import DassError
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM

REMEDY = {
    NM(2, 4): "prune it along in or both, or keep it dense",
    NM(1, 2): "store it in 16 bits, of which it executes 2:4, or keep it dense",
}


def require_executable(weight: Tensor, name: str = "a layer", kernel: str | None = None) -> None:
    """Raise DassError unless a sparse tensor core executes this matrix `(out_features, in_features)` as it is.

    Args:
        kernel: that of `KERNELS` which is to take its shape and dtype; None: any of them.
    """
    kept, pattern, dtype = weight != 0, executed(weight.dtype), str(weight.dtype).removeprefix("torch.")
    if not obeys(kept, pattern):
        drops, inputs = "", weight.shape[1]
        if inputs % pattern.m == 0:
            groups = kept.unflatten(1, (-1, pattern.m)).sum(2)
            lost = (groups - pattern.n).clamp_min(0).sum() / groups.sum()
            drops = f", of which it would drop {lost:.1%} without a word"
        raise DassError(
            f"{name} is not {pattern} along its {inputs} inputs, and a sparse tensor core cannot execute its weights in"
            f" {dtype}{drops}: {REMEDY[pattern]}."
        )
    found = kernels_for((weight.shape[0], weight.shape[1]), weight.dtype)
    if not found or (kernel is not None and kernel not in found):
        raise DassError(
            f"{name} {tuple(weight.shape)} in {dtype} fits no kernel of "
            f"{kernel or ' or '.join(KERNELS)}: keep it dense."
        )


def semi_structured(weight: Tensor, kernel: str | None = None, name: str = "a layer") -> Tensor:
    """A matrix on a GPU as a semi-structured tensor for `nn.functional.linear`.

    Args:
        kernel: one of `KERNELS`; None: the first that takes it and that this torch was built with.

    Raises:
        DassError: as `require_executable`.
    """
    require_executable(weight, name, kernel)
    if kernel is None:
        fitting = kernels_for((weight.shape[0], weight.shape[1]), weight.dtype)
        there = [one for one in fitting if one != "cuSPARSELt" or torch.backends.cusparselt.is_available()]
        kernel = (there or fitting)[0]
    return KERNELS[kernel].from_dense(weight.contiguous())


def speed_up(model: nn.Module, projections: Mapping[str, str] | None = None) -> list[str]:
    """Put semi-structured tensors in the place of the linear layers that the audit calls accelerated; their names.

    A layer that is gate and up at once must be so as a whole. torch has no such product for experts of three
    dimensions, nor for GPT-2's transposed layers, which stay as they are.

    Args:
        projections: see `find_blocks`.

    Raises:
        DassError: the model is not on a GPU.
    """
    if next(model.parameters()).device.type != "cuda":
        raise DassError("Semi-structured tensors need a GPU: load the packed model without them.", field="device")
    names, layers = [], {p.module for block in find_blocks(model, projections) for p in audited(block)}
    for name, layer in model.named_modules():
        if layer in layers and isinstance(layer, nn.Linear) and audit_matrix(layer.weight).status == ACCELERATED:
            layer.weight = nn.Parameter(semi_structured(layer.weight.detach(), name=name), requires_grad=False)
            names.append(name)
    return names
