"""The matrices of a block, and the projections that are views on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from dass.pruning.blocks import Projection


@dataclass(frozen=True)
class Matrix:
    """A parameter of a block with two or three dimensions, and where it stands."""

    name: str
    module: nn.Module
    parameter_name: str
    place: str
    """The module that holds it together with others: an experts module, or the parent of a linear layer."""
    shape: tuple[int, ...]
    """As `(out_features, in_features)`; of three dimensions as stored."""
    transposed: bool

    @property
    def full_name(self) -> str:
        """That of the parameter."""
        return f"{self.name}.weight" if self.parameter_name == "weight" else self.name

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    def view(self, role: str, reads: str, **part: object) -> Projection:
        """A projection on it, or on a part of it."""
        return Projection(
            self.name,
            role,
            self.module,
            self.parameter_name,
            reads,
            transposed=self.transposed,
            **part,  # type: ignore[arg-type]
        )


def matrices_of(name: str, block: nn.Module) -> Iterator[Matrix]:
    """The matrices of a block, which has this name in the model; no vectors and no biases."""
    for path, module in block.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or parameter.numel() == max(parameter.shape) or key.endswith("bias"):
                continue  # a vector, or one bias for each expert
            layer = key == "weight"
            place = path.rpartition(".")[0] if layer else path
            full = ".".join(part for part in (name, path, "" if layer else key) if part)
            transposed = isinstance(module, Conv1D)
            shape = tuple(parameter.T.shape if transposed else parameter.shape)
            yield Matrix(full, module, key, place, shape, transposed)


def views_of(roles: dict[str, Matrix], expert: int | None = None) -> dict[str, Projection]:
    """The views of one MLP; a part of a parameter carries the expert and the role in its name."""
    fused = "gate" in roles and roles["gate"] is roles["up"]
    views = {}
    for role, matrix in roles.items():
        view = matrix.view(role, "intermediate" if role == "down" else "mlp input", expert=expert)
        label = matrix.name if expert is None else f"{matrix.name}.{expert}"
        if fused and role != "down":
            label, half = f"{label}.{role}", matrix.shape[0] // 2
            if getattr(matrix.module, "is_concatenated", True):  # transformers' own word for the halves' order
                view = replace(view, rows=slice(0, half) if role == "gate" else slice(half, None))
            else:
                view = replace(view, rows=slice(0 if role == "gate" else 1, None, 2))
        views[role] = replace(view, name=label)
    return views
