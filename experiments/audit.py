"""What hardware can make of a model's zeros.

python -m experiments.audit model=DIR
python -m experiments.audit model=DIR projections='{gate: w1, up: w3, down: w2}'

Any folder with safetensors, whoever pruned it; its blocks are brought from disk one at a time.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tabulate import tabulate

from dass.audit import DENSE, Audited, as_dict, audit, audited, facts_of
from dass.checkpoint import most_stored
from dass.errors import DassError, told
from dass.models import DTYPES, resolve_dtype
from dass.sparsity import sparsity_report
from dass.streaming import load_streamed
from experiments.plain import run_plain


@dataclass
class AuditConfig:
    """The settings of an audit."""

    model: str  # a folder, or a hub id
    projections: str | None = None  # {role: regular expression} where structure does not tell, as model.projections


def main(config: AuditConfig) -> None:
    """Print a row for each projection, and the sums; DassError where the model cannot be read."""
    # another tool's config.json need not tell what its weights are
    stored = most_stored(Path(config.model)) if Path(config.model).is_dir() else None
    dtype = stored if stored in DTYPES else resolve_dtype("auto", config.model, None)
    with tempfile.TemporaryDirectory() as scratch:
        roles = None if config.projections is None else roles_of(config.projections)
        model, shelf = load_streamed(config.model, None, dtype, torch.device("cpu"), Path(scratch), roles)
        found = audit(model, shelf.blocks, hold=shelf.hold)
        projections = [p for block in shelf.blocks for p in audited(block)]
        targeted = [p for p in projections if found.projections[p.name].status != DENSE]
        sparsity = sparsity_report(model, shelf.blocks, targeted, shelf.hold)
    rows = [{"Projection": name} | _row(one) for name, one in found.projections.items()]
    print(tabulate(rows, "keys", "pipe", disable_numparse=True), "\n")
    shares = ", ".join(f"{sparsity[name]:.4f} of {word}" for name, word in WHOLES.items())
    for name, text in ({"zeros": shares} | facts_of(as_dict(found))).items():
        print(f"- {name}: {text}")


def roles_of(words: str) -> dict[str, str]:
    """`{gate: REGEX, up: REGEX, down: REGEX}` as a dictionary; DassError where it is none."""
    with told(f"projections={words} cannot be read", "give {gate: REGEX, up: REGEX, down: REGEX}", Exception):
        roles = OmegaConf.to_container(OmegaConf.create(words))  # raises YAML's errors, too
    if not isinstance(roles, dict) or not all(isinstance(word, str) for word in roles.values()):
        raise DassError(f"projections={words} must be {{gate: REGEX, up: REGEX, down: REGEX, dense: REGEX}}.")
    return {str(role): word for role, word in roles.items()}


WHOLES = {"targeted": "the targeted weights", "linear": "all linear ones but the head", "total": "all weights"}


def _row(one: Audited) -> dict[str, str]:
    along = {"inputs": one.inputs, "outputs": one.outputs}
    return {
        "Role": one.role,
        "Shape": f"{one.shape[0]} x {one.shape[1]}",
        "dtype": one.dtype,
        "Zeros": f"{one.sparsity:.2%}",
        "N:M along": ", ".join(f"{axis} {pattern}" for axis, pattern in along.items() if pattern) or "neither",
        "Groups with <= 2 of 4": "—" if one.groups is None else f"{one.groups:.2%}",
        "Kernels for shape and dtype": ", ".join(one.kernels) or "none",
        "Status": one.status,
        "Helps": one.helps,
        "Bytes": str(one.weights * one.size),
        "Packed": str(one.packed),
    }


if __name__ == "__main__":
    run_plain(main, AuditConfig, ("model",), sys.argv[1:])
