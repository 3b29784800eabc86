"""The importance equations, one function each.

A criterion is a pure function of `(weight, role, statistics)`: weight `(out_features, in_features)` in fp32 (or fp64),
role one of gate, up, down, q, k, v, o. It returns the importance of every weight, of the same shape and dtype.
Add one by decorating a function with `@criterion`, and a file in `conf/method`; nothing else.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.statistics import Statistics


@dataclass(frozen=True)
class Criterion:
    """An importance equation with the fields of `Statistics` that it reads."""

    importance: Callable[..., Tensor]
    needs: tuple[str, ...]
    needs_of_role: dict[str, tuple[str, ...]]

    def needs_for(self, role: str) -> tuple[str, ...]:
        """The fields of `Statistics` that this criterion reads for a projection of this role."""
        return self.needs_of_role.get(role, self.needs)

    def parameters(self) -> dict[str, float]:
        """The names and defaults of the equation's own parameters, such as DaSS's alpha."""
        return {p.name: p.default for p in list(inspect.signature(self.importance).parameters.values())[3:]}


CRITERIA: dict[str, Criterion] = {}


def criterion(
    *needs: str, **needs_of_role: tuple[str, ...]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register an importance function under its own name.

    Args:
        needs: the fields of `Statistics` that the function reads.
        needs_of_role: other fields for certain roles, such as `gate=("intermediate_norm",)`.
    """

    def register(importance: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CRITERIA[importance.__name__] = Criterion(importance, needs, needs_of_role)
        return importance

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of this name; DassError lists the known ones."""
    if name not in CRITERIA:
        raise DassError(f"method.criterion={name} is unknown: choose one of {', '.join(sorted(CRITERIA))}.")
    return CRITERIA[name]


@criterion()
def magnitude(weight: Tensor, role: str, statistics: Statistics) -> Tensor:
    """S_ij = |W_ij|."""
    return weight.abs()


@criterion("input_norm")
def wanda(weight: Tensor, role: str, statistics: Statistics) -> Tensor:
    """S_ij = |W_ij| * ||x_j||_2 (Wanda, arXiv 2306.11695, eq. 1)."""
    return weight.abs() * statistics.input_norm


@criterion("input_norm", gate=("intermediate_norm",), up=("intermediate_norm",))
def dass(weight: Tensor, role: str, statistics: Statistics, alpha: float = 0.5) -> Tensor:
    """S_ij = |W_ij| * n_i^alpha for gate and up, n_i = ||h_i||_2; Wanda's for the rest (DaSS, arXiv 2405.01943).

    n is taken relative to its largest: a constant factor changes no mask, and so no alpha >= 0 overflows.
    The down projection's input is h, so there Wanda's rule is |W_ij| * n_j.
    """
    if role in ("gate", "up"):
        n = statistics.intermediate_norm
        assert n is not None
        return weight.abs() * (n / n.max().clamp_min(torch.finfo(n.dtype).tiny))[:, None] ** alpha
    return wanda(weight, role, statistics)


@criterion("inverse_factor")
def obs(weight: Tensor, role: str, statistics: Statistics) -> Tensor:
    """S_ij = W_ij^2 / U_jj^2, U the Cholesky factor of the inverse Hessian (SparseGPT, arXiv 2301.00774)."""
    assert statistics.inverse_factor is not None
    return weight.square() / statistics.inverse_factor.diagonal().square()
