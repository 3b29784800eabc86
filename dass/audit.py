"""What hardware can make of a model's zeros, told from the weights alone.

A sparse tensor core multiplies by 2:4 (of fp32: by 1:2) along the axis that a product sums over (K): the inputs in the
forward pass Y = X W^T, the outputs in dX = dY W of the backward pass. See docs/hardware.md.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from dass.packing import chosen_packing
from dass.planning.architecture import TOKEN_EXPERTS
from dass.pruning.blocks import Block, Hold, Projection, resident
from dass.pruning.masks import NM, nm_along
from dass.sparsity import linear_names

KERNELS = {"cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT, "CUTLASS": SparseSemiStructuredTensorCUTLASS}
"""torch's own, by the name of the library behind each."""
ACCELERATED, NO_KERNEL, NOT_ALIGNED, DENSE = "accelerated", "K-aligned but no kernel", "not K-aligned", "dense"
FEW = 0.01
"""A matrix with a smaller share of zeros is dense."""
HALVES = NM(2, 4), NM(1, 2)
"""What sparse tensor cores execute, of one dtype or another, see `executed`."""


@dataclass(frozen=True)
class Audited:
    """What one projection is to hardware."""

    role: str
    shape: tuple[int, int]
    """`(out_features, in_features)`."""
    dtype: str
    sparsity: float
    """Share of zeros."""
    inputs: NM | None
    """The strictest N:M along the inputs, such as 2:4; None: none."""
    outputs: NM | None
    """The same along the outputs."""
    forward: tuple[NM, ...]
    """Those of `HALVES` that hold along the inputs."""
    backward: tuple[NM, ...]
    """The same along the outputs."""
    groups: float | None
    """Share of the groups of 4 along the inputs with at most 2 non-zeros; None where 4 does not divide them."""
    kernels: tuple[str, ...]
    """Those of `KERNELS` that take this shape and dtype in the forward pass."""
    status: str
    """accelerated; K-aligned but no kernel; not K-aligned; dense: of the forward pass."""
    helps: str
    """Which pass a sparse tensor core speeds up: forward, backward (dX = dY W), forward and backward, or none."""
    packed: int
    """Bytes when packed, see dass/packing.py."""

    @property
    def axis(self) -> str:
        """Along which axis N:M holds: in, out, both or neither."""
        return {(True, True): "both", (True, False): "in", (False, True): "out"}.get(
            (self.inputs is not None, self.outputs is not None), "neither"
        )

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize

    @property
    def saving(self) -> float:
        """Bytes that a kernel's format saves where it is accelerated: a half of the values, less 2 bits for each kept.

        torch's own holds 4 bits for 4 weights of 16 bits, and for 2 of 32.
        """
        return self.weights * (self.size / 2 - self.size / 16) if self.status == ACCELERATED else 0

    @property
    def masked_saving(self) -> float:
        """Bytes that a bitmask saves where there are zeros, a bit for each weight."""
        return max(self.weights * (self.sparsity * self.size - 1 / 8), 0) if self.status != DENSE else 0


@dataclass(frozen=True)
class Audit:
    """What a whole model is to hardware."""

    projections: dict[str, Audited]
    prefill: float
    """The most that a forward pass over many tokens can gain by its status: Amdahl over the linear layers' operations.

    Without the head, which is needed for the last token alone, and without attention's own products.
    """
    read: dict[str, int]
    """Bytes of the linear layers and the head that a token of decoding reads: dense; 2:4 as packed by the kernels where
    accelerated (2 bits for each value kept); and with a bitmask wherever there are zeros, for which torch has none."""
    disk: dict[str, int]
    """Bytes of all weights: dense, and packed projection by projection (`experiments.pack` packs a fused matrix as a
    whole, and what lies outside of the blocks, too)."""
    bfloat16: "Audit | None" = None
    """What it would be in bf16, where it is in fp32."""

    @property
    def decode(self) -> dict[str, float]:
        """The most that decoding can gain, which is bound by the bytes it reads: packed 2:4, and bitmask."""
        return {name: self.read["dense"] / bytes_read for name, bytes_read in self.read.items() if name != "dense"}


def executed(dtype: torch.dtype) -> NM:
    """What a sparse tensor core executes along K: of fp32, which it multiplies as TF32, 1:2; of all else 2:4.

    Source: torch/sparse/_semi_structured_conversions.py, whose packer drops whatever a group holds besides.
    """
    return NM(1, 2) if dtype == torch.float32 else NM(2, 4)


def kernels_for(shape: tuple[int, int], dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels of torch that take a sparse matrix of this shape and dtype, by their own constraints."""
    found = []
    for name, kernel in KERNELS.items():
        least = kernel._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
        if least and not (shape[0] % least.sparse_min_rows or shape[1] % least.sparse_min_cols):
            found.append(name)
    return tuple(found)


def share_of_groups(weight: Tensor) -> float | None:
    """The share of groups of 4 consecutive inputs with at most 2 non-zeros; None where 4 does not divide them."""
    if weight.shape[1] % 4:
        return None
    return ((weight != 0).reshape(-1, 4).sum(1, dtype=torch.uint8) <= 2).double().mean().item()


def obeys(kept: Tensor, pattern: NM) -> bool:
    """Whether no group of M keeps more than N along the last axis of `(lines, length)` bool; M must divide it."""
    length, m = kept.shape[1], pattern.m
    return length % m == 0 and bool((kept.reshape(-1, m).sum(1, dtype=torch.uint8) <= pattern.n).all())


def audit_matrix(weight: Tensor, role: str = "", dtype: torch.dtype | None = None) -> Audited:
    """What one matrix `(out_features, in_features)` is to hardware; `dtype`: what it is stored in, if another."""
    kept, shape = weight != 0, (weight.shape[0], weight.shape[1])
    forward, backward = (tuple(nm for nm in HALVES if obeys(lines, nm)) for lines in (kept, kept.T))
    sparsity, groups = 1 - int(kept.sum()) / weight.numel(), share_of_groups(weight)
    along = nm_along(kept), nm_along(kept.T)
    found = Audited(role, shape, "", sparsity, *along, forward, backward, groups, (), DENSE, "none", 0)
    return stored_in(found, dtype or weight.dtype)


def stored_in(one: Audited, dtype: torch.dtype) -> Audited:
    """What a matrix is to hardware if it is stored in this dtype."""
    kernels, pattern = kernels_for(one.shape, dtype), executed(dtype)
    kept = round((1 - one.sparsity) * one.weights)
    if one.sparsity < FEW:
        status = DENSE
    elif pattern in one.forward and kernels:
        status = ACCELERATED
    else:
        status = NOT_ALIGNED if one.inputs is None else NO_KERNEL
    backward = status != DENSE and pattern in one.backward and bool(kernels_for(one.shape[::-1], dtype))
    passes = [*(["forward"] if status == ACCELERATED else []), *(["backward (dX = dY W)"] if backward else [])]
    return replace(
        one,
        dtype=str(dtype).removeprefix("torch."),
        kernels=kernels,
        status=status,
        helps=" and ".join(passes) or "none",
        packed=chosen_packing(one.inputs, one.outputs, one.weights, kept, dtype.itemsize)[2],
    )


def audited(block: Block) -> list[Projection]:
    """What is looked at in a block: its projections, and linear layers that are none, as of other attention."""
    known = {p.module for p in block.projections}
    linear = ((name, m) for name, m in block.module.named_modules() if isinstance(m, nn.Linear) and m not in known)
    return block.projections + [Projection(f"{block.name}.{name}", "other", m, "weight", "") for name, m in linear]


@torch.no_grad()
def audit(model: nn.Module, blocks: list[Block], dtype: torch.dtype | None = None, hold: Hold = resident) -> Audit:
    """Look at every projection and every other linear layer of every block.

    Args:
        dtype: what the weights will be stored in, where it is another than that of the computing.
        hold: has a block in memory while it is looked at.
    """
    found: dict[str, Audited] = {}
    runs: dict[str, float] = {}  # the share of tokens that each projection sees
    for block in blocks:
        with hold(block):
            found |= {p.name: audit_matrix(p.weight, p.role, dtype) for p in audited(block)}
        runs |= {p.name: _share_of_tokens(model, block, p) for p in audited(block)}
    own = _summed(model, blocks, found, runs, dtype)
    if any(one.dtype != "float32" for one in found.values()):
        return own
    halved = {name: stored_in(one, torch.bfloat16) for name, one in found.items()}
    return replace(own, bfloat16=_summed(model, blocks, halved, runs, torch.bfloat16))


def _summed(
    model: nn.Module, blocks: list[Block], found: dict[str, Audited], runs: dict[str, float], dtype: torch.dtype | None
) -> Audit:
    """The sums over the projections `found`, each seen by the share `runs` of the tokens; no tower for images."""
    inside = blocks[0].name.split(".")[:-2] if blocks else []  # such as model.language_model of its layers.0
    names = (name for name in linear_names(model) if name.split(".")[: len(inside)] == inside)
    linear = [model.get_parameter(name) for name in names]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # what experts that a token does not visit would add
    idle = {name: (1 - runs[name]) * one.weights for name, one in found.items()}
    operations = sum(p.numel() for p in linear) - sum(idle.values())
    dense = sum(p.numel() * (dtype or p.dtype).itemsize for p in (*linear, *([] if head is None else [head.weight])))
    dense -= round(sum(weights * found[name].size for name, weights in idle.items()))
    disk = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
    spared = sum(runs[name] * one.weights / 2 for name, one in found.items() if one.status == ACCELERATED)
    return Audit(
        found,
        operations / (operations - spared),
        {
            "dense": dense,
            "packed": round(dense - sum(runs[name] * one.saving for name, one in found.items())),
            "bitmask": round(dense - sum(runs[name] * one.masked_saving for name, one in found.items())),
        },
        {"dense": disk, "packed": disk - sum(one.weights * one.size - one.packed for one in found.values())},
    )


def as_dict(audit: Audit) -> dict[str, Any]:
    """For a record: the sums, and each kind of projection once, with the names of those that are of it.

    Where weights are in fp32, `bfloat16` has the sums that they would have in bf16.
    """
    kinds = dict[str, dict[str, Any]]()
    for name, one in audit.projections.items():
        unsaid = ("sparsity", "forward", "backward")  # a record has it already, or status and helps tell
        facts = {key: value for key, value in asdict(one).items() if key not in unsaid}
        facts |= {side: None if (nm := getattr(one, side)) is None else str(nm) for side in ("inputs", "outputs")}
        facts["groups"] = None if one.groups is None or one.status == DENSE else round(one.groups, 4)
        facts |= {"axis": one.axis, "shape": list(one.shape), "kernels": list(one.kernels)}
        kinds.setdefault(repr(facts), facts | {"projections": []})["projections"].append(name)
    more = {} if audit.bfloat16 is None else {"bfloat16": _sums(audit.bfloat16)}
    return {"kinds": list(kinds.values()), **_sums(audit), **more}


def _sums(audit: Audit) -> dict[str, Any]:
    helps = dict.fromkeys(one.helps for one in audit.projections.values() if one.helps != "none")
    return {
        "status": status_of(audit),
        "helps": ", ".join(helps) or "none",
        "prefill": audit.prefill,
        "decode": audit.decode,
        "read": audit.read,
        "disk": audit.disk,
    }


def status_of(audit: Audit) -> str:
    """In words what the projections with zeros are, by role: `gate, up: not K-aligned; down: accelerated`."""
    by_role: dict[str, dict[str, None]] = {}
    for one in audit.projections.values():
        if one.status != DENSE:
            by_role.setdefault(one.role, {})[one.status] = None
    roles: dict[str, list[str]] = {}
    for role, found in by_role.items():
        roles.setdefault(" or ".join(found), []).append(role)
    return "; ".join(f"{', '.join(own)}: {status}" for status, own in roles.items()) or DENSE


def facts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """An audit as `as_dict` gives it, in words for people."""
    facts = _words(record)
    if "bfloat16" in record:
        facts |= {f"{name}, in bf16": text for name, text in _words(record["bfloat16"]).items()}
    return facts


def _words(sums: Mapping[str, Any]) -> dict[str, str]:
    return {
        "sparse tensor cores": sums["status"],
        "passes that they speed up": sums["helps"],
        "speed-up, at most": f"prefill {sums['prefill']:.2f}, "
        f"decode {sums['decode']['packed']:.2f} with 2:4 kernels, {sums['decode']['bitmask']:.2f} with a bitmask",
        "bytes on disk": f"{sums['disk']['dense']} dense, {sums['disk']['packed']} packed",
    }


def _share_of_tokens(model: nn.Module, block: Block, p: Projection) -> float:
    """Of experts behind a router the share of tokens that each sees, were routers even, as the config says; else 1."""
    unit = block.unit_of(p)
    if unit is None or not unit.routed:
        return 1.0
    config: Any = model.config
    text, experts = config.get_text_config(), sum(one.routed for one in block.units)
    known = (getattr(text, name, None) for name in TOKEN_EXPERTS)
    return next((n for n in known if isinstance(n, int)), experts) / experts
