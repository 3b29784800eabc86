"""Choices whose shared context runs once, against one sequence at a time."""

import random
from itertools import chain

import pytest
import torch
from safetensors.torch import save_file
from transformers import Lfm2Config, Lfm2ForCausalLM

from dass.evaluation.likelihood import Choice, log_likelihoods
from dass.pruning.layout import find_blocks
from dass.streaming import Shelf
from tests.models import LAYOUTS, tiny_model


def made_items() -> list[list[Choice]]:
    """Items whose choices share no token, some, or their whole context, and answer with one token or several."""
    rng = random.Random(0)

    def tokens(*lengths: int) -> list[int]:
        return rng.choices(range(3, 96), k=rng.choice(lengths))

    items = []
    for n_choices in (2, 4, 3, 5):
        begin, whole = tokens(0, 1, 5, 14), tokens(1, 2, 12)
        items.append([Choice(begin + tokens(1, 2), tokens(1, 2, 6)) for _ in range(n_choices)])
        items.append([Choice(whole, tokens(1, 1, 6)) for _ in range(n_choices)])
    return items


@torch.no_grad()
def alone(model, choice: Choice) -> float:
    """Sum over the continuation's tokens, nats."""
    ids = choice.context + choice.continuation
    log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(choice.context), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 6, 100])
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", "gemma3", "gpt2", "opt", "bloom", "deepseek_v3", "gpt_oss"]
)
def test_choices_that_share_a_context_score_as_each_alone(architecture, batch_size):
    model, items = tiny_model(architecture), made_items()
    (found,) = log_likelihoods(model, [items], batch_size)
    assert [len(item) for item in found] == [len(item) for item in items]
    expected = [alone(model, choice) for item in items for choice in item]
    assert [*chain(*found)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", *LAYOUTS])
def test_a_model_on_disk_scores_bit_for_bit_as_in_memory(tmp_path, architecture):
    model, tasks = tiny_model(architecture), [made_items(), made_items()[::-1]]
    expected = list(log_likelihoods(model, tasks, 6))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(weights, file := tmp_path / "weights.safetensors")
    index = {name: {"safetensors_file": str(file), "weight_name": name, "dtype": "float32"} for name in weights}
    shelf, read = Shelf(model, find_blocks(model), index, {}, tmp_path), []
    shelf._read = lambda block, original=shelf._read: (read.append(block.name), original(block))[1]
    assert list(log_likelihoods(model, tasks, 6, shelf)) == expected
    assert read == [block.name for block in shelf.blocks]  # once, whatever the number of items


def test_a_model_with_another_state_than_keys_and_values():
    own = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(
        Lfm2Config(vocab_size=96, hidden_size=32, intermediate_size=32, num_attention_heads=4, **own)
    ).eval()
    items = made_items()
    expected = [alone(model, choice) for item in items for choice in item]
    assert [*chain(*next(log_likelihoods(model, [items], 4)))] == pytest.approx(expected, abs=1e-4)


def test_a_shared_context_runs_once():
    model, rows = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(tuple((args[0] if args else kwargs["input_ids"]).shape)), with_kwargs=True
    )
    context = list(range(3, 33))
    list(log_likelihoods(model, [[[Choice(context, [40 + i, 50 + i]) for i in range(4)]] * 3], 8))
    assert rows == [(2, 29), (8, 2), (1, 29), (4, 2)]  # the last token of the context predicts what follows
