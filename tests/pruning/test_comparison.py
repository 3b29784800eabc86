"""The comparison against outputs that are really computed, and against each method run alone."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch

from dass.errors import DassError
from dass.pruning.blocks import MLP_ROLES
from dass.pruning.comparison import (
    check_comparison,
    compare_block,
    comparison_needs,
    diagnostics,
    norm_spread,
    reordered_share,
)
from dass.pruning.criteria import CRITERIA, criterion
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import InputStream
from dass.pruning.walk import prune_model, walk
from tests.models import random_tokens, tiny_model
from tests.pruning.naive import decoder, look, matrices_of

ALONG_INPUTS = dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in")
ALONG_OUTPUTS = {**ALONG_INPUTS, "gate": "out", "up": "out"}


def pruners(pattern=NM(2, 4), targets="mlp"):  # noqa: B008  (frozen)
    methods = {
        "magnitude": Method("magnitude", ALONG_INPUTS, pattern),
        "sparsegpt": Method("obs", ALONG_INPUTS, pattern, "obs"),
        "dass": Method("dass", ALONG_OUTPUTS, pattern),
        "repaired": Method("dass", ALONG_OUTPUTS, pattern, "obs"),
    }
    return {name: BlockPruner(method, targets) for name, method in methods.items()}


def compare(model, chosen, input_ids):
    """What a caller of the walk writes."""
    check_comparison(chosen)
    for pruner in chosen.values():
        pruner.check(find_blocks(model))
    steps = walk(model, input_ids, partial(comparison_needs, chosen), batch_size=2)
    return diagnostics([compare_block(chosen, step.block, step.streams, step.outputs) for step in steps])


def inputs_of(model, linear, input_ids):
    """What enters a layer in one plain forward of the whole model, `(tokens, in_features)`."""
    return passing(model, linear, input_ids)[0]


def passing(model, module, input_ids):
    """What enters a module in one plain forward of the whole model, and what leaves it, `(tokens, features)` each."""
    seen = []
    hook = module.register_forward_hook(lambda module, given, output: seen.extend((given[0].clone(), output.clone())))
    with torch.no_grad():
        model(input_ids)
    hook.remove()
    return [one.flatten(0, -2) for one in seen]


@pytest.mark.parametrize("targets", ["mlp", "all"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.3)], ids=str)
def test_errors_and_overlaps_are_those_of_each_method_alone(pattern, targets):
    model, input_ids = tiny_model(dtype=torch.float64), random_tokens()
    chosen = pruners(pattern, targets)
    measured = compare(model, chosen, input_ids)
    roles = MLP_ROLES if targets == "mlp" else tuple(ALONG_INPUTS)
    for index, block in enumerate(find_blocks(model)):
        kept = {}
        for name, pruner in chosen.items():
            alone = copy.deepcopy(model)
            only = BlockPruner(pruner.method, targets, exclude=rf"layers\.(?!{index}\.)")
            prune_model(alone, only, input_ids)
            for role in roles:
                layer = next(p.name for p in block.projections if p.role == role)
                linear, pruned = model.get_submodule(layer), alone.get_submodule(layer)
                x = inputs_of(model, linear, input_ids)
                with torch.no_grad():
                    y, lost = linear(x), linear(x) - pruned(x)
                expected = (lost.square().sum() / y.square().sum()).item()
                assert 0 < expected < 2
                assert measured["errors"][name][role][index] == pytest.approx(expected, rel=1e-9)
                kept[name, role] = set(map(tuple, pruned.weight.nonzero().tolist()))
        for pair, by_role in measured["jaccard"].items():
            one, other = pair.split("|")
            for role in roles:
                a, b = kept[one, role], kept[other, role]
                assert by_role[role][index] == pytest.approx(len(a & b) / len(a | b), rel=1e-6)
    assert len(measured["jaccard"]) == 6
    assert measured["jaccard"]["dass|repaired"]["gate"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("architecture", "adds"),
    [
        ("llama", "mlp"),
        ("gemma3", "post_feedforward_layernorm"),
        ("phi3", "mlp"),
        ("falcon", "mlp"),  # with biases, and beside attention, which is added to it in place
        ("mixtral", "mlp"),
    ],
)
@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_the_error_of_the_whole_mlp_is_that_of_what_it_adds(architecture, adds, targets):
    """On a quarter of the sequences, rounded up: two of six."""
    model, input_ids = tiny_model(architecture, torch.float64), random_tokens(6, 40)
    chosen = pruners(targets=targets)
    measured = compare(model, chosen, input_ids)["errors"]
    for index, block in enumerate(find_blocks(model)):
        place = f"{block.name}.{adds}"
        dense = passing(model, model.get_submodule(place), input_ids[:2])[1]
        for name in ("dass", "sparsegpt"):
            alone = copy.deepcopy(model)
            only = BlockPruner(chosen[name].method, exclude=rf"\b(?:h|layers)\.(?!{index}\.)")
            for step in walk(alone, input_ids, partial(comparison_needs, {name: only}), 2):
                only.prune(step.block, step.streams)
            lost = dense - passing(alone, alone.get_submodule(place), input_ids[:2])[1]
            expected = (lost.square().sum() / dense.square().sum()).item()
            assert 0 < expected < 2
            assert measured[name]["mlp"][index] == pytest.approx(expected, rel=1e-5)


def test_the_kept_importance_by_hand():
    model, input_ids = tiny_model(dtype=torch.float64), random_tokens()
    chosen = pruners()
    measured = compare(model, chosen, input_ids)["kept"]
    assert list(measured) == list(chosen) and list(measured["dass"]) == list(MLP_ROLES)
    mlp = model.model.layers[0].mlp
    n = inputs_of(model, mlp.down_proj, input_ids).norm(dim=0)
    for name, pruner in chosen.items():
        alone = copy.deepcopy(model)
        masks = prune_model(alone, pruner, input_ids)
        for role in MLP_ROLES:
            linear = mlp.get_submodule(f"{role}_proj")
            x, weight, keep = (
                inputs_of(model, linear, input_ids),
                linear.weight,
                masks[f"model.layers.0.mlp.{role}_proj"].keep,
            )
            if name == "magnitude":
                scores = weight.abs()
            elif name == "sparsegpt":
                hessian = x.T @ x
                damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
                scores = (weight / torch.linalg.cholesky(damped.inverse(), upper=True).diagonal()) ** 2
            else:
                scores = weight.abs() * (n if role == "down" else n[:, None] ** 0.5)
            expected = (scores[keep].sum() / scores.sum()).item()
            assert 0.5 < expected < 1
            assert measured[name][role][0] == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_errors_of_several_mlps_are_those_of_all_their_outputs():
    """Of each expert for its own tokens, and for all that are routed where it saw too few."""
    model, input_ids, layout = tiny_model("qwen2_moe", torch.float64), random_tokens(2, 12), "qwen2_moe"
    chosen = pruners()
    measured = compare(model, chosen, input_ids)
    rare = 0
    for index, block in enumerate(decoder(model)):
        mlps = look(model, layout, block, input_ids, lambda neurons: 16, attention=False)
        # all tokens run through an expert that saw few; each is routed to two, and so counts twice
        times = [2 if seen.n_seen is not None and seen.n_seen < 16 else 1 for seen in mlps]
        rare += sum(times) - len(times)
        for name, pruner in chosen.items():
            alone = copy.deepcopy(model)
            only = BlockPruner(pruner.method, exclude=rf"layers\.(?!{index}\.)")
            for step in walk(alone, input_ids, only.needs, min_expert_tokens=16):
                only.prune(step.block, step.streams)
            after = matrices_of(layout, decoder(alone)[index])
            for role in MLP_ROLES:
                lost = whole = 0.0
                for seen, n in zip(mlps, times, strict=True):
                    x, weight = seen.inputs[role], seen.matrices[role]
                    lost += n * (x @ (weight - after[seen.name][role]).T).square().sum().item()
                    whole += n * (x @ weight.T).square().sum().item()
                assert measured["errors"][name][role][index] == pytest.approx(lost / whole, rel=1e-9)
        norms = torch.cat([n**0.5 * seen.inputs["down"].norm(dim=0) for seen, n in zip(mlps, times, strict=True)])
        assert measured["norms"]["cv"][index] == pytest.approx((norms.std(correction=0) / norms.mean()).item())
    assert rare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_stays_dense_bit_for_bit(dtype):
    model = tiny_model(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    compare(model, pruners(), random_tokens())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_method_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    monkeypatch.delitem(CRITERIA, "broken", raising=False)

    @criterion()
    def broken(weight, role, statistics):
        """NaN for the down projection, which comes after gate and up."""
        return weight.abs() * (float("nan") if role == "down" else 1)

    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    chosen = pruners() | {"broken": BlockPruner(Method("broken", ALONG_INPUTS, NM(2, 4)))}
    with pytest.raises(DassError, match=r"layers\.0\.mlp\.down_proj hold NaN"):
        compare(model, chosen, random_tokens())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_what_a_method_leaves_dense_has_no_number():
    chosen = pruners()
    chosen["magnitude"] = BlockPruner(chosen["magnitude"].method, exclude="(gate|up)_proj$")
    chosen["dass"] = BlockPruner(chosen["dass"].method, exclude=r"layers\.1\..*gate")
    measured = compare(tiny_model(), chosen, random_tokens())
    assert list(measured["errors"]["magnitude"]) == ["down", "mlp"]
    assert list(measured["kept"]["magnitude"]) == ["down"] == list(measured["jaccard"]["magnitude|dass"])
    missing = [value is None for value in measured["errors"]["dass"]["gate"]]
    assert missing == [False, True, False] == [v is None for v in measured["jaccard"]["sparsegpt|dass"]["gate"]]


def test_a_block_whose_mlp_a_method_leaves_dense_has_no_error():
    chosen = {name: BlockPruner(pruner.method, "all") for name, pruner in pruners().items()}
    chosen["magnitude"] = BlockPruner(chosen["magnitude"].method, "all", r"layers\.1\.mlp")
    measured = compare(tiny_model(), chosen, random_tokens())["errors"]
    assert [value is None for value in measured["magnitude"]["mlp"]] == [False, True, False]
    assert None not in measured["magnitude"]["o"]


def test_the_norms_are_measured_on_what_the_mlp_reads():
    model, input_ids = tiny_model(dtype=torch.float64), random_tokens()
    chosen = {name: BlockPruner(pruner.method, exclude="down_proj$") for name, pruner in pruners().items()}
    measured = compare(model, chosen, input_ids)["norms"]
    for index, block in enumerate(find_blocks(model)):
        mlp = model.get_submodule(block.name).mlp
        x, n = (inputs_of(model, one, input_ids).square().sum(0).sqrt().numpy() for one in (mlp.up_proj, mlp.down_proj))
        for norms, prefix in ((n, ""), (x, "input_")):
            assert measured[f"{prefix}cv"][index] == pytest.approx(norms.std() / norms.mean())
            ratio = np.percentile(norms, 90) / np.percentile(norms, 10)
            assert measured[f"{prefix}p90_p10"][index] == pytest.approx(ratio)
        shares = [reordered_share(layer.weight, torch.from_numpy(n)) for layer in (mlp.gate_proj, mlp.up_proj)]
        assert measured["reordered"][index] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_reordered_pairs_by_looking_at_each(alpha):
    generator = torch.Generator().manual_seed(0)
    weight, n = torch.randn(12, 7, generator=generator), torch.rand(12, generator=generator)
    turned = 0
    for j in range(7):
        for i in range(11):
            a, b = abs(weight[i, j].item()), abs(weight[i + 1, j].item())
            turned += (a < b) != (a * n[i].item() ** alpha < b * n[i + 1].item() ** alpha)
    assert reordered_share(weight, n, alpha) == pytest.approx(turned / 77)
    assert (turned > 0) == (alpha > 0)


def test_uniform_norms_reorder_nothing_and_silent_neurons_give_no_ratio():
    block = find_blocks(tiny_model())[0]

    def spread(norms):
        streams = {}
        for reads, own in (("intermediate", norms), ("mlp input", norms[:32])):
            streams[reads] = InputStream(len(own), torch.float32, torch.device("cpu"), False)
            streams[reads].add(own[None])
        return norm_spread(block, streams)

    uniform = spread(torch.full((64,), 3.0))
    assert (uniform.cv, uniform.p90_p10, uniform.reordered, uniform.input_cv, uniform.input_p90_p10) == (0, 1, 0, 0, 1)
    assert spread(torch.arange(64.0).sub(20).relu()).p90_p10 is None
    silent = spread(torch.zeros(64))
    assert (silent.cv, silent.p90_p10, silent.reordered, silent.input_cv) == (None, None, 0, None)


def test_json_takes_what_a_dead_block_leaves():
    """A down projection that reads only zeros has no relative error."""
    model = tiny_model()
    torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    measured = compare(model, pruners(), random_tokens())
    assert measured["errors"]["dass"]["down"][1] is None and measured["norms"]["cv"][1] is None
    assert measured["errors"]["dass"]["mlp"][1] is None and measured["kept"]["dass"]["gate"][1] is None
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"one": BlockPruner(Method("wanda", {}, NM(2, 4)))}, "at least two methods"),
        ({p: BlockPruner(Method("wanda", {}, NM(2, int(p)))) for p in "48"}, r"their pattern \(2:4, 2:8\)"),
        ({t: BlockPruner(Method("wanda", {}, NM(2, 4)), t) for t in ("mlp", "all")}, r"their targets \(all, mlp\)"),
    ],
)
def test_refuses_what_cannot_be_compared(chosen, message):
    with pytest.raises(DassError, match=message):
        check_comparison(chosen)


def test_refuses_what_one_method_cannot_do_before_anything_runs():
    chosen = {name: BlockPruner(pruner.method) for name, pruner in pruners(NM(2, 48)).items()}
    with pytest.raises(DassError, match="M=48 does not divide"):
        compare(tiny_model(), chosen, random_tokens())
    with pytest.raises(DassError, match="needs calibration tokens"):
        compare(tiny_model(), pruners(), None)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "llama"])
def test_each_expert_by_itself(architecture):
    """Against its equation, on the tokens that the router sends it."""
    model, input_ids = tiny_model(architecture, dtype=torch.float64), random_tokens(8)
    chosen = {name: one for name, one in pruners().items() if name in ("dass", "magnitude")}
    steps = walk(model, input_ids, partial(comparison_needs, chosen), min_expert_tokens=1)
    for step in steps:
        found = compare_block(chosen, step.block, step.streams, step.outputs, {}).experts
        routed = [unit for unit in step.block.units if unit.routed]
        assert [one.index for one in found] == list(range(len(routed))) and bool(routed) == (architecture != "llama")
        if not routed:
            continue
        experts, seen = routed[0].projections["down"].module, []
        with experts.register_forward_hook(lambda module, given, output, seen=seen: seen.append(given[:2])):
            list(step.outputs(0.25))
        hidden, chosen_by = (torch.cat([one[i] for one in seen]) for i in (0, 1))

        def writes(e, hidden=hidden, chosen_by=chosen_by, experts=experts):
            x = hidden[(chosen_by == e).any(-1)]
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up @ experts.down_proj[e].T

        dense = [writes(e) for e in range(len(routed))]
        before = {name: p.clone() for name, p in experts.named_parameters()}
        for name, pruner in chosen.items():
            pruner.prune(step.block, step.streams)
            for e, one in enumerate(found):
                expected = (writes(e) - dense[e]).square().sum() / dense[e].square().sum()
                assert one.errors[name] == pytest.approx(expected.item(), rel=1e-4)
                assert one.tokens == step.streams[routed[e].intermediate].n_tokens
            for key, p in experts.named_parameters():
                p.data.copy_(before[key])


@pytest.mark.parametrize(("activation", "share"), [("relu", 0.5), ("silu", 0.0)])
def test_the_share_of_zeros(activation, share):
    model, input_ids = tiny_model(hidden_act=activation), random_tokens(8)
    found = compare(model, pruners(), input_ids)["zeros"]
    assert len(found) == 3 and found == pytest.approx([share] * 3, abs=0.1 if share else 0.0)
