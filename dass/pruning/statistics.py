"""What calibration leaves behind: feature norms and Hessians, streamed batch by batch.

Activations are in the model's dtype; everything here is accumulated in fp32 (fp64 for an fp64 model).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass.errors import DassError, require_finite

HESSIAN_BLOCK = 256  # features; smaller blocks save more of the product's lower half, larger ones multiply faster
DAMPING_ATTEMPTS = 4  # 1 %, 10 %, 100 % and 1000 % of the mean diagonal


@dataclass(frozen=True)
class Statistics:
    """What a criterion may ask for about one projection with weight `(out_features, in_features)`.

    Only what the criterion names in its needs is filled in; the rest is None.
    """

    input_norm: Tensor | None = None
    """||x_j||_2 of every input feature over all calibration tokens, `(in_features,)`."""
    intermediate_norm: Tensor | None = None
    """n_i = ||h_i||_2 of every intermediate neuron of the block's MLP (= input of its down projection), `(f,)`."""
    inverse_factor: Tensor | None = None
    """U, upper triangular with U^T U = (H + damping)^-1, H the Hessian, `(in_features, in_features)`."""


class InputStream:
    """The running statistics of one input that one or more projections share."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device, with_hessian: bool) -> None:
        """Start at zero; `dtype` is the model's."""
        self.dtype = torch.promote_types(dtype, torch.float32)
        shape = (features, features) if with_hessian else (features,)
        self.with_hessian = with_hessian
        # the Hessian's upper block triangle, or just its diagonal, the squares' sums
        self._products = torch.zeros(shape, dtype=self.dtype, device=device)
        self.n_tokens = self.n_sequences = 0

    def add(self, x: Tensor) -> None:
        """Add the activations of a batch, `(batch, seq_len, features)`."""
        self.n_tokens += x.shape[:-1].numel()
        self.n_sequences += len(x)
        x = x.detach().reshape(-1, x.shape[-1]).to(self.dtype)
        if not self.with_hessian:
            self._products += x.square().sum(0)
            return
        for start in range(0, x.shape[1], HESSIAN_BLOCK):
            rows = slice(start, start + HESSIAN_BLOCK)
            self._products[rows, start:].addmm_(x[:, rows].T, x[:, start:])

    def norm(self) -> Tensor:
        """||x_j||_2 over all tokens so far, `(features,)`."""
        squares = self._products.diagonal() if self.with_hessian else self._products
        return squares.sqrt()

    def hessian(self) -> Tensor:
        """H = 2 / n_sequences * X^T X over all tokens so far, `(features, features)`, symmetric.

        The factor is SparseGPT's. It only matters beside the diagonal of 1 that dead inputs get.
        """
        return (self._products.triu() + self._products.triu(1).T) * (2 / max(self.n_sequences, 1))


@dataclass(frozen=True)
class DampedInverse:
    """The Cholesky factor of a damped inverse Hessian, and what it took to get it."""

    factor: Tensor
    """U, upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1, `(in_features, in_features)`."""
    dead: Tensor
    """Input features that were never active, `(in_features,)` bool."""
    damping: float
    """The share of the mean diagonal that was added."""
    attempts: int


def damped_inverse(hessian: Tensor, damping: float, name: str) -> DampedInverse:
    """Factorise the inverse Hessian as SparseGPT does (fasterprune in IST-DASLab/sparsegpt).

    Dead inputs get a diagonal of 1. Where Cholesky fails the damping rises tenfold, up to `DAMPING_ATTEMPTS` times.
    SparseGPT factorises the inverse; one factorisation in reverse order gives the same factor, sooner and closer.

    Raises:
        DassError: the Hessian holds NaN or infinite values, or stays indefinite; names the layer.
    """
    require_finite(hessian, f"The calibration statistics of {name}")
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal() + dead
    for attempt in range(DAMPING_ATTEMPTS):
        share = damping * 10**attempt
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + share * diagonal.mean())
        # With J H J = L L^T (J reverses the order), R = J L J is upper triangular, H = R R^T, and U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if failed:
            continue
        factor = torch.linalg.solve_triangular(
            lower.flip(0, 1), torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=True
        )
        if torch.isfinite(factor).all():
            return DampedInverse(factor, dead, share, attempt + 1)
    raise DassError(
        f"The Hessian of {name} is not positive definite even with {share:.0%} damping: "
        f"use more calibration tokens or raise `method.damping`."
    )
