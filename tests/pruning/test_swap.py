"""Exchanges of weights against brute force: every exchange that a comparison group allows, on small matrices."""

import itertools

import pytest
import torch

from dass.errors import DassError
from dass.pruning import swap as module
from dass.pruning.masks import NM, Mask, Unstructured, select_mask, verify_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.swap import exchanged
from dass.pruning.walk import prune_model
from tests.models import random_tokens, tiny_model
from tests.pruning.test_update import correlated, layer_error

CASES = [(pattern, axis) for pattern in (NM(2, 4), NM(1, 4), NM(5, 8), Unstructured(0.5)) for axis in ("in", "out")]
CASES += [(NM(2, 4), "both"), (NM(1, 4), "both"), (NM(3, 8), "both")]
CASES += [(Unstructured(0.3), "in"), (Unstructured(0.3), "out"), (Unstructured(0.5), "layer")]


def problem(seed=0, rows=8, features=16, dtype=torch.float64):
    x = correlated(40, features, seed, dtype)
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, weight, x.T @ x


def groups_of(mask):
    """The index pairs of each comparison group."""
    rows, columns = mask.keep.shape
    m = mask.pattern.m if isinstance(mask.pattern, NM) else None
    if mask.axis == "layer":
        return [list(itertools.product(range(rows), range(columns)))]
    lines = [[(i, j) for j in range(columns)] for i in range(rows)]
    if mask.axis == "out":
        lines = [[(i, j) for i in range(rows)] for j in range(columns)]
    return [line[at : at + (m or len(line))] for line in lines for at in range(0, len(line), m or len(line))]


def error(x, weight, keep):
    return layer_error(x, weight, weight * keep) ** 2


def exchanges(mask):
    """All masks that one exchange leads to, `(n, rows, columns)`, with what is exchanged."""
    if mask.axis == "both":
        return torch.stack(crosswise(mask)), None
    kept = mask.keep.tolist()
    pairs = [pair for group in groups_of(mask) for pair in itertools.product(group, group)]
    pairs = [(out, into) for out, into in pairs if kept[out[0]][out[1]] and not kept[into[0]][into[1]]]
    masks, at = mask.keep.repeat(len(pairs), 1, 1), torch.arange(len(pairs))
    (i, p), (k, q) = (torch.tensor(ends).T for ends in zip(*pairs, strict=True))
    masks[at, i, p], masks[at, k, q] = False, True
    return masks, pairs


def crosswise(mask):
    """The same where two rows exchange the same two columns of a tile, in opposite directions."""
    m, found = mask.pattern.m, [mask.keep]
    for i, k in itertools.combinations(range(len(mask.keep)), 2):
        for p, q in itertools.permutations(range(mask.keep.shape[1]), 2):
            corners = mask.keep[[i, i, k, k], [p, q, p, q]].tolist()
            if (i // m, p // m) == (k // m, q // m) and corners == [True, False, False, True]:
                keep = mask.keep.clone()
                keep[i, [p, q]], keep[k, [p, q]] = torch.tensor([False, True]), torch.tensor([True, False])
                found.append(keep)
    return found


def errors_of(x, weight, masks):
    """||X (W - W')^T||^2 of each mask, from the outputs themselves."""
    return ((weight * ~masks).flatten(0, 1) @ x.T).square().sum(1).unflatten(0, (len(masks), -1)).sum(1)


def descend(x, weight, mask):
    """The best of all exchanges, one after the other, until none lowers the error."""
    now = error(x, weight, mask.keep)
    while True:
        masks, _ = exchanges(mask)
        least = errors_of(x, weight, masks).min(0)
        if least.values >= now - 1e-9:
            return mask
        mask, now = Mask(masks[least.indices], mask.pattern, mask.axis), least.values


@pytest.mark.parametrize(("pattern", "axis"), CASES, ids=str)
@pytest.mark.parametrize("count", [1, 32])
def test_no_exchange_is_left_that_lowers_the_error(pattern, axis, count, monkeypatch):
    monkeypatch.setattr(module, "ISLANDS", 3)
    monkeypatch.setattr(module, "CANDIDATES", count)
    monkeypatch.setattr(module, "PAIRS", 1000)
    for seed in range(2):
        x, weight, hessian = problem(seed, 8, 16)
        mask = select_mask(weight.abs(), pattern, axis)
        found = exchanged(weight, mask, hessian)
        verify_mask(found)
        now, before = error(x, weight, found.keep), error(x, weight, mask.keep)
        assert now < before and (found.pattern, found.axis) == (pattern, axis)
        assert errors_of(x, weight, exchanges(found)[0]).min() > now - 1e-9 * before


@pytest.mark.parametrize(("pattern", "axis"), [c for c in CASES if c[1] == "in" or isinstance(c[0], NM)], ids=str)
def test_the_optimum_is_that_of_the_best_exchanges_by_brute_force(pattern, axis):
    x, weight, hessian = problem(rows=4 if axis == "in" else 8, features=16 if pattern in (NM(5, 8), NM(3, 8)) else 12)
    mask = select_mask(weight.abs(), pattern, axis)
    assert torch.equal(exchanged(weight, mask, hessian).keep, descend(x, weight, mask).keep)


@pytest.mark.parametrize("axis", ["in", "out", "layer", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_never_rises(axis, dtype):
    """Also from a mask at an optimum, with inputs that are nearly one or never active, and in fp32."""
    for seed, pattern in enumerate((NM(2, 4), NM(4, 8) if axis == "both" else Unstructured(0.5))):
        x, weight, _ = problem(seed, 16, 16, dtype)
        x[:, 1], x[:, 2] = x[:, 0] * 1.0001, 0
        wide, hessian = x.double(), x.T @ x
        mask = select_mask(weight.abs() * x.norm(dim=0), pattern, axis)
        once = exchanged(weight, mask, hessian)
        twice = exchanged(weight, once, hessian)
        errors = [error(wide, weight.double(), one.keep) for one in (mask, once, twice)]
        assert errors[1] < errors[0] and errors[2] <= errors[1] * (1 + 1e-6)


def test_an_exchange_of_two_rows_changes_the_error_by_the_sum_of_both():
    """a_ij + b_kj of the docstring, for every exchange within a column."""
    x, weight, hessian = problem(rows=4, features=6)
    mask = select_mask(weight.abs(), Unstructured(0.5), "out")
    lost = weight * ~mask.keep
    pull, now = lost @ hessian, error(x, weight, mask.keep)
    for keep, ((i, j), (k, _)) in zip(*exchanges(mask), strict=True):
        a = 2 * weight[i, j] * pull[i, j] + weight[i, j] ** 2 * hessian[j, j]
        b = -2 * weight[k, j] * pull[k, j] + weight[k, j] ** 2 * hessian[j, j]
        assert error(x, weight, keep) - now == pytest.approx(float(a + b))


@torch.no_grad()
@pytest.mark.parametrize(
    ("criterion", "axis", "pattern"),
    [
        ("magnitude", "layer", Unstructured(0.5)),
        ("dass", "out", NM(2, 4)),
        ("obs", "layer", NM(2, 4)),
        ("wanda", "both", NM(2, 4)),
    ],
    ids=str,
)
def test_in_a_model_swap_lowers_the_error_of_a_mask_and_obs_lowers_that(criterion, axis, pattern):
    tokens, errors, masks, x = random_tokens(12), {}, {}, []
    dense = tiny_model(dtype=torch.float64, num_hidden_layers=1)
    dense.model.layers[0].mlp.register_forward_pre_hook(lambda m, given: x.append(given[0].flatten(0, 1)))
    dense(tokens)
    for update in ("none", "swap", "swap_obs"):
        model = tiny_model(dtype=torch.float64, num_hidden_layers=1)
        roles = {"gate": axis, "up": axis, "down": "in"}
        pruner = BlockPruner(Method(criterion, roles, pattern, update), exclude="gate|down")
        masks[update] = prune_model(model, pruner, tokens)
        for name, mask in masks[update].items():
            verify_mask(mask, name)
            assert (model.get_parameter(f"{name}.weight")[~mask.keep] == 0).all()
        weights = [m.model.layers[0].mlp.up_proj.weight for m in (dense, model)]
        errors[update] = layer_error(x[0], *weights)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(masks["swap"][name].keep, masks["swap_obs"][name].keep)
    assert errors["swap_obs"] < errors["swap"] < errors["none"]


@pytest.mark.parametrize("axis", ["in", "out"])
def test_so_many_exchanges_of_a_row_at_most(axis):
    _, weight, hessian = problem()
    mask = select_mask(weight.abs(), NM(2, 4), axis)
    changed = [(exchanged(weight, mask, hessian, most).keep != mask.keep).sum(1) for most in (1, 1000)]
    assert changed[0].max() <= 2 * (1 if axis == "in" else 4) and changed[0].sum() < changed[1].sum()
    assert changed[0].sum() <= 2 * len(weight)


def test_groups_that_it_does_not_know():
    _, weight, hessian = problem()
    mask = select_mask(weight.abs(), Unstructured(0.5), "layer")
    with pytest.raises(DassError, match=r"in blocks of columns"):
        exchanged(weight, Mask(mask.keep, mask.pattern, "layer", column_block=8), hessian)


@pytest.mark.parametrize("axis", ["in", "out", "layer"])
def test_where_nothing_is_pruned_nothing_is_exchanged(axis):
    """A hundredth of 16 inputs is none."""
    _, weight, hessian = problem()
    mask = select_mask(weight.abs(), Unstructured(0.001), axis)
    assert mask.keep.all() and exchanged(weight, mask, hessian).keep.all()
