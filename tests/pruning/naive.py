"""A walk that is obviously right: it knows each layout by hand, keeps all activations and re-runs the whole model.

It shares nothing with the walk that it checks: no views, no watched products, no statistics, no masks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import sigmoid
from transformers.pytorch_utils import Conv1D

from dass.pruning.masks import NM, Pattern

N_EXPERTS = 3
OBS_COLUMNS = 8
"""Columns that unstructured OBS chooses at once."""


def glu(place, gate="gate_proj", up="up_proj", down="down_proj"):
    return {"gate": f"{place}.{gate}", "up": f"{place}.{up}", "down": f"{place}.{down}"}


def no_gate(up, down):
    return {"up": up, "down": down}


QKVO = {role: f"self_attn.{role}_proj" for role in "qkvo"}
LINEARS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "llama_biased": (glu("mlp"), QKVO),
    "phi3": (glu("mlp", "gate_up_proj", "gate_up_proj"), {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"}),
    "glm4": (glu("mlp", "gate_up_proj", "gate_up_proj"), QKVO),
    "gpt2": (no_gate("mlp.c_fc", "mlp.c_proj"), {"qkv": "attn.c_attn", "o": "attn.c_proj"}),
    "opt": (no_gate("fc1", "fc2"), QKVO | {"o": "self_attn.out_proj"}),
    "gpt_neox": (
        no_gate("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        {"qkv": "attention.query_key_value", "o": "attention.dense"},
    ),
    "gptj": (no_gate("mlp.fc_in", "mlp.fc_out"), {r: f"attn.{r}_proj" for r in "qkv"} | {"o": "attn.out_proj"}),
    "gpt_bigcode": (no_gate("mlp.c_fc", "mlp.c_proj"), {"qkv": "attn.c_attn", "o": "attn.c_proj"}),
    "starcoder2": (no_gate("mlp.c_fc", "mlp.c_proj"), QKVO),
    "phi": (no_gate("mlp.fc1", "mlp.fc2"), QKVO | {"o": "self_attn.dense"}),
    **dict.fromkeys(
        ("falcon", "falcon_new", "falcon_serial", "bloom"),
        (
            no_gate("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            {"qkv": "self_attention.query_key_value", "o": "self_attention.dense"},
        ),
    ),
    "mpt": (no_gate("ffn.up_proj", "ffn.down_proj"), {"qkv": "attn.Wqkv", "o": "attn.out_proj"}),
    "nemotron": (no_gate("mlp.up_proj", "mlp.down_proj"), QKVO),
    "mixtral": ({}, QKVO),
    "qwen2_moe": (glu("mlp.shared_expert"), QKVO),
    "qwen3_moe": (glu("mlp"), QKVO),
    "olmoe": ({}, QKVO),
    "deepseek_v2": (glu("mlp"), {}),
    "deepseek_v3": (glu("mlp"), {}),
    "granitemoeshared": (glu("shared_mlp", "input_linear", "input_linear", "output_linear"), QKVO),
    "jetmoe": ({}, {}),
    "llama4_text": (glu("feed_forward"), QKVO),
    "gpt_oss": ({}, QKVO),
    "gemma4_text": (glu("mlp"), QKVO),
}
"""The linear layers of each layout by role, of its MLP (if it has one of linear layers) and of attention."""
SHARED = dict.fromkeys(("deepseek_v2", "deepseek_v3"), "mlp.shared_experts")
SHARED["llama4_text"] = "feed_forward.shared_expert"
"""MLPs of linear layers that stand beside the experts, in blocks that have any."""
EXPERTS = dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"), "mlp.experts"
) | {
    "granitemoeshared": "block_sparse_moe.experts",
    "jetmoe": "mlp",
    "llama4_text": "feed_forward.experts",
    "gemma4_text": "experts",
}
"""The module of the experts."""


@dataclass
class Seen:
    """Matrices that read one or two inputs, by hand: an MLP, or attention."""

    name: str
    matrices: dict[str, Tensor]
    """By role, `(out_features, in_features)`; writing into them writes into the model."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What each role reads, `(tokens, in_features)`."""
    n_seen: int | None = None
    """Tokens that were routed here; None: all are."""


def weight_of(layer):
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def linear_matrices(block, paths):
    """The matrices of these layers, by role; a layer that is gate and up holds the gate first."""
    matrices = {role: weight_of(block.get_submodule(path)) for role, path in paths.items()}
    if "gate" in paths and paths["gate"] == paths["up"]:
        matrices["gate"], matrices["up"] = matrices["gate"].chunk(2)
    return matrices


def expert_matrices(layout, experts, e):
    """gate, up and down of one expert."""
    if layout == "jetmoe":
        both, down = experts.input_linear.weight.data[e], experts.output_linear.weight.data[e]
    else:
        both, down = experts.gate_up_proj.data[e], experts.down_proj.data[e]
    if layout in ("gpt_oss", "llama4_text"):
        both, down = both.T, down.T
    half = len(both) // 2
    gate, up = (both[0::2], both[1::2]) if layout == "gpt_oss" else (both[:half], both[half:])
    return {"gate": gate, "up": up, "down": down}


def intermediate(layout, experts, e, x):
    """h of one expert for its tokens."""
    matrices = expert_matrices(layout, experts, e)
    gate, up = x @ matrices["gate"].T, x @ matrices["up"].T
    if layout == "gpt_oss":
        bias = experts.gate_up_proj_bias.data[e]
        gate, up = (gate + bias[0::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
        return (up + 1) * gate * sigmoid(1.702 * gate)
    return (experts.activation if layout == "jetmoe" else experts.act_fn)(gate) * up


def recorded(model, modules, input_ids):
    """What enters and leaves these modules, in one plain forward of the model for each sequence: lists of pairs."""
    seen = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda m, arguments, output, n=name: seen[n].append((arguments, output)))
        for name, module in modules.items()
    ]
    for row in input_ids:
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def routed_inputs(layout, seen, n_experts):
    """The tokens of each expert, `(tokens, d)`, and all that were routed to any."""
    if layout == "jetmoe":
        parts = zip(*(inputs.split(sizes) for (inputs, sizes), _ in seen["experts"]), strict=True)
        each = [torch.cat(part) for part in parts]
        return each, torch.cat(each)
    if layout == "llama4_text":
        each = [[] for _ in range(n_experts)]
        for ((routed,), _), (_, (scores, _)) in zip(seen["experts"], seen["router"], strict=True):
            for e, part in enumerate(routed.view(n_experts, len(scores), -1)):
                each[e].append(part[scores[:, e] > 0])
        each = [torch.cat(part) for part in each]
        return each, torch.cat(each)
    hidden = torch.cat([arguments[0] for arguments, _ in seen["experts"]])
    index = torch.cat([arguments[1] for arguments, _ in seen["experts"]])
    return [hidden[(index == e).any(-1)] for e in range(n_experts)], hidden


def decoder(model):
    """The list of the model's blocks."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)


def matrices_of(layout, block) -> dict[str, dict[str, Tensor]]:
    """Every matrix of a block that can be pruned: of `mlp`, of `attention`, and of each expert."""
    paths, attention_paths, experts = _what_stands(layout, block)
    found = {"mlp": linear_matrices(block, paths), "attention": linear_matrices(block, attention_paths)}
    for e in range(N_EXPERTS if experts is not None else 0):
        found[f"{EXPERTS[layout]}.{e}"] = expert_matrices(layout, experts, e)
    return found


def look(model, layout, block, input_ids, need: Callable[[int], int], attention: bool) -> list[Seen]:
    """All MLPs of a block (and attention), with everything that they read.

    Args:
        need: how many tokens an expert must have seen, by its number of intermediate neurons.
    """
    paths, attention_paths, experts = _what_stands(layout, block)
    attention_paths = attention_paths if attention else {}
    modules = {role: block.get_submodule(path) for role, path in (paths | attention_paths).items()}
    if experts is not None:
        modules["experts"] = experts.input_linear if layout == "jetmoe" else experts
        if layout == "llama4_text":
            modules["router"] = block.feed_forward.router
    seen = recorded(model, modules, input_ids)
    inputs = {
        role: torch.cat([arguments[0].flatten(0, -2) for arguments, _ in seen[role]])
        for role in (*paths, *attention_paths)
    }
    found = []
    for name, own in (("mlp", paths), ("attention", attention_paths)):
        if own:
            found.append(Seen(name, linear_matrices(block, own), {role: inputs[role] for role in own}))
    if experts is not None:
        each, everyone = routed_inputs(layout, seen, N_EXPERTS)
        for e, own in enumerate(each):
            matrices = expert_matrices(layout, experts, e)
            x = everyone if len(own) < need(matrices["down"].shape[1]) else own
            h = intermediate(layout, experts, e, x)
            found.append(Seen(f"{EXPERTS[layout]}.{e}", matrices, {"gate": x, "up": x, "down": h}, len(own)))
    return found


def select(scores: Tensor, pattern: Pattern, axis: str) -> Tensor:
    """Which weights are kept, by sorting each group."""
    scores = scores if axis == "in" else scores.T
    groups = scores.unflatten(1, (-1, pattern.m)) if isinstance(pattern, NM) else scores
    width = groups.shape[-1]
    count = pattern.m - pattern.n if isinstance(pattern, NM) else int(width * pattern.ratio)
    pruned = groups.argsort(dim=-1, stable=True)[..., :count]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter(-1, pruned, False).reshape(scores.shape)
    return keep if axis == "in" else keep.T


def plain_obs(weight: Tensor, x: Tensor, n_sequences: int, pattern: Pattern) -> Tensor:
    """One column after the other, with the exact inverse Hessian of the columns that are left (no Cholesky)."""
    hessian = 2 / n_sequences * x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    weight, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    every = pattern.m if isinstance(pattern, NM) else OBS_COLUMNS
    for i, inverse in enumerate(inverses):
        if i % every == 0:
            chosen = slice(i, i + every)
            keep[:, chosen] = select(weight[:, chosen].square() / diagonal[chosen], pattern, "in")
        error = torch.where(keep[:, i], 0, weight[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
        weight[~keep[:, i], i] = 0
    return weight


def new_weight(criterion: str, role: str, seen: Seen, pattern: Pattern, n_sequences: int) -> Tensor:
    """What a method makes of one matrix."""
    weight, x = seen.matrices[role], seen.inputs[role]
    if criterion == "obs":
        return plain_obs(weight, x, n_sequences, pattern)
    if criterion in ("dass", "tied") and role in ("gate", "up"):
        keep = select(weight.abs() * seen.inputs["down"].norm(dim=0).sqrt()[:, None], pattern, "out")
    elif criterion == "tied":
        keep = select(weight.abs(), pattern, "in")
    else:
        keep = select(weight.abs() * x.norm(dim=0), pattern, "in")
    return torch.where(keep, weight, 0)


def naive_walk(
    model, layout, input_ids, criterion, pattern, attention=False, min_expert_tokens=None
) -> list[dict[str, int]]:
    """Prune block by block; before each, the whole model runs again on every sequence, alone.

    Returns:
        For each block the experts that saw too few tokens, and how many they saw.
    """
    rare = []

    def need(neurons):
        default = max(neurons, model.config.hidden_size) if criterion == "obs" else 32
        return max(1, default if min_expert_tokens is None else min_expert_tokens)

    for block in decoder(model):
        found = look(model, layout, block, input_ids, need, attention)
        for seen in found:
            new = {role: new_weight(criterion, role, seen, pattern, len(input_ids)) for role in seen.matrices}
            for role, weight in new.items():
                seen.matrices[role].copy_(weight)
        rare.append(
            {
                seen.name: seen.n_seen
                for seen in found
                if seen.n_seen is not None and seen.n_seen < need(seen.matrices["down"].shape[1])
            }
        )
    return rare


def _what_stands(layout, block):
    """The linear layers of a block's MLP, those of its attention, and its module of experts or None."""
    paths, attention_paths = LINEARS[layout]
    experts = _child(block, EXPERTS.get(layout, ""))
    if experts is not None and not hasattr(experts, "input_linear" if layout == "jetmoe" else "gate_up_proj"):
        experts = None  # a block without experts in a model with some
    if experts is not None and layout in SHARED:
        paths = glu(SHARED[layout])
    elif paths and _child(block, paths["down"]) is None:
        paths = {}
    return paths, attention_paths, experts


def _child(module, path):
    """The submodule at this path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
