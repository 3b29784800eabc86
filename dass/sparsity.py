"""What share of the weights is zero, and masks as files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dass.errors import DassError, told
from dass.pruning.blocks import Block, Projection, mlp_matrices
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Mask, Unstructured, verify_mask
from dass.records import write_atomically

MASKS_FILE = "masks.safetensors"


def sparsity_report(model: nn.Module, blocks: list[Block], targeted: list[Projection]) -> dict[str, Any]:
    """Zeros counted in the weights themselves: per targeted projection, and in sum.

    Returns:
        `projections`: by name, `role`, `weights`, `zeros`, `sparsity`; and the share of zeros in the targeted
        projections (`targeted`), in all MLPs of the blocks (`mlp`), in all linear layers and experts but the head
        (`linear`), in all parameters (`total`).
    """
    wholes = {
        "targeted": [p.weight for p in targeted],
        "mlp": mlp_matrices(blocks),
        "linear": linear_weights(model),
        "total": list(model.parameters()),
    }
    return {
        "projections": {p.name: {"role": p.role, **_zeros([p.weight])} for p in targeted},
        **{name: _zeros(weights)["sparsity"] for name, weights in wholes.items()},
    }


def linear_weights(model: nn.Module) -> list[Tensor]:
    """The weights of all linear layers and experts, wherever they are; not the embeddings, nor the head."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    return [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not get_head()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and not name.endswith("bias")
    ]


def _zeros(matrices: list[Tensor]) -> dict[str, Any]:
    weights = sum(matrix.numel() for matrix in matrices)
    zeros = weights - sum(int(torch.count_nonzero(matrix)) for matrix in matrices)
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights if weights else 0.0}


class PackedMasks:
    """Masks of a whole model, a bit per weight, on the host."""

    def __init__(self) -> None:
        """Start empty."""
        self.bits: dict[str, Tensor] = {}
        self.about: dict[str, dict[str, Any]] = {}

    def add(self, name: str, mask: Mask) -> None:
        """Pack the mask of the projection `name`."""
        self.bits[name] = torch.from_numpy(np.packbits(mask.keep.cpu().numpy(), axis=None))
        self.about[name] = {
            "shape": list(mask.keep.shape),
            "axis": mask.axis,
            "pattern": asdict(mask.pattern),
            "column_block": mask.column_block,
        }

    def write(self, folder: Path, provenance: dict[str, Any]) -> Path:
        """Write `folder/masks.safetensors` atomically.

        Args:
            provenance: where the masks come from (run id, config, versions); kept in the file's header.
        """
        metadata = {"provenance": json.dumps(provenance), "masks": json.dumps(self.about)}
        path = folder / MASKS_FILE
        write_atomically(path, save(self.bits, metadata))
        return path


def read_masks(folder: Path) -> tuple[dict[str, Mask], dict[str, Any]]:
    """The masks of `folder/masks.safetensors` by projection, verified, and their provenance.

    Raises:
        DassError: no such file, not such a file, or a mask that breaks its own pattern.
    """
    path, masks = folder / MASKS_FILE, {}
    kinds = (OSError, SafetensorError, KeyError, TypeError, ValueError)
    with (
        told(f"{path} is not a file of masks", "write one with `masks=DIR`", *kinds),
        safe_open(path, framework="np") as file,
    ):
        metadata = file.metadata()
        provenance, about = json.loads(metadata["provenance"]), json.loads(metadata["masks"])
        for name, facts in about.items():
            rows, columns = facts["shape"]
            bits = np.unpackbits(file.get_tensor(name), count=rows * columns).reshape(rows, columns)
            pattern = (Unstructured if "ratio" in facts["pattern"] else NM)(**facts["pattern"])
            masks[name] = Mask(torch.from_numpy(bits.astype(bool)), pattern, facts["axis"], facts["column_block"])
    for name, mask in masks.items():
        verify_mask(mask, name)
    return masks, provenance


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Mask], projections: Mapping[str, str] | None = None) -> None:
    """Set the weights that the masks prune to zero, in place.

    Args:
        projections: see `find_blocks`.

    Raises:
        DassError: a mask has no projection of its name and shape in this model.
    """
    found = {p.name: p.weight for block in find_blocks(model, projections) for p in block.projections}
    for name, mask in masks.items():
        if name not in found or found[name].shape != mask.keep.shape:
            raise DassError(f"The mask {name} {tuple(mask.keep.shape)} fits no projection of this model: load its own.")
    for name, mask in masks.items():
        found[name].masked_fill_(~mask.keep.to(found[name].device), 0)
