"""The importance equations against numbers worked out by hand."""

import inspect

import pytest
import torch

from dass.pruning import criteria
from dass.pruning.criteria import dass, dass_ria, magnitude, nowag, obs, ria, wanda
from dass.pruning.masks import NM, Unstructured, select_mask
from dass.pruning.statistics import DampedInverse, Statistics

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, -4.0], [0.0, 6.0]])  # three outputs, two inputs
STATISTICS = Statistics(
    input_norm=torch.tensor([10.0, 0.5]),
    intermediate_norm=torch.tensor([4.0, 9.0, 16.0]),
    inverses={0.01: DampedInverse(torch.tensor([[2.0, 7.0], [0.0, 0.5]]), torch.zeros(2).bool(), 0.01, 1)},
)


def test_magnitude():
    assert magnitude(WEIGHT, "gate", STATISTICS).tolist() == [[1, 2], [3, 4], [0, 6]]


def test_wanda():
    assert wanda(WEIGHT, "gate", STATISTICS).tolist() == [[10, 1], [30, 2], [0, 3]]


@pytest.mark.parametrize("role", ["gate", "up"])
def test_dass_for_gate_and_up(role):
    """n = 4, 9, 16: relative to the largest 1/4, 9/16 and 1, whose roots are 1/2, 3/4 and 1."""
    assert dass(WEIGHT, role, STATISTICS).tolist() == [[0.5, 1], [2.25, 3], [0, 6]]
    assert dass(WEIGHT, role, STATISTICS, alpha=1.0).tolist() == [[0.25, 0.5], [27 / 16, 2.25], [0, 6]]
    assert dass(WEIGHT, role, STATISTICS, alpha=0.0).tolist() == magnitude(WEIGHT, role, STATISTICS).tolist()


def test_dass_with_a_dead_mlp_or_a_huge_alpha_stays_finite():
    dead = Statistics(intermediate_norm=torch.zeros(3))
    assert dass(WEIGHT, "up", dead).tolist() == [[0, 0]] * 3
    assert dass(WEIGHT, "up", dead, alpha=0.0).tolist() == WEIGHT.abs().tolist()
    assert torch.isfinite(dass(WEIGHT, "up", Statistics(intermediate_norm=torch.tensor([1.0, 1e3, 1e6])), 50.0)).all()


@pytest.mark.parametrize("role", ["down", "q", "k", "v", "o"])
def test_dass_elsewhere_is_wanda(role):
    assert torch.equal(dass(WEIGHT, role, STATISTICS), wanda(WEIGHT, role, STATISTICS))


def test_ria():
    """Column sums 4 and 12, row sums 3, 7 and 6; a = 1 takes the norms 10 and 1/2 as they are."""
    expected = [[10 * (1 / 4 + 1 / 3), 0.5 * (2 / 12 + 2 / 3)], [10 * (3 / 4 + 3 / 7), 0.5 * (4 / 12 + 4 / 7)]]
    expected.append([0, 0.5 * (6 / 12 + 1)])
    torch.testing.assert_close(ria(WEIGHT, "gate", STATISTICS, a=1.0), torch.tensor(expected))
    half = ria(WEIGHT, "q", STATISTICS)  # a = 1/2
    torch.testing.assert_close(half, torch.tensor(expected) / torch.tensor([10.0, 0.5]).sqrt())


def test_nowag():
    weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])  # columns of norm 5 and 2: 3/5, 0, 4/5, 1
    statistics = Statistics(input_norm=torch.tensor([2.0, 3.0]))
    square = 16 / 25 + 1
    expected = [[4.0, 0], [4 * 16 / 25 / square, 9 / square]]
    torch.testing.assert_close(nowag(weight, "up", statistics), torch.tensor(expected))
    assert not nowag(torch.zeros(2, 2), "up", statistics).any()


def test_dass_ria_is_ria_times_n():
    assert torch.equal(dass_ria(WEIGHT, "down", STATISTICS), ria(WEIGHT, "down", STATISTICS))
    factor = torch.tensor([0.5, 0.75, 1.0])[:, None]
    torch.testing.assert_close(dass_ria(WEIGHT, "gate", STATISTICS), ria(WEIGHT, "gate", STATISTICS) * factor)
    no_input = dass_ria(WEIGHT, "gate", STATISTICS, alpha=0.0, a=0.0)
    torch.testing.assert_close(no_input, ria(WEIGHT, "gate", STATISTICS, a=0.0))
    assert not ria(torch.zeros(3, 2), "gate", STATISTICS).any()


def test_obs():
    assert obs(WEIGHT, "up", STATISTICS).tolist() == [[0.25, 16], [2.25, 64], [0, 144]]


def test_obs_takes_the_hessian_with_its_damping():
    """H = diag(8, 2), whose mean is 5: with 20 % of it diag(9, 3), and 1 / U_jj^2 is just that."""
    statistics = Statistics(hessian=lambda: torch.diag(torch.tensor([8.0, 2.0])))
    torch.testing.assert_close(obs(WEIGHT, "up", statistics, damping=0.2), WEIGHT.square() * torch.tensor([9.0, 3.0]))
    assert list(statistics.inverses) == [0.2]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
def test_dass_along_the_inputs_equals_magnitude(pattern):
    """Within an output row the neuron norm n_i is one constant, and a constant changes no ranking."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32, dtype=torch.float64)
    statistics = Statistics(intermediate_norm=torch.rand(64, dtype=torch.float64) + 0.1)
    along_inputs = select_mask(dass(weight, "gate", statistics), pattern, "in").keep
    assert torch.equal(along_inputs, select_mask(magnitude(weight, "gate", statistics), pattern, "in").keep)
    along_outputs = select_mask(dass(weight, "gate", statistics), pattern, "out").keep
    assert not torch.equal(along_outputs, select_mask(magnitude(weight, "gate", statistics), pattern, "out").keep)


def test_each_equation_is_a_few_lines():
    for name in ("magnitude", "wanda", "dass", "obs"):
        assert len(inspect.getsource(getattr(criteria, name)).splitlines()) <= 12
