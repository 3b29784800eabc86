"""The importance equations, one function each.

A criterion is a pure function of `(weight, role, statistics)`: weight `(out_features, in_features)` in fp32 (or fp64),
role one of gate, up, down, q, k, v, qkv, o. It returns the importance of every weight, of the same shape and dtype.
Add one by decorating a function with `@criterion`, and a file in `conf/method`; nothing else.
"""

import torch
from torch import Tensor

from dass.pruning.registry import Registry
from dass.pruning.statistics import Statistics

CRITERIA = Registry("criterion", leading=3)
criterion = CRITERIA.register


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
        return weight.abs() * (n / n.max().clamp_min(torch.finfo(n.dtype).tiny))[:, None] ** alpha
    return wanda(weight, role, statistics)


@criterion("hessian", positive=("damping",))
def obs(weight: Tensor, role: str, statistics: Statistics, damping: float = 0.01) -> Tensor:
    """S_ij = W_ij^2 / U_jj^2, U the Cholesky factor of the inverse Hessian (SparseGPT, arXiv 2301.00774).

    damping: the share of the Hessian's mean diagonal that is added to it.
    """
    return weight.square() / statistics.inverse(damping).factor.diagonal().square()
