"""What a model consists of, from its config alone: parameters by role and the decoder blocks.

The model is built on torch's meta device, which holds shapes but no weights, so the counts are those of its own code.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dass.errors import DassError, first_line
from dass.pruning.blocks import ATTENTION_ROLES, MLP_ROLES, ROLE_OF_NAME, Block, Projection, find_blocks

ROLES = (*MLP_ROLES, "experts", "router", *ATTENTION_ROLES, "embedding", "head", "norm", "other")


@dataclass(frozen=True)
class PlannedBlock:
    """A decoder block without weights; of a mixture of experts, with the projections of one expert."""

    block: Block
    experts: int = 1
    """How many MLPs like this one the block holds."""
    active: int = 1
    """How many of them each token runs through."""

    def copies(self, role: str) -> int:
        """How many projections of this role the block holds."""
        return self.experts if role in MLP_ROLES else 1

    def runs(self, role: str) -> int:
        """How many projections of this role each token runs through."""
        return self.active if role in MLP_ROLES else 1


@dataclass(frozen=True)
class Architecture:
    """A model without weights."""

    parameters: dict[str, int]
    """Counts by role, in the order of `ROLES`, tied ones once; a role that the model lacks is absent."""
    linear: int
    """Weights of all linear layers but the head, as `dass.sparsity.sparsity_report` counts them, and of all experts."""
    blocks: list[PlannedBlock]
    hidden_size: int
    vocabulary: int
    refusal: str | None
    """Why the walk refuses this model today; None if it does not."""

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


def read_architecture(config: Any) -> Architecture:
    """Parameters and blocks of the causal language model that a transformers config describes.

    Raises:
        DassError: the config is not one of a causal language model, or its blocks have neither a GLU MLP nor experts.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # impossible sizes can make transformers raise anything
        raise DassError(
            f"{type(config).__name__} does not make a causal language model ({first_line(error)}): correct its entries."
        ) from error
    refusal = None
    try:
        blocks = [PlannedBlock(block) for block in find_blocks(model)]
    except DassError as error:
        refusal = str(error)
        blocks = _expert_blocks(model)
        if not blocks:
            raise
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    # a tied head is the embedding
    ends = {id(module.weight): role for role, module in (("head", head), ("embedding", embedding))}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[ends.get(id(parameter)) or _role(name, parameter)] += parameter.numel()
    return Architecture(
        parameters={role: counts[role] for role in ROLES if counts[role]},
        linear=linear + counts["experts"],
        blocks=blocks,
        hidden_size=embedding.weight.shape[1],
        vocabulary=head.weight.shape[0],
        refusal=refusal,
    )


def _role(name: str, parameter: Tensor) -> str:
    path = name.removesuffix(".weight").split(".")
    if parameter.ndim == 3 and "experts" in path:
        return "experts"
    if parameter.ndim == 2 and path[-1] in ROLE_OF_NAME:
        return ROLE_OF_NAME[path[-1]]
    if parameter.ndim == 2 and path[-1] in ("gate", "router"):
        return "router"
    return "norm" if "norm" in path[-1] else "other"


def _expert_blocks(model: PreTrainedModel) -> list[PlannedBlock]:
    """The blocks of a mixture of experts that fuses their weights; none if a block is anything else.

    `gate_up_proj` is `(experts, 2 * f, d)` and `down_proj` `(experts, d, f)`, as transformers 5 has Mixtral and Qwen3.
    """
    blocks = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        match = re.match(r".*?\.\d+(?=\.)", name)
        if match is None or not {"gate_up_proj", "down_proj"} <= set(shapes):
            continue
        experts, d, f = shapes["down_proj"]
        active = getattr(model.config, "num_experts_per_tok", None)
        if shapes["gate_up_proj"] != (experts, 2 * f, d) or active is None:
            return []
        block = modules[match[0]]
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        by_role = {ROLE_OF_NAME[n.rpartition(".")[2]]: n for n in linears if n.rpartition(".")[2] in ROLE_OF_NAME}
        if any(role in by_role for role in MLP_ROLES):  # a shared expert
            return []
        sizes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
        one = {r: Projection(f"{name}.{r}", r, nn.Linear(*s, bias=False, device="meta")) for r, s in sizes.items()}
        attention = {
            role: Projection(f"{match[0]}.{by_role[role]}", role, linears[by_role[role]])
            for role in ATTENTION_ROLES
            if role in by_role
        }
        mixer = block.get_submodule(by_role["o"].rpartition(".")[0]) if "o" in by_role else None
        blocks.append(PlannedBlock(Block(match[0], block, mixer, {**one, **attention}), experts, active))
    return blocks if len(blocks) == model.config.num_hidden_layers else []
