"""Weights as torch's semi-structured tensors, which sparse tensor cores multiply by; and never a mask that they break.

torch's packers take any matrix and keep 2 of 4 along the inputs: of DaSS's gate and up, 2:4 along the outputs, they
drop 3/16 of the kept weights without a word. Here each matrix is looked at first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dass.audit import ACCELERATED, KERNELS, audit_matrix, kernels_for
from dass.errors import DassError
from dass.pruning.layout import find_blocks


def require_executable(weight: Tensor, name: str = "a layer", kernel: str | None = None) -> None:
    """Raise DassError unless a sparse tensor core executes this matrix `(out_features, in_features)` as it is.

    Args:
        kernel: that of `KERNELS` which is to take its shape and dtype; None: any of them.
    """
    groups = (weight != 0).unflatten(1, (-1, 4)).sum(2) if weight.shape[1] % 4 == 0 else None
    if groups is None or (groups > 2).any():
        lost = None if groups is None else (groups - 2).clamp_min(0).sum() / groups.sum()
        drops = "" if lost is None else f", of which it would drop {lost:.1%} without a word"
        raise DassError(
            f"{name} is not 2:4 along its {weight.shape[1]} inputs, and a sparse tensor core cannot execute its weights"
            f"{drops}: prune it along in or both, or keep it dense."
        )
    found = kernels_for((weight.shape[0], weight.shape[1]), weight.dtype)
    if not found or (kernel is not None and kernel not in found):
        raise DassError(
            f"{name} {tuple(weight.shape)} in {str(weight.dtype).removeprefix('torch.')} fits no kernel of "
            f"{kernel or ' or '.join(KERNELS)}: keep it dense."
        )


def semi_structured(weight: Tensor, kernel: str | None = None, name: str = "a layer") -> Tensor:
    """A matrix on a GPU as a semi-structured tensor for `nn.functional.linear`.

    Args:
        kernel: one of `KERNELS`; None: torch's choice.

    Raises:
        DassError: as `require_executable`.
    """
    require_executable(weight, name, kernel)
    if kernel is None:
        return torch.sparse.to_sparse_semi_structured(weight.contiguous())
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
    names, layers = [], {p.module for block in find_blocks(model, projections) for p in block.projections}
    for name, layer in model.named_modules():
        if layer in layers and isinstance(layer, nn.Linear) and audit_matrix(layer.weight).status == ACCELERATED:
            layer.weight = nn.Parameter(semi_structured(layer.weight.detach(), name=name), requires_grad=False)
            names.append(name)
    return names
