"""A decoder block: attention and one or more MLP units, each a set of views on the block's parameters."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

MLP_ROLES = ("gate", "up", "down")
ATTENTION_ROLES = ("q", "k", "v", "qkv", "o")
ROLES = MLP_ROLES + ATTENTION_ROLES


@dataclass(frozen=True)
class Projection:
    """A view `(out_features, in_features)` of a parameter; writing into `weight` writes into the model."""

    name: str
    """Its full name in the model: the layer's where it is the whole of one, else with the expert and the role."""
    role: str
    module: nn.Module
    """What owns the parameter."""
    parameter_name: str
    reads: str
    """What it reads, such as `mlp input`: projections of a block that read the same tensor share its statistics."""
    expert: int | None = None
    """Index into the first of three dimensions."""
    rows: slice | None = None
    """Which of the stored output features: a half of a fused gate and up, or every other one; None: all."""
    transposed: bool = False
    """Whether the parameter is stored as `(in_features, out_features)`."""

    @property
    def parameter(self) -> Tensor:
        """The whole parameter that it is a part of, without history; a `Stack` where experts come one by one."""
        return getattr(self.module, self.parameter_name).detach()

    @property
    def weight(self) -> Tensor:
        """The weights, `(out_features, in_features)`; shares the parameter's memory."""
        return self._view(self.parameter if self.expert is None else self.parameter[self.expert])

    @property
    def features(self) -> int:
        """The width of what it reads; looks at no weight."""
        return self._view(torch.empty(self.parameter.shape[-2:], device="meta")).shape[1]

    @property
    def bias(self) -> Tensor | None:
        """Its bias, `(out_features,)`, sharing the parameter's memory; None where it has none."""
        whole = getattr(self.module, "bias" if self.parameter_name == "weight" else f"{self.parameter_name}_bias", None)
        if whole is None:
            return None
        bias = whole.detach() if self.expert is None else whole.detach()[self.expert]
        return bias if self.rows is None else bias[self.rows]

    def _view(self, whole: Tensor) -> Tensor:
        weight = whole.T if self.transposed else whole
        return weight if self.rows is None else weight[self.rows]


@dataclass(frozen=True)
class Unit:
    """One MLP: what DaSS ties together. Row i of gate and up and column i of down belong to neuron i."""

    name: str
    projections: dict[str, Projection]
    """By role: gate (where there is one), up, down."""
    routed: bool = False
    """Whether a router decides which tokens it sees."""

    @property
    def intermediate(self) -> str:
        """What its down projection reads."""
        return self.projections["down"].reads


Hold = Callable[["Block"], AbstractContextManager[None]]
"""Has a block in memory while it is worked on."""


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    module: nn.Module
    mixer: nn.Module | None
    """The one child that mixes tokens (self-attention); None if there is not exactly one."""
    units: tuple[Unit, ...]
    attention: dict[str, Projection]
    """By role: q, k, v or qkv, and o; empty where attention is built otherwise."""
    left: tuple[str, ...] = ()
    """The parameters beside the units that are knowingly left dense, by their full names."""

    @property
    def projections(self) -> list[Projection]:
        """Those of all units, then those of attention."""
        return [p for unit in self.units for p in unit.projections.values()] + list(self.attention.values())

    @property
    def experts(self) -> dict[str, tuple[nn.Module, str]]:
        """The parameters of three dimensions that hold experts, by their full names: whose they are, and as what."""
        paths = {module: path for path, module in self.module.named_modules()}
        found = {(p.module, p.parameter_name): None for p in self.projections if p.expert is not None}
        return {
            ".".join(part for part in (self.name, paths[module], key) if part): (module, key) for module, key in found
        }

    def parts(self) -> list["Block"]:
        """The block cut into what is pruned by itself: attention with the MLPs of all tokens, and each expert."""
        routed = [unit for unit in self.units if unit.routed]
        rest = replace(self, units=tuple(unit for unit in self.units if not unit.routed))
        return [rest, *(replace(self, units=(unit,), attention={}) for unit in routed)]

    def unit_of(self, projection: Projection) -> Unit | None:
        """The unit that a projection belongs to; None for attention."""
        return next((unit for unit in self.units if unit.projections.get(projection.role) is projection), None)


def resident(_: Block) -> AbstractContextManager[None]:
    """A `Hold` of a model that is in memory as a whole."""
    return nullcontext()


def kept_of_parameters(kept: Iterable[tuple[Projection, Tensor]]) -> dict[tuple[nn.Module, str], Tensor]:
    """From the mask of each projection, bool, to that of each whole parameter, by the module and its name there."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for p, keep in kept:
        whole = found.setdefault((p.module, p.parameter_name), torch.ones_like(p.parameter, dtype=torch.bool))
        place: Any = SimpleNamespace(**{p.parameter_name: whole})
        replace(p, module=place).weight.copy_(keep)
    return found


def mlp_names(blocks: list[Block]) -> list[str]:
    """The names of all weights of the MLPs, each once: what shares of an MLP are reckoned on."""
    names: dict[str, None] = {}
    for block in blocks:
        paths = {
            module: f"{block.name}.{path}" if path else block.name for path, module in block.module.named_modules()
        }
        for unit in block.units:
            names |= {f"{paths[p.module]}.{p.parameter_name}": None for p in unit.projections.values()}
        names |= dict.fromkeys(block.left)
    return list(names)
