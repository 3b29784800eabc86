"""What a model consists of, from its config alone: parameters by role and the decoder blocks.

The model is built on torch's meta device, which holds shapes but no weights, so the counts are those of its own code.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dass.errors import DassError, first_line
from dass.pruning.blocks import ATTENTION_ROLES, MLP_ROLES, Block, Unit
from dass.pruning.layout import find_blocks
from dass.sparsity import linear_weights

ROLES = (
    *MLP_ROLES,
    "gate_up",
    "experts",
    "router",
    *ATTENTION_ROLES,
    "attention",
    "embedding",
    "head",
    "norm",
    "other",
)
TOKEN_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""How configs call the number of experts that each token is routed to."""


@dataclass(frozen=True)
class PlannedBlock:
    """A decoder block without weights, in which units of the same shapes stand once."""

    block: Block
    copies: Mapping[str, int]
    """How many units like it the block has, by what its projections read (`Projection.reads`)."""
    runs: Mapping[str, float]
    """How many of these each token runs through, if routers are even; by the same."""
    attention: int
    """Weights of all matrices of attention."""
    attention_width: int
    """Of the values, all heads together; of the queries and keys too, which is true but for latent attention."""
    routers: int
    """Weights of the matrices that are neither of an MLP nor of attention."""


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


def config_from(architecture: dict[str, Any]) -> Any:
    """A transformers config from its `model_type` and the entries that fix the shapes.

    Raises:
        DassError: no `model_type`, or one that transformers does not know.
    """
    try:
        return AutoConfig.for_model(**architecture)
    except Exception as error:  # a wrong entry can make transformers raise anything
        raise DassError(
            f"model.architecture is not one that transformers knows ({first_line(error)}): give its model_type and "
            f"the entries of its config.json that fix the shapes."
        ) from error


def read_architecture(config: Any, projections: Mapping[str, str] | None = None) -> Architecture:
    """Parameters and blocks of the causal language model that a transformers config describes.

    Args:
        projections: see `find_blocks`.

    Raises:
        DassError: the config is not one of a causal language model, or its blocks have an unknown layout.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # impossible sizes can make transformers raise anything
        raise DassError(
            f"{type(config).__name__} does not make a causal language model ({first_line(error)}): correct its entries."
        ) from error
    blocks = find_blocks(model, projections)
    experts = max(sum(unit.routed for unit in block.units) for block in blocks)
    text = config.get_text_config()
    active = next((n for n in (getattr(text, name, None) for name in TOKEN_EXPERTS) if isinstance(n, int)), 0)
    if experts and not active:
        raise DassError(f"{config.model_type} does not say how many experts a token visits: set num_experts_per_tok.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # a tied head is the embedding
    roles = _roles_in(blocks) | {id(head.weight): "head"} | {id(embedding.weight): "embedding"}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        other = "norm" if "Norm" in type(owner).__name__ else "other"
        other = "embedding" if isinstance(owner, nn.Embedding) else other  # of positions
        counts[roles.get(id(parameter), other)] += parameter.numel()
    return Architecture(
        parameters={role: counts[role] for role in ROLES if counts[role]},
        linear=sum(weight.numel() for weight in linear_weights(model)),
        blocks=[_planned(block, active, roles) for block in blocks],
        hidden_size=embedding.weight.shape[1],
        vocabulary=head.weight.shape[0],
        active_experts=f"{active} of {experts}" if experts else None,
    )


def _roles_in(blocks: list[Block]) -> dict[int, str]:
    """The roles of the matrices in all blocks, by the id of the parameter."""
    roles: dict[int, str] = {}
    for block in blocks:
        mixing = set(map(id, block.mixer.parameters())) if block.mixer is not None else set()
        for name, q in block.module.named_parameters():
            if q.ndim == 2 and not name.endswith("bias"):
                roles[id(q)] = "attention" if id(q) in mixing else "router"
        known = list(block.attention.items())
        for unit in block.units:
            for role, p in unit.projections.items():
                known.append(("experts" if unit.routed else "gate_up" if p.rows is not None else role, p))
        roles |= {id(getattr(p.module, p.parameter_name)): role for role, p in known}
    return roles


def _planned(block: Block, active: int, roles: dict[int, str]) -> PlannedBlock:
    """The block with one unit of each kind."""
    kinds: dict[Any, list[Unit]] = {}
    for unit in block.units:
        shapes = ((role, p.weight.shape) for role, p in unit.projections.items())
        kinds.setdefault((unit.routed, *shapes), []).append(unit)
    routed = sum(unit.routed for unit in block.units)
    copies: dict[str, int] = {p.reads: 1 for p in block.attention.values()}
    runs: dict[str, float] = dict(copies)
    for alike in kinds.values():
        for p in alike[0].projections.values():
            copies[p.reads] = len(alike)
            runs[p.reads] = len(alike) * active / routed if alike[0].routed else len(alike)
    matrices = [(roles.get(id(q)), q) for q in block.module.parameters()]
    mixing = [q for role, q in matrices if role in (*ATTENTION_ROLES, "attention")]
    last = block.attention["o"].weight if "o" in block.attention else mixing[-1] if mixing else None
    return PlannedBlock(
        replace(block, units=tuple(alike[0] for alike in kinds.values())),
        copies,
        runs,
        attention=sum(q.numel() for q in mixing),
        attention_width=0 if last is None else last.shape[1],
        routers=sum(q.numel() for role, q in matrices if role == "router"),
    )
