"""Every layout of an MLP in transformers' own classes, against a naive walk that knows each by hand."""

import copy
from functools import cache

import pytest
import torch

from dass.errors import DassError
from dass.pruning.blocks import Block
from dass.pruning.call import Call
from dass.pruning.criteria import CRITERIA, criterion
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.mixed import computes_from_sum
from dass.pruning.parked import Parked
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from tests.models import LAYOUTS, random_tokens, tiny_model
from tests.pruning.naive import EXPERTS, LINEARS, OBS_COLUMNS, naive_walk

ALONG_INPUTS = dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in")
ALONG_OUTPUTS = {**ALONG_INPUTS, "gate": "out", "up": "out"}
PATTERNS = {"2:4": NM(2, 4), "50%": Unstructured(0.5)}
WHOLE_ATTENTION = [layout for layout in LAYOUTS if LINEARS[layout][1]]


def method(criterion, pattern):
    if criterion == "obs":
        return Method("obs", ALONG_INPUTS, PATTERNS[pattern], "obs", {"block_size": OBS_COLUMNS})
    return Method(criterion, ALONG_OUTPUTS if criterion == "dass" else ALONG_INPUTS, PATTERNS[pattern])


@cache
def built(layout):
    return tiny_model(layout, torch.float64)


def fresh(layout):
    return copy.deepcopy(built(layout))


def both_walks(model, layout, method, targets="mlp", n_sequences=5, min_expert_tokens=None):
    """Prune a model and its copy, ours and naively; the weights and the rare experts of all blocks are the same.

    Returns:
        The pruned model, and for each block its rare experts with the tokens that they saw.
    """
    expected, input_ids, pruner = copy.deepcopy(model), random_tokens(n_sequences), BlockPruner(method, targets)
    rare = []
    for step in walk(model, input_ids, pruner.needs, 2, min_expert_tokens, fixed_mixers=targets == "mlp"):
        assert {stream.n_sequences for stream in step.streams.values()} <= {n_sequences}
        pruner.prune(step.block, step.streams)
        rare.append({name.removeprefix(f"{step.block.name}."): n for name, n in step.rare.items()})
    assert rare == naive_walk(
        expected, layout, input_ids, method.criterion, method.pattern, targets == "all", min_expert_tokens
    )
    for (name, weight), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        if method.criterion == "obs":
            assert torch.equal(weight == 0, wanted == 0), name
            torch.testing.assert_close(weight, wanted, rtol=1e-8, atol=1e-8)
        else:
            assert torch.equal(weight, wanted), name
    return model, rare


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("criterion", ["dass", "wanda", "obs"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_equals_the_naive_walk(layout, criterion, pattern):
    targets = "all" if layout in WHOLE_ATTENTION else "mlp"
    both_walks(fresh(layout), layout, method(criterion, pattern), targets)


def routers(model):
    """What decides which tokens an expert sees, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim < 3 and len(parameter) == 3 and "experts" not in name and "attention" not in name
    }


def top_1(layout):
    """A model whose experts get one token each, but the last one none: its logit is the mean of the others'."""
    key = "top_k_experts" if layout == "gemma4_text" else "num_experts_per_tok"
    model = tiny_model(layout, torch.float64, **{key: 1})
    for parameter in routers(model).values():
        parameter[2] = parameter[:2].mean(0)
    return model


@pytest.mark.parametrize("min_expert_tokens", [None, 0, 40, 10**6])
@pytest.mark.parametrize("criterion", ["dass", "wanda", "obs"])
@pytest.mark.parametrize("layout", EXPERTS)
@torch.no_grad()
def test_an_expert_that_saw_too_few_tokens_is_judged_by_all(layout, criterion, min_expert_tokens):
    model = top_1(layout)
    before = {name: parameter.clone() for name, parameter in routers(model).items()}
    pruned, rare = both_walks(model, layout, method(criterion, "2:4"), "mlp", 3, min_expert_tokens)
    for name, parameter in routers(pruned).items():
        assert torch.equal(parameter, before[name]), name
    assert before and any(rare)
    for own in filter(None, rare):
        assert own[f"{EXPERTS[layout]}.2"] == 0
        assert sum(own.values()) == {0: 0, 10**6: 72}.get(min_expert_tokens, sum(own.values()))


@pytest.mark.parametrize("layout", EXPERTS)
@torch.no_grad()
def test_tokens_that_run_through_two_experts_change_no_mask(layout):
    """Judged by all tokens, each counts twice; the masks are those of once."""
    _, rare = both_walks(fresh(layout), layout, method("obs", "2:4"), min_expert_tokens=120)
    assert any(len(own) == 3 for own in rare)


@torch.no_grad()
def test_the_least_number_of_tokens_is_the_width_of_a_hessian_or_32():
    """96 neurons need 96 tokens for the Hessian of h, the norms 32."""
    for name, least in (("wanda", 32), ("obs", 96)):
        pruner = BlockPruner(method(name, "2:4"))
        model = tiny_model("mixtral", intermediate_size=96)
        seen = set()
        for n_sequences in (2, 4, 6):
            step = next(iter(walk(model, random_tokens(n_sequences), pruner.needs, min_expert_tokens=0)))
            counts = {unit.name: step.streams[unit.intermediate].n_tokens for unit in step.block.units if unit.routed}
            rare = next(iter(walk(model, random_tokens(n_sequences), pruner.needs))).rare
            assert rare == {name: n for name, n in counts.items() if n < least}
            seen |= {n < least for n in counts.values()}
        assert seen == {True, False}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@torch.no_grad()
def test_every_way_to_run_experts_gives_the_same_masks_and_is_put_back(implementation):
    models = [tiny_model("qwen2_moe") for _ in range(2)]
    models[0].set_experts_implementation("eager")
    models[1].set_experts_implementation(implementation)
    for model in models:
        prune_model(model, BlockPruner(method("wanda", "2:4")), random_tokens())
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(weight == 0, other == 0), name
    assert models[1].get_experts_implementation() == {"": implementation}


@pytest.mark.parametrize("targets", ["mlp", "all"])
@torch.no_grad()
def test_blocks_that_share_keys_and_values_share_none_between_batches(targets):
    """The last two blocks of this Gemma 4 read what earlier ones put into an object that is new in each forward."""
    model = tiny_model(
        "gemma4_text",
        torch.float64,
        enable_moe_block=False,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        output_hidden_states=True,  # else transformers 5.23 takes an input for each layer for granted
    )
    if targets == "mlp":
        both_walks(model, "gemma4_text", method("wanda", "2:4"))
        return
    with pytest.raises(DassError, match=r"attention of model\.layers\.2 is not made of q, k, v"):
        prune_model(model, BlockPruner(method("wanda", "2:4"), targets), random_tokens())


@pytest.fixture
def tied():
    """A criterion that needs statistics of an MLP alone."""

    @criterion(gate=("intermediate_norm",), up=("intermediate_norm",))
    def tied(weight, role, statistics):
        """S_ij = |W_ij| n_i^(1/2) for gate and up, |W_ij| for the rest."""
        return weight.abs() * (statistics.intermediate_norm.sqrt()[:, None] if role in ("gate", "up") else 1)

    yield Method("tied", ALONG_OUTPUTS, NM(2, 4))
    del CRITERIA["tied"]


@pytest.mark.parametrize("layout", ["llama_biased", "gpt_neox", "falcon_serial", "qwen2_moe"])
@torch.no_grad()
def test_attention_that_is_pruned_without_statistics_runs_again(layout, tied):
    """What enters the next block must come from the pruned attention, though the walk need not look at it."""
    both_walks(fresh(layout), layout, tied, "all")


@torch.no_grad()
def test_attention_that_is_changed_unforeseen_is_told(tied):
    """What entered the block is gone: x + m stands in its place."""
    model = fresh("llama_biased")
    for step in (steps := walk(model, random_tokens(2), BlockPruner(tied).needs)):
        step.block.attention["o"].weight.mul_(0.5)
        break
    with pytest.raises(DassError, match=r"of model.layers.0 was changed.*fixed_mixers=False"):
        next(steps)


class Counting(torch.nn.Module):
    """A block that asks for the length of what its mixer gives."""

    def __init__(self):
        super().__init__()
        self.mixer = torch.nn.Linear(4, 4)

    def forward(self, hidden):
        mixed = self.mixer(hidden)
        return hidden + mixed if len(mixed) else hidden


def test_a_block_that_takes_no_single_number_keeps_both():
    module, hidden = Counting(), torch.zeros(2, 8, 4)
    assert not computes_from_sum(Block("a block", module, module.mixer, (), {}), Call((), {}), hidden, hidden)


ADDING = {"llama_biased": True, "phi3": True, "gpt2": True, "qwen2_moe": True, "opt": True}
ADDING |= {"gpt_neox": False, "falcon": False, "bloom": False, "gemma3": False}


@pytest.mark.parametrize("layout", ["gpt_neox", "gemma3", "llama_biased"])
@torch.no_grad()
def test_padding_tells_nothing_of_how_a_block_adds(layout):
    """Where the first tokens are zeros and attention gives zeros for them."""
    input_ids, found = random_tokens(3), []
    input_ids[:, :6] = 0
    for fixed in (True, False):
        model = fresh(layout) if layout in LAYOUTS else tiny_model(layout, torch.float64)
        model.get_input_embeddings().weight[0] = 0
        for name, parameter in model.named_parameters():
            if ("attn" in name or "attention" in name) and name.endswith("bias"):
                parameter.zero_()
        pruner = BlockPruner(method("wanda", "2:4"))
        for step in walk(model, input_ids, pruner.needs, fixed_mixers=fixed):
            pruner.prune(step.block, step.streams)
        found.append(model.state_dict())
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("layout", ADDING)
@torch.no_grad()
def test_what_attention_gave_takes_no_memory_of_its_own(layout, monkeypatch):
    """Where the block adds it and reads nothing else of what entered; elsewhere both are kept, batch by batch."""
    beside = []
    monkeypatch.setattr(Parked, "beside", lambda self, values: beside.append(1) or Parked(self.device, values=values))
    next(iter(walk(fresh(layout), random_tokens(2), BlockPruner(method("wanda", "2:4")).needs)))
    assert bool(beside) != ADDING[layout]


@pytest.mark.parametrize(("targets", "exclude", "runs"), [("all", None, 4), ("all", "attn", 2), ("mlp", None, 2)])
@torch.no_grad()
def test_attention_runs_again_only_where_it_was_pruned(targets, exclude, runs, tied):
    model = fresh("llama_biased")
    counts = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: counts.append(1))
    prune_model(model, BlockPruner(tied, targets, exclude), random_tokens(4), batch_size=2)
    assert len(counts) == runs + 1  # the first block runs once to see what blocks return
