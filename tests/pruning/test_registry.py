"""A criterion and an update registered from outside, as a stranger would, and what methods refuse in one sentence."""

from dataclasses import replace

import pytest
import torch

from dass.errors import DassError
from dass.pruning.criteria import CRITERIA, criterion
from dass.pruning.masks import NM, Unstructured, verify_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.registry import Registry
from dass.pruning.update import UPDATES, update
from dass.pruning.walk import prune_model
from tests.models import random_tokens, tiny_model

ALONG_INPUTS = dict.fromkeys(("gate", "up", "down"), "in")


@pytest.fixture(autouse=True)
def registries():
    """What a test adds is taken out again."""
    before = [(registry, dict(registry)) for registry in (CRITERIA, UPDATES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def outputs_of(model, input_ids, layer):
    """What enters a layer of a model, `(tokens, in_features)`."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids)
    hook.remove()
    return seen[0]


def add_criterion():
    called = []

    @criterion("input_norm", gate=("intermediate_norm",))
    def shifted(weight, role, statistics, shift=-1.5, power=2, squared=False, of="inputs"):
        """S_ij = |W_ij|^power (||x_j|| + shift^2), or with the norm of the outputs for the gate."""
        called.append((role, shift, power, squared, of))
        norm = statistics.intermediate_norm[:, None] if role == "gate" else statistics.input_norm
        assert of in ("inputs", "outputs")
        return weight.abs() ** power * (norm.square() if squared else norm + shift**2)

    return called


def test_a_criterion_registered_from_outside():
    called = add_criterion()
    given = {"shift": -3, "power": 3, "squared": True, "of": "outputs"}
    model, dense, input_ids = tiny_model(), tiny_model(), random_tokens()
    masks = prune_model(model, BlockPruner(Method("shifted", ALONG_INPUTS, NM(1, 4), parameters=given)), input_ids)
    assert {(role, *values) for role, *values in called} == {(role, -3.0, 3, True, "outputs") for role in ALONG_INPUTS}
    assert all(type(value) is kind for value, kind in zip(called[0][1:], (float, int, bool, str), strict=True))
    for name, weight in model.named_parameters():
        assert ((weight == 0).float().mean() == 0.75) == ("mlp" in name), name
    layer = dense.model.layers[0].mlp.down_proj
    x = outputs_of(dense, input_ids, layer)
    scores = layer.weight.detach().abs() ** 3 * x.square().sum(0)
    largest = scores.unflatten(1, (-1, 4)).argmax(-1)
    kept = masks["model.layers.0.mlp.down_proj"].keep.unflatten(1, (-1, 4))
    assert (kept.float().argmax(-1) == largest).float().mean() > 0.999 and (kept.sum(-1) == 1).all()
    prune_model(tiny_model(), BlockPruner(Method("shifted", ALONG_INPUTS, NM(1, 4))), input_ids)
    assert called[-1][1:] == (-1.5, 2, False, "inputs")


def add_update():
    called = []

    @update("input_norm", positive=("floor",))
    def rescaled(group, statistics, floor=1e-6, damped=False, offset=0):
        """W'_ij = s_i W_ij where kept; s_i makes the energy of a row, weighted by ||x_j||^2, what it was."""
        called.append(([rows.name for rows in group], floor, damped, offset))
        result, energy = [], statistics.input_norm.square()
        for rows in group:
            kept = rows.weight * rows.mask.keep
            scale = (rows.weight.square() @ energy / (kept.square() @ energy).clamp_min(floor)).sqrt()
            result.append((kept * (scale + offset)[:, None], rows.mask))
        return result

    return called


@pytest.mark.parametrize("layout", ["llama", "phi3", "gpt2", "gpt_oss"])
def test_an_update_registered_from_outside(layout):
    called = add_update()
    model, dense = tiny_model(layout, torch.float64), tiny_model(layout, torch.float64)
    method = Method("wanda", ALONG_INPUTS, NM(2, 4), "rescaled", {"floor": 1e-9, "damped": True, "offset": 0})
    input_ids, later = random_tokens(), r"(layers|h)\.[12]\."
    masks = prune_model(model, BlockPruner(method, exclude=later), input_ids)
    plain = tiny_model(layout, torch.float64)
    expected = prune_model(plain, BlockPruner(Method("wanda", ALONG_INPUTS, NM(2, 4)), exclude=later), input_ids)
    first = [name for name in masks if ".0." in name]
    assert first and all(values == [1e-9, True, 0] for _, *values in called)
    for name in first:
        verify_mask(masks[name], name)
        assert torch.equal(masks[name].keep, expected[name].keep)
    for name, weight in model.named_parameters():
        other, whole = plain.get_parameter(name), dense.get_parameter(name)
        assert torch.equal(weight == 0, other == 0), name
        if not torch.equal(other, whole):
            assert weight.norm() > 1.02 * other.norm()
    groups = [names for names, *_ in called]
    assert groups[:2] == ([first[:-1], first[-1:]] if layout != "gpt_oss" else [first[:2], first[2:3]])


def test_the_rescaled_rows_have_their_energy_back():
    add_update()
    model, dense, input_ids = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64), random_tokens()
    prune_model(model, BlockPruner(Method("magnitude", ALONG_INPUTS, Unstructured(0.5), "rescaled")), input_ids)
    old, new = dense.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.gate_proj
    energy = outputs_of(dense, input_ids, old).square().sum(0)
    torch.testing.assert_close(new.weight.square() @ energy, old.weight.square() @ energy)
    assert ((new.weight == 0).sum(1) == 16).all()


METHOD = {"criterion": "dass", "axis": {"gate": "out"}, "pattern": NM(2, 4)}


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"criterion": "wnada"}, "criterion", "did you mean wanda"),
        ({"criterion": "zzz"}, "criterion", "dass, dass_ria, magnitude, nowag, obs, ria, shifted, wanda"),
        ({"update": "sgd"}, "update", "none, obs, rescaled"),
        ({"update": "osb"}, "update", "did you mean obs"),
        ({"parameters": {"alhpa": 1.0}}, "alhpa", r"no parameter `alhpa` \(it has: alpha\)"),
        ({"parameters": {"damping": 1.0}}, "damping", r"no parameter `damping` \(it has: alpha\)"),
        ({"criterion": "magnitude", "parameters": {"x": 1}}, "x", r"no parameter `x` \(it has: none\)"),
        ({"parameters": {"alpha": "much"}}, "alpha", "alpha=much must be a finite number"),
        ({"parameters": {"alpha": True}}, "alpha", "alpha=True must be a finite number"),
        ({"parameters": {"alpha": float("inf")}}, "alpha", "alpha=inf must be a finite number"),
        ({"parameters": {"alpha": float("nan")}}, "alpha", "alpha=nan must be a finite number"),
        ({"parameters": {"alpha": 10**400}}, "alpha", "must be a finite number"),
        ({"parameters": {"alpha": None}}, "alpha", "alpha=None must be a finite number"),
        ({"criterion": "shifted", "parameters": {"power": 2.5}}, "power", "power=2.5 must be a whole number"),
        ({"criterion": "shifted", "parameters": {"power": float("nan")}}, "power", "must be a whole number"),
        ({"criterion": "shifted", "parameters": {"power": float("inf")}}, "power", "must be a whole number"),
        ({"criterion": "shifted", "parameters": {"squared": 1}}, "squared", "squared=1 must be true or false"),
        ({"criterion": "shifted", "parameters": {"of": 3}}, "of", "of=3 must be a word"),
        ({"update": "rescaled", "parameters": {"floor": 0.0}}, "floor", "floor=0.0 must be above 0"),
        ({"update": "obs", "parameters": {"damping": 0.0}}, "damping", "damping=0.0 must be above 0"),
        ({"update": "obs", "parameters": {"block_size": 0}}, "block_size", "block_size=0 must be above 0"),
        ({"update": "obs", "parameters": {"block_size": 1.5}}, "block_size", "must be a whole number"),
        ({"axis": {"gate": "rows"}}, "axis.gate", "axis gate=rows is unknown"),
        ({"axis": {"gates": "in"}}, "axis.gates", "axis gates=in is unknown"),
    ],
)
def test_methods_that_mean_nothing(changes, field, says):
    add_criterion()
    add_update()
    with pytest.raises(DassError, match=says) as caught:
        Method(**METHOD | changes)
    assert caught.value.field == f"method.{field}"
    assert "\n" not in str(caught.value)


def test_a_negative_parameter_is_a_number_like_any_other():
    add_criterion()
    assert Method("shifted", {}, NM(2, 4), parameters={"shift": -2}).all_parameters()["shift"] == -2
    assert Method("dass", {}, NM(2, 4), parameters={"alpha": -1.0}).all_parameters() == {"alpha": -1.0}


@pytest.mark.parametrize(("value", "kept"), [(2.0, 2), (3, 3)])
def test_a_whole_number_may_be_written_with_a_point(value, kept):
    add_criterion()
    method = Method("shifted", {}, NM(2, 4), parameters={"power": value})
    found = method.parameters_of(CRITERIA["shifted"])["power"]
    assert found == kept and type(found) is int


@pytest.mark.parametrize("role", ["gate", "down"])
def test_a_statistic_that_is_read_must_be_declared(role):
    @criterion("input_norm", gate=())
    def careless(weight, role, statistics):
        """Reads what it has not declared."""
        return weight.abs() * (statistics.input_norm if role == "gate" else statistics.intermediate_norm)

    wanted = "input_norm" if role == "gate" else "intermediate_norm"
    pruner = BlockPruner(Method("careless", ALONG_INPUTS, NM(2, 4)), exclude="|".join({"gate", "up", "down"} - {role}))
    with pytest.raises(DassError, match=rf"`{wanted}` of model\.layers\.0\.mlp\.{role}_proj is read but not declared"):
        prune_model(tiny_model(), pruner, random_tokens())


@pytest.mark.parametrize("read", ["input_norm", "hessian"])
def test_an_update_must_declare_what_it_reads_too(read):
    @update()
    def careless(group, statistics):
        """Reads what it has not declared."""
        getattr(statistics, read)
        return [(rows.weight * rows.mask.keep, rows.mask) for rows in group]

    pruner = BlockPruner(Method("wanda", ALONG_INPUTS, NM(2, 4), "careless"))
    with pytest.raises(DassError, match=rf"`{read}` of .*gate_proj and .*up_proj is read but not declared"):
        prune_model(tiny_model(), pruner, random_tokens())


def test_intermediate_norms_are_of_the_mlp_alone():
    @criterion("intermediate_norm")
    def everywhere(weight, role, statistics):
        """Reads what attention has not."""
        return weight.abs() * (statistics.intermediate_norm.mean())

    pruner = BlockPruner(Method("everywhere", dict.fromkeys(("gate", "up", "down", "q"), "in"), NM(2, 4)), "all")
    with pytest.raises(DassError, match=r"`intermediate_norm` of .*q_proj.* is there for gate, up and down only"):
        prune_model(tiny_model(), pruner, random_tokens())


def test_what_cannot_be_registered():
    with pytest.raises(DassError, match=r"criterion wrong needs input_nrm, which is no statistic: .*input_norm"):

        @criterion("input_nrm")
        def wrong(weight, role, statistics):
            """Names a statistic that is none."""

    with pytest.raises(DassError, match="update wrong needs gradient, which is no statistic"):

        @update(gate=("gradient",))
        def wrong(group, statistics):
            """Names a statistic that is none, for a role."""

    for default in (None, (1, 2), torch.ones(1)):
        with pytest.raises(DassError, match="parameter strange of the criterion wrong needs a default"):

            @criterion()
            def wrong(weight, role, statistics, strange=default):
                """Has a parameter that no config can hold."""

    with pytest.raises(DassError, match="parameter strange of the update wrong needs a default"):

        @update()
        def wrong(group, statistics, strange):
            """Has a parameter without a default."""

    assert "wrong" not in CRITERIA and "wrong" not in UPDATES


def test_scores_of_the_wrong_shape_are_refused():
    @criterion()
    def short(weight, role, statistics):
        """One score for each row."""
        return weight.abs().sum(1, keepdim=True)

    with pytest.raises(DassError, match=r"criterion short gives scores \(64, 1\) for a weight \(64, 32\)"):
        prune_model(tiny_model(), BlockPruner(Method("short", ALONG_INPUTS, NM(2, 4))))


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda rows: rows.weight, r"leaves weights of model\.layers\.0\.mlp\.gate_proj that its mask prunes"),
        (lambda rows: (rows.weight * rows.mask.keep)[:, :4], r"gives \(64, 4\) for the weights \(64, 32\) of model"),
    ],
    ids=["revived", "cut"],
)
def test_weights_that_are_not_those_of_the_mask_are_refused(result, says):
    @update()
    def careless(group, statistics):
        """W'_ij = W_ij, pruned or not."""
        return [(result(rows), rows.mask) for rows in group]

    pruner = BlockPruner(Method("magnitude", ALONG_INPUTS, NM(2, 4), "careless"))
    with pytest.raises(DassError, match=f"The update careless {says}"):
        prune_model(tiny_model(), pruner, random_tokens())


def test_an_entry_tells_its_source():
    called = Registry("thing", leading=1)

    @called.register()
    def small(x, factor=2.0):
        """y = factor x."""
        return factor * x

    assert called.find("small").source().endswith("return factor * x\n")
    assert called.find("small").parameters() == {"factor": 2.0}
    assert small(3) == 6


def test_parameters_of_one_name_keep_their_own_defaults():
    called = []

    @criterion("input_norm")
    def powered(weight, role, statistics, power=2.0):
        """S_ij = |W_ij|^power ||x_j||."""
        called.append(power)
        return weight.abs() ** power * statistics.input_norm

    @update()
    def scaled(group, statistics, power=0.5):
        """W'_ij = W_ij where kept."""
        called.append(power)
        return [(rows.weight * rows.mask.keep, rows.mask) for rows in group]

    prune_model(tiny_model(), BlockPruner(Method("powered", ALONG_INPUTS, NM(2, 4), "scaled")), random_tokens())
    assert set(called) == {2.0, 0.5}
    called.clear()
    method = Method("powered", ALONG_INPUTS, NM(2, 4), "scaled", {"power": 3.0})
    prune_model(tiny_model(), BlockPruner(method), random_tokens())
    assert set(called) == {3.0}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda weight: weight.abs_(), "criterion odd changes the weights that it scores"),
        (lambda weight: None, "criterion odd gives NoneType for a weight"),
        (lambda weight: weight[0], r"criterion odd gives scores \(32,\) for a weight"),
    ],
    ids=["in place", "nothing", "another shape"],
)
def test_what_a_criterion_must_not_give(body, says):
    @criterion()
    def odd(weight, role, statistics):
        """Whatever a test wants."""
        return body(weight)

    with pytest.raises(DassError, match=says):
        prune_model(tiny_model(), BlockPruner(Method("odd", ALONG_INPUTS, NM(2, 4))))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda rows: None, "must return a list of .weight, mask., one for each of 2 layers"),
        (lambda rows: [(rows[0].weight, rows[0].mask)], "one for each of 2 layers"),
        (lambda rows: [(one.weight, one.mask.keep) for one in rows], "one for each of 2 layers"),
        (
            lambda rows: [(one.weight * 0, replace(one.mask, keep=torch.zeros_like(one.mask.keep))) for one in rows],
            "mask of model.layers.0.mlp.gate_proj by the update odd breaks its pattern 2:4",
        ),
        (
            lambda rows: [(one.weight * 0, replace(one.mask, pattern=NM(1, 4))) for one in rows],
            "gives a mask of 1:4 along in for model.layers.0.mlp.gate_proj, which is to be 2:4",
        ),
    ],
    ids=["nothing", "too few", "a tensor", "an empty mask", "another pattern"],
)
def test_what_an_update_must_not_give(body, says):
    @update()
    def odd(group, statistics):
        """Whatever a test wants."""
        return body(group)

    with pytest.raises(DassError, match=says):
        prune_model(tiny_model(), BlockPruner(Method("magnitude", ALONG_INPUTS, NM(2, 4), "odd")))


def test_arguments_that_cannot_be_given():
    with pytest.raises(DassError, match="parameter order of the criterion named has the name of a setting"):

        @criterion()
        def named(weight, role, statistics, order=2.0):
            """Of a parameter that no config could set."""

    with pytest.raises(DassError, match="criterion short must take 3 arguments first"):

        @criterion()
        def short(weight, role):
            """Without statistics."""

    with pytest.raises(DassError, match="update shorter must take 2 arguments first"):

        @update()
        def shorter(group, damping=0.1):
            """Without statistics."""
