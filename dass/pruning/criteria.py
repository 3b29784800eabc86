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


@criterion("input_norm")
def ria(weight: Tensor, role: str, statistics: Statistics, a: float = 0.5) -> Tensor:
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||x_j||_2^a (RIA, "Plug-and-Play", ICLR 2024).

    a: exponent of the input norm.
    """
    size = weight.abs()
    return (_share(size, 0) + _share(size, 1)) * statistics.input_norm**a


@criterion("input_norm")
def nowag(weight: Tensor, role: str, statistics: Statistics) -> Tensor:
    """S_ij = V_ij^2 * ||x_j||_2^2, V each column of W, then each row, scaled to norm 1 (NoWag-P, arXiv 2504.14569)."""
    columns_scaled = torch.nn.functional.normalize(weight, dim=0, eps=torch.finfo(weight.dtype).tiny)
    rows_scaled = torch.nn.functional.normalize(columns_scaled, dim=1, eps=torch.finfo(weight.dtype).tiny)
    return rows_scaled.square() * statistics.input_norm.square()


@criterion("input_norm", gate=("input_norm", "intermediate_norm"), up=("input_norm", "intermediate_norm"))
def dass_ria(weight: Tensor, role: str, statistics: Statistics, alpha: float = 0.5, a: float = 0.5) -> Tensor:
    """RIA's score for all; for gate and up times n_i^alpha, as in DaSS (arXiv 2405.01943).

    alpha: exponent of the intermediate norm.
    a: exponent of the input norm.
    """
    scores = ria(weight, role, statistics, a)
    if role in ("gate", "up"):
        n = statistics.intermediate_norm
        return scores * (n / n.max().clamp_min(torch.finfo(n.dtype).tiny))[:, None] ** alpha
    return scores


@criterion("input_norm", gate=("input_norm", "intermediate_norm"), up=("input_norm", "intermediate_norm"))
def wanda_dass(weight: Tensor, role: str, statistics: Statistics, alpha: float = 0.5) -> Tensor:
    """S_ij = |W_ij| * ||x_j||_2 * n_i^alpha for gate and up, as in Wanda and in DaSS at once; Wanda's for the rest.

    It varies along both axes, and so is one for transposable masks: within a row n_i is constant, within a column x_j.

    alpha: exponent of the intermediate norm.
    """
    scores = wanda(weight, role, statistics)
    if role in ("gate", "up"):
        n = statistics.intermediate_norm
        return scores * (n / n.max().clamp_min(torch.finfo(n.dtype).tiny))[:, None] ** alpha
    return scores


def _share(size: Tensor, dim: int) -> Tensor:
    """Each weight's share of its column's (dim 0) or row's (dim 1) sum; 0 where that is."""
    return size / size.sum(dim, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
