"""The numbers of every method, kept: masks and losses on a tiny LLaMA that is made from a formula.

python -m tests.pruning.test_golden    # writes them anew, once NUMERICS is raised
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dass.pruning import NUMERICS
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model

GOLDEN = Path(__file__).with_name("golden.json")
ALONG_INPUTS = dict.fromkeys(("gate", "up", "down"), "in")
WHOLE_LAYERS = dict.fromkeys(("gate", "up", "down"), "layer")
ALONG_OUTPUTS = {**ALONG_INPUTS, "gate": "out", "up": "out"}
METHODS = {
    "magnitude": ("magnitude", WHOLE_LAYERS, "none", {}),
    "wanda": ("wanda", ALONG_INPUTS, "none", {}),
    "sparsegpt": ("obs", WHOLE_LAYERS, "obs", {"block_size": 8}),
    "dass": ("dass", ALONG_OUTPUTS, "none", {}),
    "dass with obs": ("dass", ALONG_OUTPUTS, "obs", {}),
    "obs without update": ("obs", WHOLE_LAYERS, "none", {}),
}
PATTERNS = (Unstructured(0.5), NM(2, 4), NM(4, 8))
CASES = {f"{name}, {pattern}": (name, pattern) for name in METHODS for pattern in PATTERNS}


def formula_model(noise: float = 0.0) -> LlamaForCausalLM:
    """Weights that are sines of their index: the same on every machine, and no two of the same size."""
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(model.named_parameters()), 1):
            index = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
            sines = torch.sin(index * math.sqrt(3) + index.square() * math.pi / 97 + place)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * sines)
            else:
                parameter.copy_(sines.view_as(parameter) * 1.5 * parameter.shape[1] ** -0.5)
            parameter.mul_(1 + noise * torch.cos(7 * index).view_as(parameter))
    return model


def formula_tokens(first: int) -> torch.Tensor:
    """Six sequences of 20 tokens, as irregular as squares modulo a prime."""
    return (torch.arange(first, first + 120).square() * 7 % 47).view(6, 20)


@cache
def measured(case: str, noise: float = 0.0) -> dict[str, str | float]:
    """The hash of all masks of a method, and the loss of what it leaves."""
    name, pattern = CASES[case]
    criterion, axis, update, parameters = METHODS[name]
    model = formula_model(noise)
    masks = prune_model(model, BlockPruner(Method(criterion, axis, pattern, update, parameters)), formula_tokens(1), 2)
    digest = hashlib.sha256()
    for layer, mask in sorted(masks.items()):
        digest.update(f"{layer} {mask.axis} {mask.column_block}".encode() + bytes(mask.keep.flatten().tolist()))
    tokens = formula_tokens(500)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return {"masks": digest.hexdigest()[:16], "loss": loss.item()}


def same(one: dict, other: dict) -> bool:
    """Whether two measurements agree up to rounding."""
    return one["masks"] == other["masks"] and math.isclose(one["loss"], other["loss"], rel_tol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_masks_and_losses_are_those_that_were_kept(case):
    golden = json.loads(GOLDEN.read_text())
    assert golden["numerics"] == NUMERICS, "make the numbers anew: python -m tests.pruning.test_golden"
    assert same(measured(case), golden["cases"][case]), (
        f"{case} gives {measured(case)}, and gave {golden['cases'][case]}: raise NUMERICS in dass/pruning/__init__.py, "
        f"so that no old record is taken for a new one, and make the numbers anew (python -m tests.pruning.test_golden)"
    )


@pytest.mark.parametrize("case", CASES)
def test_rounding_changes_none_of_them(case):
    """No two scores are so near that another processor could choose otherwise."""
    assert measured(case, 1e-7)["masks"] == measured(case)["masks"]
    assert measured(case, 1e-7)["loss"] == pytest.approx(measured(case)["loss"], rel=1e-5)


def test_every_method_has_numbers_of_its_own():
    """Along inputs DaSS's n_i is one constant, so all that is compared here differs."""
    assert len({measured(case)["loss"] for case in CASES}) == len(CASES)
    assert set(json.loads(GOLDEN.read_text())["cases"]) == set(CASES)


def main() -> None:
    """Write the numbers of today, unless they differ from those kept under the same NUMERICS."""
    new = {case: measured(case) for case in CASES}
    old = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"numerics": None, "cases": {}}
    changed = [case for case in new if case in old["cases"] and not same(new[case], old["cases"][case])]
    if changed and old["numerics"] == NUMERICS:
        raise SystemExit(f"{', '.join(changed)}: the numbers have changed: raise NUMERICS in dass/pruning/__init__.py.")
    GOLDEN.write_text(json.dumps({"numerics": NUMERICS, "cases": new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
