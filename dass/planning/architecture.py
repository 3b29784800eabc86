"""What a model consists of, from its config alone: parameters by role and the decoder blocks.

The model is built on torch's meta device, which holds shapes but no weights, so the counts are those of its own code.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from dass.errors import DassError, told
from dass.models import auto_class
from dass.pruning.blocks import ATTENTION_ROLES, MLP_ROLES, Block, Projection, Unit
from dass.pruning.layout import find_blocks
from dass.sizes import Size, at_once, size_of
from dass.sparsity import linear_names

ROLES = [*MLP_ROLES, "gate_up", "experts", "router", *ATTENTION_ROLES, "attention"]
ROLES += ["embedding", "head", "norm", "other"]
TOKEN_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""How configs call the number of experts that each token is routed to."""


@dataclass(frozen=True)
class Input:
    """What some projections of a block read; one stands for all that units of the same shapes have."""

    projections: list[Projection]
    copies: int
    runs: float
    """How many of the copies each token runs through, if routers are even."""

    @property
    def features(self) -> int:
        """The width of what is read."""
        return self.projections[0].weight.shape[1]


@dataclass(frozen=True)
class PlannedBlock:
    """A decoder block without weights."""

    block: Block
    """With one unit of each shape."""
    inputs: dict[str, Input]
    """By `Projection.reads`."""
    attention: int
    """Weights of all matrices of attention."""
    attention_width: int
    """Of the values, all heads together; of the queries and keys too, which is true but for latent attention."""
    routers: int
    """Weights of the matrices that are neither of an MLP nor of attention."""
    size: Size
    """All of them, and those of experts."""


@dataclass(frozen=True)
class Architecture:
    """A model without weights."""

    parameters: dict[str, int]
    """Counts by role, in the order of `ROLES`, tied ones once; a role that the model lacks is absent."""
    linear: int
    """Weights of all linear layers and experts but the head, as `dass.sparsity.sparsity_report` counts them."""
    blocks: list[PlannedBlock]
    hidden_size: int
    vocabulary: int
    active_experts: str | None
    """Such as `2 of 8`; None without experts."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def in_blocks(self) -> int:
        """Parameters of all blocks."""
        return sum(block.size.whole for block in self.blocks)

    @property
    def streamed(self) -> int:
        """Parameters that are in memory at most where the blocks lie on disk."""
        return self.total - self.in_blocks + at_once([block.size for block in self.blocks])

    @property
    def by_expert(self) -> int:
        """The same where experts come one by one, too."""
        return self.total - self.in_blocks + at_once([block.size for block in self.blocks], by_expert=True)

    @property
    def in_experts(self) -> int:
        """Parameters of the experts that can come one by one."""
        return sum(block.size.experts for block in self.blocks)


def config_from(architecture: dict[str, Any]) -> Any:
    """A transformers config from its `model_type` and the entries that fix the shapes.

    Raises:
        DassError: no `model_type`, or one that transformers does not know.
    """
    advice = "give its model_type and the entries of its config.json that fix the shapes"
    # a wrong entry can make transformers raise anything
    with told("model.architecture is not one that transformers knows", advice, Exception):
        return AutoConfig.for_model(**architecture)


def read_architecture(config: Any, projections: Mapping[str, str] | None = None) -> Architecture:
    """Parameters and blocks of the causal language model that a transformers config describes.

    Args:
        projections: see `find_blocks`.

    Raises:
        DassError: the config is not one of a causal language model, or its blocks have an unknown layout.
    """
    what = f"{type(config).__name__} does not make a causal language model"
    with told(what, "correct its entries", Exception), torch.device("meta"):  # impossible sizes can raise anything
        model = auto_class(config).from_config(config)
    blocks = find_blocks(model, projections)
    experts = max(sum(unit.routed for unit in block.units) for block in blocks)
    text = config.get_text_config()
    active = next((n for n in (getattr(text, name, None) for name in TOKEN_EXPERTS) if isinstance(n, int)), 0)
    if experts and not active:
        raise DassError(f"{config.model_type} does not say how many experts a token visits: set num_experts_per_tok.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_block = [_roles_in(block) for block in blocks]
    roles = {parameter: role for of_block in by_block for parameter, role in of_block.items()}
    roles |= {head.weight: "head"} | {embedding.weight: "embedding"}  # a tied head is the embedding
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        other = "norm" if "Norm" in type(owner).__name__ else "other"
        other = "embedding" if isinstance(owner, nn.Embedding) else other  # of positions
        counts[roles.get(parameter, other)] += parameter.numel()
    return Architecture(
        parameters={role: counts[role] for role in ROLES if counts[role]},
        linear=sum(model.get_parameter(name).numel() for name in linear_names(model)),
        blocks=[_planned(block, of_block, active) for block, of_block in zip(blocks, by_block, strict=True)],
        hidden_size=embedding.weight.shape[1],
        vocabulary=head.weight.shape[0],
        active_experts=f"{active} of {experts}" if experts else None,
    )


def _roles_in(block: Block) -> dict[Tensor, str]:
    mixing = set(block.mixer.parameters()) if block.mixer is not None else set()
    roles: dict[Tensor, str] = {
        parameter: "attention" if parameter in mixing else "router"
        for name, parameter in block.module.named_parameters()
        if parameter.ndim == 2 and not name.endswith("bias")
    }
    for unit in block.units:
        for role, p in unit.projections.items():
            part_of = "experts" if unit.routed else "gate_up" if p.rows is not None else role
            roles[getattr(p.module, p.parameter_name)] = part_of
    return roles | {getattr(p.module, p.parameter_name): role for role, p in block.attention.items()}


def _planned(block: Block, roles: dict[Tensor, str], active: int) -> PlannedBlock:
    kinds: dict[Any, list[Unit]] = {}
    for unit in block.units:
        shapes = ((role, p.weight.shape) for role, p in unit.projections.items())
        kinds.setdefault((unit.routed, *shapes), []).append(unit)
    routed = sum(unit.routed for unit in block.units)
    shares: list[tuple[dict[str, Projection], int, float]] = [(block.attention, 1, 1)]
    for first, *others in kinds.values():
        copies = 1 + len(others)
        shares.append((first.projections, copies, copies * active / routed if first.routed else copies))
    inputs: dict[str, Input] = {}
    for projections, copies, runs in shares:
        for p in projections.values():
            inputs.setdefault(p.reads, Input([], copies, runs)).projections.append(p)
    mixing = [matrix for matrix, role in roles.items() if role in (*ATTENTION_ROLES, "attention")]
    return PlannedBlock(
        replace(block, units=tuple(first for first, *_ in kinds.values())),
        inputs,
        attention=sum(matrix.numel() for matrix in mixing),
        attention_width=mixing[-1].shape[1] if mixing else 0,  # the last one reads the values
        routers=sum(matrix.numel() for matrix, role in roles.items() if role == "router"),
        size=size_of(block),
    )
