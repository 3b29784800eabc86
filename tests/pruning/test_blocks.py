"""The block map on every architecture, and on models that it must refuse."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from dass.errors import DassError
from dass.pruning.blocks import find_blocks
from tests.models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    model = tiny_model(architecture)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(3)]
    for i, block in enumerate(blocks):
        assert list(block.projections) == ["gate", "up", "down", "q", "k", "v", "o"]
        for role, projection in block.projections.items():
            kind = "mlp" if role in ("gate", "up", "down") else "self_attn"
            assert projection.name == f"model.layers.{i}.{kind}.{role}_proj"
            assert projection.linear is model.get_submodule(projection.name)
        assert block.mixer is model.model.layers[i].self_attn


def test_blocks_are_found_wherever_they_are():
    wrapped = torch.nn.ModuleDict({"vision": torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 9), "text": tiny_model()})
    assert [block.name for block in find_blocks(wrapped)] == [f"text.model.layers.{i}" for i in range(3)]


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), r"2 x GPT2Block.*c_fc"),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=64)), "2 x GPTNeoXLayer.*dense_h_to_4h"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)),
            "2 x MixtralDecoderLayer.*q_proj",
        ),
        (
            lambda: Qwen2MoeForCausalLM(
                Qwen2MoeConfig(**SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=64, num_experts=4)
            ),
            "2 x Qwen2MoeDecoderLayer.*shared_expert",
        ),
        (lambda: torch.nn.Linear(2, 2), "no list of modules"),
    ],
    ids=["gpt2", "gpt-neox", "mixture-of-experts", "shared-expert", "no-decoder"],
)
def test_an_unknown_layout_says_what_was_found(make, found):
    with pytest.raises(DassError, match=f"unknown layout.*{found}"):
        find_blocks(make())


def test_a_list_inside_a_block_is_no_list_of_blocks():
    """Such as experts: each holds a whole GLU, but they do not follow one another."""
    model = tiny_model()
    for block in model.model.layers:
        block.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(copy.deepcopy(block.mlp) for _ in range(5))})
    with pytest.raises(DassError, match="unknown layout"):
        find_blocks(model)


def test_shapes_that_are_no_gated_unit():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    with pytest.raises(DassError, match=r"model\.layers\.1 is not a gated linear unit.*\(60, 32\)"):
        find_blocks(model)
