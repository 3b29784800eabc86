"""What transformers and accelerate know of a model whose blocks stay on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from dass.checkpoint import Stored, tensors_in
from dass.experts import Apart

Index = dict[str, dict[str, str]]
"""Where a weight lies, by its full name, as accelerate has it: `safetensors_file`, `weight_name`, and its `dtype`."""


def places(module: nn.Module, name: str, blocks: set[str], device: str) -> Iterator[tuple[str, str]]:
    """Where each part of a model is to lie: blocks on disk, what holds no block on the device."""
    if name in blocks:
        yield name, "disk"
    elif any(block.startswith(f"{name}." if name else "") for block in blocks):
        for child, part in module.named_children():
            yield from places(part, f"{name}.{child}" if name else child, blocks, device)
    else:
        yield name, device


def index_of(model: nn.Module, device: torch.device) -> Index:
    """Where the weights lie, out of the hooks that accelerate put on the modules; it reads buffers to a device."""
    for module in model.modules():
        for hook in getattr(getattr(module, "_hf_hook", None), "hooks", [getattr(module, "_hf_hook", None)]):
            if getattr(hook, "weights_map", None) is not None:
                hook.weights_map.dataset.device = str(device)
                return {name: dict(about) for name, about in hook.weights_map.dataset.index.items()}
    return {}


def mismatched(
    model: nn.Module, index: Index, stored: dict[str, Stored], apart: Mapping[str, Apart]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """What lies on disk in another shape than the model has for it: its name, that shape, and the model's."""
    parameters, lying = dict(model.named_parameters()), dict(stored)
    for file in {about["safetensors_file"] for about in index.values()} - {str(one.file) for one in stored.values()}:
        lying |= tensors_in(Path(file))  # what transformers put together
    expected = {index[name]["weight_name"]: parameters[name].shape for name in index.keys() & parameters.keys()}
    for name, experts in apart.items():
        shapes = [part.shape for part in experts.cut(parameters[name][0])]
        expected |= {one: shape for own in experts.names for one, shape in zip(own, shapes, strict=True)}
    yield from ((name, lying[name].shape, shape) for name, shape in expected.items() if lying[name].shape != shape)
