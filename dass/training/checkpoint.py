"""What a training that was killed goes on from: its weights, AdamW's moments, and what was said of the model so far."""

import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from dass.errors import first_line
from dass.records import file_sha256, write_atomically
from dass.shards import write_tensors

STATE, TENSORS = "training.json", "training-{}.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW knows of a parameter once that had a gradient; an image tower has none from a text."""


class State(BaseModel):
    """How far a training has come."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int
    seconds: float
    """Since the training began, in all processes."""
    history: list[dict[str, Any]]
    sha256: str
    """Of the file of tensors."""
    by: str
    """What it was computed by, and from."""


def keep(
    folder: Path,
    by: str,
    step: int,
    seconds: float,
    history: list[dict[str, Any]],
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write what a training goes on from behind a step; what was written before goes once this is there."""
    path = folder / TENSORS.format(step)
    known = ((n, optimizer.state[p]) for n, p in weights.items() if p in optimizer.state)
    moments = {f"{key} {n}": of_one[key] for n, of_one in known for key in MOMENTS}
    write_tensors(path, {f"weight {n}": p.detach() for n, p in weights.items()} | moments)
    state = State(step=step, seconds=seconds, history=history, sha256=file_sha256(path), by=by)
    write_atomically(folder / STATE, state.model_dump_json())
    for other in folder.glob(TENSORS.format("*")):
        if other != path:
            other.unlink()


@torch.no_grad()
def go_on(
    folder: Path, by: str, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[dict[str, Any]]]:
    """Bring back what an earlier process has written; the next step, its seconds, and what was said of the model."""
    try:
        state = State.model_validate_json((folder / STATE).read_bytes())
        path = folder / TENSORS.format(state.step)
        if state.by != by or file_sha256(path) != state.sha256:
            raise ValueError("it is another training's, or damaged")
        tensors = load_file(path)
    except FileNotFoundError:
        return 0, 0.0, []
    except (OSError, ValueError, ValidationError) as error:
        print(f"note: what an earlier training left in {folder} is left aside: {first_line(error)}", file=sys.stderr)
        return 0, 0.0, []
    for name, p in weights.items():
        p.copy_(tensors[f"weight {name}"])
        if f"step {name}" in tensors:
            step, *moments = (tensors[f"{key} {name}"] for key in MOMENTS)
            on_device = [moment.to(p.device) for moment in moments]  # AdamW counts the steps on the host
            optimizer.state[p] = dict(zip(MOMENTS, [step, *on_device], strict=True))
    print(f"note: training goes on behind step {state.step}, where it was stopped", file=sys.stderr)
    return state.step, state.seconds, state.history


@torch.no_grad()
def bring_back(folder: Path, weights: dict[str, Tensor]) -> None:
    """Give the weights of a training what it has written last of them."""
    state = State.model_validate_json((folder / STATE).read_bytes())
    tensors = load_file(folder / TENSORS.format(state.step))
    for name, p in weights.items():
        p.copy_(tensors[f"weight {name}"])
