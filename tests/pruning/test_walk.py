"""The walk against a naive implementation that keeps everything and re-runs whole blocks."""

import copy

import pytest
import torch
from torch.nn.functional import linear
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dass.errors import DassError
from dass.pruning.blocks import resident
from dass.pruning.calls import block_by_block, enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.mixed import TRIED
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from tests.models import ARCHITECTURES, DEEPSEEK, SMALL, random_tokens, tiny_model

ALONG_INPUTS = dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in")
DASS = Method("dass", {**ALONG_INPUTS, "gate": "out", "up": "out"}, NM(2, 4))
WANDA = Method("wanda", ALONG_INPUTS, NM(2, 4))


def inputs_of(model, input_ids, linears):
    """All activations that enter these layers in one plain forward of the whole model, `(tokens, in_features)`."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, n=name: seen.setdefault(n, []).append(a[0].double()))
        for name, layer in linears.items()
    ]
    for row in input_ids:
        model(row[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in seen.items()}


def prune_two_of_four(scores, axis):
    """Two of four consecutive weights, by sorting each group in plain Python."""
    scores = scores if axis == "in" else scores.T
    keep = torch.ones_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], 4):
            order = sorted(range(start, start + 4), key=lambda j: (scores[row, j].item(), j))
            keep[row, order[:2]] = False
    return keep if axis == "in" else keep.T


def naive(model, input_ids, criterion, roles):
    """Prune block by block; before each block, the whole model runs again on every sequence, alone."""
    for block in model.model.layers:
        places = {role: block.self_attn if role in "qkvo" else block.mlp for role in (*roles, "down")}
        linears = {role: place.get_submodule(f"{role}_proj") for role, place in places.items()}
        inputs = inputs_of(model, input_ids, linears)
        norms = {role: x.square().sum(0).sqrt() for role, x in inputs.items()}
        for role in roles:
            weight = linears[role].weight.data
            if criterion == "dass" and role in ("gate", "up"):
                keep = prune_two_of_four(weight.double().abs() * norms["down"].sqrt()[:, None], "out")
            else:
                keep = prune_two_of_four(weight.double().abs() * norms[role], "in")
            weight[~keep] = 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "targets"), [(DASS, "mlp"), (WANDA, "all")], ids=["dass-mlp", "wanda-all"])
@torch.no_grad()
def test_equals_the_naive_walk(architecture, method, targets):
    model = tiny_model(architecture, torch.float64)
    expected = copy.deepcopy(model)
    input_ids = random_tokens()
    prune_model(model, BlockPruner(method, targets), input_ids, batch_size=2)
    naive(expected, input_ids, method.criterion, ALONG_INPUTS if targets == "all" else ("gate", "up", "down"))
    for (name, weight), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(weight, wanted), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_is_called_as_the_model_calls_it(architecture):
    model = tiny_model(architecture)
    blocks = find_blocks(model)
    input_ids = random_tokens(2, 24)
    seen = []
    hooks = [
        block.module.register_forward_pre_hook(lambda m, a, k: seen.append((a[1:], k)), with_kwargs=True)
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        activations = enter_first_block(model, blocks, input_ids.split(2))
    (calls,) = activations.calls
    assert len(calls) == len(seen) == 3
    for call, (arguments, keywords) in zip(calls, seen, strict=True):
        assert len(call.arguments) == len(arguments)
        assert call.keywords.keys() == keywords.keys()
        for key in keywords:
            torch.testing.assert_close(call.keywords[key], keywords[key], rtol=0, atol=0)
    assert not any("forward" in block.module.__dict__ for block in blocks)


@pytest.mark.parametrize("returns_tuple", [False, True])
@torch.no_grad()
def test_blocks_that_return_tuples(returns_tuple, monkeypatch):
    """Older releases of transformers return (hidden_states, ...) from a block and take [0] of it."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, input_ids = tiny_model(dtype=torch.float64), random_tokens()
    expected = copy.deepcopy(model)
    prune_model(expected, BlockPruner(DASS), input_ids)
    if returns_tuple:
        original = LlamaDecoderLayer.forward

        class Unwrapping(torch.nn.ModuleList):
            """Stands for the old model's loop, which takes [0] of what a block returns."""

            def __getitem__(self, index):
                layers = list(self)[index]
                return [lambda *a, layer=layer, **k: layer(*a, **k)[0] for layer in layers]

        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *a, **k: (original(*a, **k), "more"))
        model.model.layers = Unwrapping(model.model.layers)
    prune_model(model, BlockPruner(DASS), input_ids)
    for wanted, weight in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted, weight)


@pytest.mark.parametrize("targets", ["mlp", "all"])
@torch.no_grad()
def test_an_mlp_before_attention_computes_and_attention_reads_what_it_gives_once_pruned(targets):
    """Half an MLP's output is added to what enters attention, as in a Macaron block."""
    model = tiny_model(dtype=torch.float64)
    for block in model.model.layers:
        block.first = copy.deepcopy(block.mlp)
        block.first.apply(lambda m: m.weight.normal_(std=0.2) if isinstance(m, torch.nn.Linear) else None)
    plain = type(model.model.layers[0]).forward
    expected, input_ids = copy.deepcopy(model), random_tokens()
    for block in (*model.model.layers, *expected.model.layers):
        block.forward = lambda x, block=block, **k: plain(block, x + 0.5 * block.first(block.input_layernorm(x)), **k)
    prune_model(model, BlockPruner(WANDA, targets), input_ids, batch_size=2)
    for block in expected.model.layers:
        names = [name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        linears = {name: block.get_submodule(name) for name in names if targets == "all" or "attn" not in name}
        for name, x in inputs_of(expected, input_ids, linears).items():
            keep = prune_two_of_four(linears[name].weight.abs() * x.square().sum(0).sqrt(), "in")
            linears[name].weight[~keep] = 0
    for (name, weight), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(weight, wanted), name


@torch.no_grad()
def test_what_experts_give_is_not_computed_and_whoever_reads_it_is_told():
    model = tiny_model("mixtral")
    block, layer = model.model.layers[1], type(model.model.layers[1]).forward
    block.forward = lambda x, **k: layer(block, x + block.mlp(x), **k)
    with pytest.raises(DassError, match=r"expert model\.layers\.1.* runs before its MixtralAttention"):
        prune_model(model, BlockPruner(WANDA), random_tokens())
    del block.forward
    experts = type(block.mlp).forward
    block.last = copy.deepcopy(tiny_model(hidden_size=16).model.layers[0].mlp)
    block.mlp.forward = lambda x: block.last(experts(block.mlp, x))
    with pytest.raises(DassError, match=r"statistics of model\.layers\.1\.last.*NaN"):
        prune_model(model, BlockPruner(WANDA), random_tokens())


def sparse_attention(*indexers):
    """A GLM of the real class: a block that is `shared` attends to the tokens that an earlier block returned."""
    own = {"head_dim": 4, "index_topk": 6, "index_n_heads": 2, "index_head_dim": 8, "indexer_types": list(indexers)}
    config = CONFIG_MAPPING["glm_moe_dsa"](**SMALL | DEEPSEEK | own | {"num_hidden_layers": len(indexers)})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_what_a_block_returns_for_another_one_is_told_where_that_one_reads_it():
    tokens, pruner = random_tokens(4, 24), BlockPruner(WANDA)
    model = sparse_attention("full", "full", "shared")
    with pytest.raises(DassError, match="hands state from block to block"):
        prune_model(model, pruner, tokens, 2, min_expert_tokens=0)
    with pytest.raises(DassError, match="hands state from block to block"):
        next(iter(block_by_block(model, find_blocks(model), tokens.split(2), resident)))
    model = sparse_attention("full", "full", "full")  # the model hands it on all the same
    scores = model.lm_head(torch.cat([model.model(part, use_cache=False)[0] for part in tokens.split(2)]))
    ready = block_by_block(model, find_blocks(model), tokens.split(2), resident)
    for part, wanted, handed_over in zip(tokens.split(2), scores.split(2), ready, strict=True):
        with handed_over:
            assert torch.equal(model(part, use_cache=False).logits, wanted)
    calls = enter_first_block(model, find_blocks(model), tokens.split(2))
    assert calls.calls[0] is calls.calls[1] and not calls.share_state
    prune_model(model, pruner, tokens, 2, min_expert_tokens=0)


@torch.no_grad()
def test_arguments_that_depend_on_the_tokens():
    """Each batch keeps the call that the model made for it, here with rotary embeddings scaled by its tokens."""
    model, input_ids = tiny_model(dtype=torch.float64), random_tokens()
    original = type(model.model.rotary_emb).forward
    model.model.rotary_emb.forward = lambda x, position_ids: [
        part * (1 + x.mean()) for part in original(model.model.rotary_emb, x, position_ids)
    ]
    expected = copy.deepcopy(model)
    prune_model(model, BlockPruner(WANDA, "all"), input_ids)
    naive(expected, input_ids, "wanda", ALONG_INPUTS)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(set(map(id, enter_first_block(model, find_blocks(model), input_ids.split(1)).calls))) == len(input_ids)
    del model.model.rotary_emb.forward
    assert len(set(map(id, enter_first_block(model, find_blocks(model), input_ids.split(1)).calls))) == 1


def test_statistics_that_miss_tokens_are_no_statistics():
    """An MLP that multiplies with a copy of its weights, or works in pieces, would be pruned on what was seen."""
    model = tiny_model()
    mlp, whole = model.model.layers[1].mlp, type(model.model.layers[1].mlp).forward
    mlp.forward = lambda x: linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight.clone())
    with pytest.raises(DassError, match=r"layers\.1 has an unknown layout.*intermediate passed 0 of 120 tokens"):
        prune_model(model, BlockPruner(DASS), random_tokens())
    mlp.forward = lambda x: torch.cat([whole(mlp, part) for part in x.split(20, dim=1)], dim=1)
    with pytest.raises(DassError, match=r"layers\.1 has an unknown layout.*intermediate passed 100 of 120 tokens"):
        prune_model(model, BlockPruner(DASS), random_tokens())
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(2 * x))
    with pytest.raises(DassError, match=r"gate_proj and .*up_proj do not read the same tensor"):
        prune_model(model, BlockPruner(WANDA), random_tokens())
    model = tiny_model()
    model.config.num_hidden_layers = 2
    with pytest.raises(DassError, match="runs 2 of the 3 blocks"):
        prune_model(model, BlockPruner(DASS), random_tokens())


@pytest.mark.parametrize(
    ("role", "what"),
    [("down", "weights of .*down_proj"), ("input", "statistics of .*gate_proj and")],
)
@torch.no_grad()
def test_what_is_not_finite_is_named_before_a_weight_of_its_block_is_changed(role, what):
    model = tiny_model()
    block = find_blocks(model)[1]
    if role == "input":
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    else:
        block.units[0].projections[role].weight[5, 7] = torch.nan
    before = [p.weight.clone() for p in block.projections]
    with pytest.raises(DassError, match=rf"The (calibration )?{what}.* hold NaN or infinite"):
        prune_model(model, BlockPruner(WANDA), random_tokens())
    for p, weight in zip(block.projections, before, strict=True):
        torch.testing.assert_close(p.weight, weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("criterion", ["wanda", "obs", "dass"])
@torch.no_grad()
def test_activations_that_are_no_numbers_are_told_with_block_projection_and_batch(criterion, value):
    """A token that is only in sequence 5 is no number behind the second block's norm."""
    model, tokens = tiny_model(), random_tokens(7, 12).clamp(max=90)
    tokens[5, 4] = 95
    model.model.embed_tokens.weight[95] = 1e6  # which the residual stream keeps
    norm = model.model.layers[1].post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x).masked_fill(x.abs().amax(-1, keepdim=True) > 1e5, value)
    update = "obs" if criterion == "obs" else "none"
    pruner = BlockPruner(Method(criterion, ALONG_INPUTS, NM(2, 4), update))
    said = r"of model\.layers\.1\.mlp\.(gate|up)_proj .*NaN or infinite values since the batch that begins with .* 4:"
    with pytest.raises(DassError, match=said):
        prune_model(model, pruner, tokens, batch_size=2)


@pytest.mark.parametrize("how", ["few tokens", "the same tokens", "dead"])
@torch.no_grad()
def test_a_singular_hessian_is_damped(how):
    model, tokens = tiny_model(), random_tokens(4, 6)
    if how == "dead":
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    tokens = tokens[:1, :3] if how == "few tokens" else tokens[:1].expand(4, 6) if how == "the same tokens" else tokens
    prune_model(model, BlockPruner(Method("obs", ALONG_INPUTS, NM(2, 4), "obs"), "all"), tokens)
    assert all(p.isfinite().all() for p in model.parameters())
    assert (model.model.layers[1].mlp.down_proj.weight == 0).float().mean() >= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    """Weights stay in the model's dtype and keep their bits; masks are nearly those of fp32."""
    half = tiny_model(dtype=dtype)
    dense, whole = copy.deepcopy(half), copy.deepcopy(half).float()
    for model in (half, whole):
        prune_model(model, BlockPruner(DASS), random_tokens(12))
    for (name, weight), other in zip(half.named_parameters(), whole.parameters(), strict=True):
        assert weight.dtype == dtype
        kept = weight != 0
        assert torch.equal(weight[kept], dense.get_parameter(name)[kept])
        assert (kept == (other != 0)).float().mean() > 0.97, name


@torch.no_grad()
def test_attention_runs_once_when_only_the_mlp_is_pruned():
    runs = {}
    for targets in ("mlp", "all"):
        model = tiny_model()
        block = model.model.layers[1]
        counts = {"attention": 0, "gate": 0, "down": 0}
        for name, module in [
            ("attention", block.self_attn.q_proj),
            ("gate", block.mlp.gate_proj),
            ("down", block.mlp.down_proj),
        ]:
            # whole sequences: a few tokens are tried, see `Mixed`
            module.register_forward_hook(lambda m, x, y, n=name, c=counts: c.update({n: c[n] + (y.shape[1] > TRIED)}))
        prune_model(model, BlockPruner(WANDA, targets), random_tokens(4), batch_size=2)
        runs[targets] = counts
    assert runs["mlp"] == {"attention": 2, "gate": 4, "down": 2}
    assert runs["all"] == {"attention": 4, "gate": 4, "down": 2}


@torch.no_grad()
def test_batch_size_does_not_matter():
    models = []
    for batch_size in (1, 3, 5):
        model = tiny_model(dtype=torch.float64)
        prune_model(
            model, BlockPruner(Method("obs", ALONG_INPUTS, Unstructured(0.5), "obs")), random_tokens(), batch_size
        )
        models.append(model)
    for model in models[1:]:
        for wanted, weight in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_same_tokens_give_the_same_bits():
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        prune_model(model, BlockPruner(Method("obs", ALONG_INPUTS, NM(2, 4), "obs"), "all"), random_tokens())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("criterion", ["wanda", "dass", "obs"])
@torch.no_grad()
def test_one_thread_or_two(criterion):
    """Norms are the same bits; products of Hessians are summed in another order, which SparseGPT amplifies."""
    axis = {**ALONG_INPUTS, "gate": "out", "up": "out"} if criterion == "dass" else ALONG_INPUTS
    pruner = BlockPruner(Method(criterion, axis, NM(2, 4), "obs" if criterion == "obs" else "none"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = tiny_model(hidden_size=128, intermediate_size=352, num_hidden_layers=1)
            masks = prune_model(model, pruner, random_tokens(8, 64), 4)
            found.append(torch.cat([mask.keep.flatten() for mask in masks.values()]))
    finally:
        torch.set_num_threads(before)
    differ = (found[0] != found[1]).float().mean()
    assert differ == 0 if criterion != "obs" else differ < 1e-3


def test_excluded_projections_stay_dense():
    model, dense = tiny_model(), tiny_model()
    masks = prune_model(model, BlockPruner(WANDA, exclude=r"layers\.1\.|up_proj"), random_tokens())
    for name, weight in model.named_parameters():
        pruned = ("gate_proj" in name or "down_proj" in name) and "layers.1." not in name
        assert torch.equal(weight, dense.get_parameter(name)) != pruned, name
    assert list(masks) == [f"model.layers.{i}.mlp.{role}_proj" for i in (0, 2) for role in ("gate", "down")]


def test_without_statistics_nothing_runs():
    model = tiny_model()
    model.base_model.forward = None
    prune_model(model, BlockPruner(Method("magnitude", ALONG_INPUTS, NM(2, 4)), "all"), None)
    assert (model.model.layers[0].self_attn.q_proj.weight == 0).float().mean() == 0.5
