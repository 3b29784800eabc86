"""What share of the weights is zero, and masks as files."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dass.errors import DassError, one_line, told
from dass.folders import temporary_beside
from dass.packing import decode, encode, encoded_bytes
from dass.pruning.blocks import Block, Hold, Projection, mlp_names, resident
from dass.pruning.layout import find_blocks
from dass.pruning.masks import AXES, NM, Mask, Unstructured, verify_mask
from dass.pruning.order import move, reorder
from dass.pruning.reordering import require_orders
from dass.pruning.stacks import Stack
from dass.records import write_atomically

MASKS_FILE = "masks.safetensors"
ORDER = " order"
"""Behind the name of a projection: the order of the neurons under which its mask holds."""


def sparsity_report(
    model: nn.Module, blocks: list[Block], targeted: list[Projection], hold: Hold = resident
) -> dict[str, Any]:
    """Zeros counted in the weights themselves: per targeted projection, and in sum.

    Args:
        hold: has a block in memory while it is counted.

    Returns:
        `projections`: by name, `role`, `weights`, `zeros`, `sparsity`; and the share of zeros in the targeted
        projections (`targeted`), in all MLPs of the blocks (`mlp`), in all linear layers and experts but the head
        (`linear`), in all parameters (`total`); and how many these are (`parameters`).
    """
    counted: dict[str, dict[str, Any]] = {}  # every parameter by its name
    inside = {f"{block.name}.{name}": block for block in blocks for name, _ in block.module.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in inside:
            counted[name] = _zeros(parameter)
    found: dict[str, dict[str, Any]] = {}
    for block in blocks:
        with hold(block):
            names = [name for name, _ in block.module.named_parameters()]
            counted |= {f"{block.name}.{name}": _zeros(attrgetter(name)(block.module)) for name in names}
            own = (p for p in targeted if p.name.startswith(f"{block.name}."))
            found |= {p.name: {"role": p.role, **_zeros(p.weight)} for p in own}
    wholes = {
        "targeted": [found[p.name] for p in targeted],
        "mlp": [counted[name] for name in mlp_names(blocks) if name in counted],
        "linear": [counted[name] for name in linear_names(model) if name in counted],
        "total": list(counted.values()),
    }
    return {
        "parameters": sum(one["weights"] for one in wholes["total"]),
        "projections": {p.name: found[p.name] for p in targeted},
        **{key: _share(ones) for key, ones in wholes.items()},
    }


def linear_names(model: nn.Module) -> list[str]:
    """The weights of all linear layers and experts, wherever they are; not the embeddings, nor the head."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and module is not get_head()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and not name.endswith("bias")
    ]


def _zeros(matrix: Tensor | Stack) -> dict[str, Any]:
    weights, parts = matrix.shape.numel(), [matrix] if isinstance(matrix, Tensor) else matrix
    zeros = weights - sum(int(count) for count in map(torch.count_nonzero, parts))
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights if weights else 0.0}


def _share(counted: list[dict[str, Any]]) -> float:
    """The share of zeros in several matrices together."""
    weights = sum(one["weights"] for one in counted)
    return sum(one["zeros"] for one in counted) / weights if weights else 0.0


class PackedMasks:
    """Masks of a whole model on the host: under 2:4 and the like digits of groups, see dass/packing.py, else bits."""

    def __init__(self) -> None:
        """Start empty."""
        self.bits: dict[str, Tensor] = {}
        self.about: dict[str, dict[str, Any]] = {}

    def add(self, name: str, mask: Mask) -> None:
        """Pack the mask of the projection `name`."""
        lines, groups = mask.keep.T if mask.axis == "out" else mask.keep, None
        if isinstance(mask.pattern, NM) and (lines.reshape(-1, mask.pattern.m).sum(1) == mask.pattern.n).all():
            groups = mask.pattern
        self.bits[name] = encode(mask.keep if groups is None else lines, groups)
        self.about[name] = {
            "shape": list(mask.keep.shape),
            "axis": mask.axis,
            "pattern": asdict(mask.pattern),
            "column_block": mask.column_block,
        }
        if groups is not None:
            self.about[name]["grouped"] = True
        if mask.order is not None:
            order = mask.order.cpu().to(torch.int16 if len(mask.order) < 2**15 else torch.int32)
            stored = next((key for key in reversed(self.bits) if key.endswith(ORDER)), "")
            if not stored or not torch.equal(self.bits[stored], order):  # else that of another matrix of this MLP
                stored = name + ORDER
                self.bits[stored] = order
            self.about[name]["ordered"] = stored.removesuffix(ORDER)

    def keep(self, name: str) -> Tensor:
        """Which weights of the projection `name` are kept, `(out_features, in_features)` bool."""
        facts = self.about[name]
        groups = NM(**facts["pattern"]) if facts.get("grouped") else None
        return _decoded(self.bits[name], facts["shape"], facts["axis"], groups)

    def write(self, folder: Path, provenance: dict[str, Any]) -> Path:
        """Write `folder/masks.safetensors`, whole or not at all; replaces one that we wrote and nobody changed.

        Args:
            provenance: where the masks come from (run id, config, versions); kept in the file's header.

        Raises:
            DassError: another file is there, another process writes it just now, or it cannot be written.
        """
        path, about = folder / MASKS_FILE, {"provenance": json.dumps(provenance), "masks": json.dumps(self.about)}
        content = save(self.bits, about | {"sha256": _checksum(self.bits, about)})
        with (
            told(f"Cannot write {path}", "free space or choose another folder", OSError, field="masks"),
            temporary_beside(path, wait=False) as temporary,
        ):
            require_own_masks(folder)
            write_atomically(temporary / MASKS_FILE, content)
            os.replace(temporary / MASKS_FILE, path)
        return path


def require_own_masks(folder: Path) -> None:
    """Raise DassError if `folder/masks.safetensors` is there and is not one of ours as we wrote it."""
    path = folder / MASKS_FILE
    if not os.path.lexists(path):
        return
    try:
        with _opened(path) as file:
            about = dict(file.metadata())
            seal = about.pop("sha256")
            bits = {name: torch.from_numpy(file.get_tensor(name)) for name in list(file.keys())}
        ours = not path.is_symlink() and seal == _checksum(bits, about)
    except Exception:  # a foreign file may be anything
        ours = False
    if not ours:
        raise DassError(
            f"{path} would be replaced, but it is not one that this project wrote, or was changed since: choose "
            f"another folder, or remove it yourself."
        )


def read_masks(folder: Path) -> tuple[dict[str, Mask], dict[str, Any]]:
    """The masks of `folder/masks.safetensors` by projection, verified, and their provenance.

    Raises:
        DassError: no such file, not such a file, or a mask that breaks its own pattern.
    """
    path, masks = folder / MASKS_FILE, {}
    # a foreign file may make the readers raise anything
    with told(f"{path} is not a file of masks", "write one with `masks=DIR`", Exception), _opened(path) as file:
        metadata = file.metadata()
        provenance, about = json.loads(metadata["provenance"]), json.loads(metadata["masks"])
        orders = {_order_key(name, facts["ordered"]) for name, facts in about.items() if facts.get("ordered")}
        if not isinstance(provenance, dict) or set(about) | orders != set(file.keys()):
            raise ValueError("its header does not describe what it holds")
        for name, facts in about.items():
            masks[name] = _unpacked(file, name, **facts)
            verify_mask(masks[name], one_line(name))
    return masks, provenance


def _unpacked(
    file: Any,
    name: str,
    shape: list[int],
    axis: Any,
    pattern: dict[str, Any],
    column_block: int | None,
    ordered: bool | str = False,
    grouped: bool = False,
) -> Mask:
    """One mask of a file; an error of any kind if it is none."""
    packed = file.get_slice(name)  # nothing is read yet
    sizes = [*shape, *([] if column_block is None else [column_block])]
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in sizes) or axis not in AXES:
        raise ValueError(f"{one_line(name)} has no such shape, axis or block of columns")
    kept = (Unstructured if "ratio" in pattern else NM)(**pattern)
    groups = kept if grouped is True and isinstance(kept, NM) and column_block is None else None
    if packed.get_dtype() != "U8" or list(packed.get_shape()) != [encoded_bytes(shape[0] * shape[1], groups)]:
        raise ValueError(f"{one_line(name)} does not hold the bytes of its {shape[0]} x {shape[1]} weights")
    keep = _decoded(torch.from_numpy(packed[:]), shape, axis, groups)
    order = torch.from_numpy(file.get_tensor(_order_key(name, ordered))).long() if ordered else None
    if order is not None and (
        len(order) not in shape or not torch.equal(order.sort().values, torch.arange(len(order)))
    ):
        raise ValueError(f"the order of {one_line(name)} is no permutation of its neurons")
    return Mask(keep, kept, axis, column_block, order)


def _order_key(name: str, ordered: bool | str) -> str:
    """Where the order of a projection's neurons is: stored once for an MLP; in older files each has its own (true)."""
    return (name if ordered is True else str(ordered)) + ORDER


def _decoded(bits: Tensor, shape: list[int], axis: str, groups: NM | None) -> Tensor:
    """A mask of this shape, as `PackedMasks.add` packed it."""
    turned = groups is not None and axis == "out"  # digits are those of columns
    lines = decode(bits, (shape[1], shape[0]) if turned else (shape[0], shape[1]), groups)
    return lines.T.contiguous() if turned else lines


def _opened(path: Path) -> Any:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("there is no such file")
    return safe_open(path, framework="np")


def _checksum(bits: dict[str, Tensor], about: dict[str, str]) -> str:
    """SHA-256 of all that a file of masks holds."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(bits):
        digest.update(bits[name].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Mask], projections: Mapping[str, str] | None = None) -> None:
    """Set the weights that the masks prune to zero, in place, after putting the neurons in the masks' order.

    Args:
        projections: see `find_blocks`.

    Raises:
        DassError: a mask has no projection of its name and shape in it, or an order that is not of its neurons.
    """
    blocks = find_blocks(model, projections)
    found = {p.name: p.weight for block in blocks for p in block.projections}
    for name, mask in masks.items():
        if name not in found or found[name].shape != mask.keep.shape:
            raise DassError(f"The mask {name} {tuple(mask.keep.shape)} fits no projection of this model: load its own.")
    orders = {name: mask.order for name, mask in masks.items() if mask.order is not None}
    for block in blocks:
        require_orders(block, orders)
    for block in blocks:
        for unit in block.units:
            own = [orders[p.name] for p in unit.projections.values() if p.name in orders]
            if own:
                reorder(block, unit, own[0])
        for p in block.attention.values():
            if p.name in orders:
                move(p, orders[p.name])
    for name, mask in masks.items():
        found[name].masked_fill_(~mask.keep.to(found[name].device), 0)
