"""The map of a decoder block: its projections and the role of each, found by structure, not by the model's name."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dass.errors import DassError

ROLE_OF_NAME = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
}
MLP_ROLES = ("gate", "up", "down")
ATTENTION_ROLES = ("q", "k", "v", "o")
INPUT_OF_ROLE = {
    "gate": "mlp input",
    "up": "mlp input",
    "down": "intermediate",
    "q": "attention input",
    "k": "attention input",
    "v": "attention input",
    "o": "attention output",
}
"""Projections that read the same tensor share its statistics; the walk takes this from the roles."""


@dataclass(frozen=True)
class Projection:
    """One linear layer of a block."""

    name: str
    """Its full name in the model, such as `model.layers.0.mlp.gate_proj`."""
    role: str
    linear: nn.Linear


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    module: nn.Module
    mixer: nn.Module | None
    """The one child besides the MLP that holds linear layers (self-attention); None if there is not exactly one."""
    projections: dict[str, Projection]
    """By role, in the order gate, up, down, q, k, v, o; a role that the block lacks is absent."""


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a language model, in order: the longest outermost list of modules that all hold a GLU MLP.

    Raises:
        DassError: no such list; prints the lists of modules and the linear layers that were found.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # an outer module comes before what it holds
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    candidates = {name: blocks for name, blocks in lists.items() if len(blocks) and all(map(_has_glu, blocks))}
    if not candidates:
        raise DassError(
            f"{type(model).__name__} has an unknown layout: no list of blocks whose MLP has one linear layer each "
            f"named {', '.join(n for n, r in ROLE_OF_NAME.items() if r in MLP_ROLES)}, and no other weights (such as "
            f"experts); found {_describe(lists)}; "
            f"use a LLaMA-, Mistral-, Gemma- or Qwen-like model or extend dass/pruning/blocks.py."
        )
    name = max(candidates, key=lambda name: len(candidates[name]))
    return [_map_block(f"{name}.{index}", block) for index, block in enumerate(candidates[name])]


def _linears(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))


def _role(name: str) -> str | None:
    return ROLE_OF_NAME.get(name.rpartition(".")[2])


def _has_glu(block: nn.Module) -> bool:
    """One gate, up and down, all in one child, whose weight matrices they are."""
    roles = [_role(name) for name, _ in _linears(block)]
    if not all(roles.count(role) == 1 for role in MLP_ROLES):
        return False
    mlps = [child for child in block.children() if any(_role(name) == "gate" for name, _ in _linears(child))]
    matrices = [name for mlp in mlps for name, parameter in mlp.named_parameters() if parameter.ndim > 1]
    return sorted(str(_role(name.removesuffix(".weight"))) for name in matrices) == sorted(MLP_ROLES)


def _map_block(name: str, block: nn.Module) -> Block:
    by_role = {_role(n): Projection(f"{name}.{n}", str(_role(n)), linear) for n, linear in _linears(block) if _role(n)}
    projections = {role: by_role[role] for role in MLP_ROLES + ATTENTION_ROLES if role in by_role}
    gate, up, down = (projections[role].linear for role in MLP_ROLES)
    if not (gate.weight.shape == up.weight.shape == down.weight.T.shape):
        shapes = ", ".join(f"{role} {tuple(projections[role].linear.weight.shape)}" for role in MLP_ROLES)
        raise DassError(f"The MLP of {name} is not a gated linear unit: its weights have the shapes {shapes}.")
    others = [
        child
        for child in block.children()
        if any(True for _ in _linears(child)) and not any(module is gate for module in child.modules())
    ]
    return Block(name, block, others[0] if len(others) == 1 else None, projections)


def _describe(lists: dict[str, nn.ModuleList]) -> str:
    """What a model holds instead, for the error of an unknown layout."""
    if not lists:
        return "no list of modules at all"
    name, blocks = max(lists.items(), key=lambda item: len(item[1]))
    if not len(blocks):
        return f"an empty list {name}"
    leaves = [f"{n} {tuple(p.shape)}" for n, p in blocks[0].named_parameters() if p.ndim > 1]
    return f"{name}: {len(blocks)} x {type(blocks[0]).__name__} with {', '.join(leaves)}"
