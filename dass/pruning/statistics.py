"""What calibration leaves behind: feature norms and Hessians, streamed batch by batch.

Activations are in the model's dtype; everything here is accumulated in fp32 (fp64 for an fp64 model).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dass.distributed import all_reduce, everyone
from dass.errors import DassError, finite, require_finite

HESSIAN_BLOCK = 256  # features; smaller blocks save more of the product's lower half, larger ones multiply faster
INVERSE_BLOCK = 1024  # rows and columns of a factor that are inverted at once
DAMPING_ATTEMPTS = 4  # 1 %, 10 %, 100 % and 1000 % of the mean diagonal


class InputStream:
    """The running statistics of one input that one or more projections share."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device, with_hessian: bool) -> None:
        """Start at zero; `dtype` is the model's."""
        self.dtype = torch.promote_types(dtype, torch.float32)
        shape = (features, features) if with_hessian else (features,)
        self.with_hessian = with_hessian
        self._widens = torch.device(device).type == "cuda" and dtype != self.dtype
        exact, summed = (str(one).removeprefix("torch.") for one in (dtype, self.dtype))
        self.products = f"{exact} summed in {summed}" if self._widens else summed
        """How those of a Hessian are made: by tensor cores from 16-bit numbers, or as a whole in full fp32."""
        # the Hessian's upper block triangle, or just its diagonal, the squares' sums
        self._products = torch.zeros(shape, dtype=self.dtype, device=device)
        self.n_tokens = 0
        self.n_sequences = 0
        """Of the calibration so far, whether or not any of their tokens came by; its caller counts them."""
        self.first: Tensor | None = None
        """The first token of the first sequence, `(features,)`, which in attention sees itself alone."""
        # in one place: a tensor kept from each batch would split the memory that the next one's activations need
        self._finite = torch.zeros((), dtype=torch.int64, device=device)  # batches until sums are no numbers, for good
        self._starts: list[int] = []  # how many sequences came before each batch

    def add(self, x: Tensor) -> None:
        """Add activations `(..., features)`."""
        if self.first is None and x.numel():
            self.first = x.detach().reshape(-1, x.shape[-1])[0].to(self.dtype, copy=True)
        self._add(x)
        self._finite += self._squares().sum() < torch.inf  # a single launch, unlike isfinite; no number is not less
        self._starts.append(self.n_sequences)

    def since(self) -> str:
        """Since which batch of the calibration these are no numbers, in words; the host waits for the device."""
        bad = self._starts[int(self._finite) :]
        return f" since the batch that begins with calibration sequence {bad[0]}" if bad else ""

    def _add(self, x: Tensor) -> None:
        self.n_tokens += x.shape[:-1].numel()
        x = x.detach().reshape(-1, x.shape[-1])
        if not self.with_hessian:
            if x.is_cuda:  # one pass over what was read, and no copy of it
                self._products += torch.linalg.vector_norm(x, dim=0, dtype=self.dtype).square()
            else:
                self._products += x.to(self.dtype).square().sum(0)
            return
        x = x if self._widens else x.to(self.dtype)
        with full_fp32():
            for start in range(0, x.shape[1], HESSIAN_BLOCK):
                rows = slice(start, start + HESSIAN_BLOCK)
                if self._widens:  # tensor cores: products of 16-bit numbers are exact in fp32, and summed there
                    self._products[rows, start:] += torch.mm(x[:, rows].T, x[:, start:], out_dtype=self.dtype)
                else:
                    self._products[rows, start:].addmm_(x[:, rows].T, x[:, start:])

    def reorder(self, permutation: Tensor) -> None:
        """Let feature i be what feature `permutation[i]` was."""
        at = permutation.to(self._products.device)
        self.first = None if self.first is None else self.first[at]
        self._products = self._symmetric()[at][:, at] if self.with_hessian else self._products[at]

    def norm(self) -> Tensor:
        """||x_j||_2 over all tokens so far, `(features,)`."""
        return self._squares().sqrt()

    def hessian(self) -> Tensor:
        """H = 2 / n_sequences * X^T X over all tokens so far, `(features, features)`, symmetric.

        The factor is SparseGPT's. It only matters beside the diagonal of 1 that dead inputs get.
        """
        return self._symmetric().mul_(2 / max(self.n_sequences, 1))

    def _squares(self) -> Tensor:
        return self._products.diagonal() if self.with_hessian else self._products

    def _symmetric(self) -> Tensor:
        upper = self._products.triu()
        return upper.add_(self._products.triu(1).T)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products of fp32 numbers as they are, whatever the caller allows elsewhere (TF32 keeps 11 bits of each)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Streams = dict[str, InputStream]
"""The statistics of a block's inputs, by what its projections read (`Projection.reads`)."""


def add_up(streams: Streams) -> Streams:
    """Sum statistics over the processes of a run, in place: each has seen its share of the sequences."""
    counts = everyone([(stream.n_tokens, stream.n_sequences) for stream in streams.values()])
    for stream, own in zip(streams.values(), zip(*counts, strict=True), strict=True):
        stream.n_tokens, stream.n_sequences = map(sum, zip(*own, strict=True))
        all_reduce(stream._products)
    return streams


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


STATISTICS = ("input_norm", "intermediate_norm", "hessian")


@dataclass(frozen=True)
class Statistics:
    """What a criterion or an update may ask for about one projection with weight `(out_features, in_features)`.

    Only what it names in its needs is there; reading anything else is an error.
    """

    input_norm: Tensor = None
    """||x_j||_2 of every input feature over all calibration tokens, `(in_features,)`."""
    intermediate_norm: Tensor = None
    """n_i = ||h_i||_2 of every neuron of its MLP (= input of the down projection), `(f,)`; of gate, up and down."""
    hessian: Callable[[], Tensor] = None  # type: ignore[assignment]
    """Makes H = 2 / n_sequences * X^T X, `(in_features, in_features)`: large, so that nobody keeps it."""
    name: str = "a layer"
    """The layer's, for errors."""
    inverses: dict[float, DampedInverse] = field(default_factory=dict)
    """Those reckoned so far, by their damping: criterion and update share them."""

    def __getattribute__(self, name: str) -> Any:
        """Refuse to read a statistic that is not there."""
        value = object.__getattribute__(self, name)
        if value is None and name in STATISTICS:
            raise DassError(
                f"The statistic `{name}` of {self.name} is read but not declared: name it where the criterion or "
                f"update is registered (intermediate_norm is there for gate, up and down only)."
            )
        return value

    def has(self, name: str) -> bool:
        """Whether a statistic is there."""
        return object.__getattribute__(self, name) is not None

    def only(self, needs: set[str]) -> "Statistics":
        """The same with no more than these fields."""
        kept: dict[str, Any] = {n: object.__getattribute__(self, n) if n in needs else None for n in STATISTICS}
        return Statistics(**kept, name=self.name, inverses=self.inverses)

    def inverse(self, damping: float) -> DampedInverse:
        """The factor of the inverse Hessian with this damping; reckoned once."""
        if damping not in self.inverses:
            self.inverses[damping] = damped_inverse(self.hessian(), damping, self.name)
        return self.inverses[damping]

    def columns(self, columns: slice) -> "Statistics":
        """The statistics of some of the input features; the factors of the inverse are cut, not reckoned anew."""
        inverses = {
            damping: replace(one, factor=one.factor[columns, columns], dead=one.dead[columns])
            for damping, one in self.inverses.items()
        }
        return Statistics(
            input_norm=self.input_norm[columns] if self.has("input_norm") else None,
            intermediate_norm=object.__getattribute__(self, "intermediate_norm"),
            hessian=(lambda: self.hessian()[columns, columns]) if self.has("hessian") else None,  # type: ignore[arg-type]
            name=self.name,
            inverses=inverses,
        )


def damped_inverse(hessian: Tensor, damping: float, name: str) -> DampedInverse:
    """Factorise the inverse Hessian as SparseGPT does (fasterprune in IST-DASLab/sparsegpt).

    Dead inputs get a diagonal of 1. Where Cholesky fails the damping rises tenfold, up to `DAMPING_ATTEMPTS` times.
    SparseGPT factorises the inverse; one factorisation in reverse order gives the same factor, sooner and closer.

    Raises:
        DassError: the Hessian holds NaN or infinite values, or stays indefinite; names the layer.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal() + dead
    for attempt in range(DAMPING_ATTEMPTS):
        share = damping * 10**attempt
        # With J H J = L L^T (J reverses the order), R = J L J is upper triangular, H = R R^T, and U = R^-1.
        damped = hessian.flip(0, 1)
        damped.diagonal().copy_((diagonal + share * diagonal.mean()).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        factor = lower.flip(0, 1)
        del lower
        _invert_upper_(factor)
        if (failed == 0) & finite(factor) & finite(hessian):  # the host waits for the device once
            return DampedInverse(factor, dead, share, attempt + 1)
        require_finite(hessian, f"The calibration statistics of {name}")
    raise DassError(
        f"The Hessian of {name} is not positive definite even with {share:.0%} damping: use more calibration tokens or "
        f"a larger damping.",
        field="method.damping",
    )


def _invert_upper_(root: Tensor) -> None:
    """R^-1 in the place of an upper triangular R, by blocks of columns: -A^-1 B D^-1 above the inverse of D."""
    for start in range(0, len(root), INVERSE_BLOCK):
        at = slice(start, min(start + INVERSE_BLOCK, len(root)))
        identity = torch.eye(at.stop - start, dtype=root.dtype, device=root.device)
        inverse = torch.linalg.solve_triangular(root[at, at], identity, upper=True)
        above = root[:start, at] @ inverse.neg_()
        for row in range(0, start, INVERSE_BLOCK):  # A^-1 has no entries left of its diagonal
            rows = root[row : row + INVERSE_BLOCK]
            torch.mm(rows[:, row:start], above[row:], out=rows[:, at])
        root[at, at] = inverse.neg_()
