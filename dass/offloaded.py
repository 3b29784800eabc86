"""Where the weights of a model lie whose blocks stay on disk, as transformers and accelerate have it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import transformers.modeling_utils
from torch import nn
from transformers import PreTrainedModel

from dass.checkpoint import Stored, tensors_in
from dass.experts import Apart, named_in_model

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


def loading_map(
    model: PreTrainedModel, device_map: Mapping[str, str], names: Iterable[str], apart: Iterable[str], device: str
) -> dict[str, str]:
    """What transformers is to do with each part while it loads a model: it reads what is for the disk, too.

    So of a block only those parameters are for the disk that it puts together out of several tensors, and writes there;
    the others get no memory, and their pages of the files are not touched. Buffers are never brought: they are there.

    Args:
        model: without weights.
        device_map: as from `places`.
        names: of the tensors in the checkpoint.
        apart: parameters that are put together by nobody.
    """
    blocks = tuple(f"{name}." for name, place in device_map.items() if place == "disk")
    loaded = {name: "meta" if place == "disk" else place for name, place in device_map.items()}
    loaded |= {name: device for name, _ in model.named_buffers() if name.startswith(blocks)}
    made = {full for _, full, pattern in named_in_model(model, names) if pattern is not None}
    return loaded | dict.fromkeys((name for name in made - set(apart) if name.startswith(blocks)), "disk")


@contextmanager
def undispatched() -> Iterator[Index]:
    """Keep transformers from putting accelerate's hooks on a model; gives the index of what it wrote to the disk."""
    before, index = transformers.modeling_utils.accelerate_dispatch, Index()

    def keep(model: nn.Module, quantizer: None, device_map: object, folder: str, found: Index | None, _: bool) -> None:
        index.update(found or {})

    transformers.modeling_utils.accelerate_dispatch = keep
    try:
        yield index
    finally:
        transformers.modeling_utils.accelerate_dispatch = before


def index_of(model: PreTrainedModel, stored: Mapping[str, Stored], written: Index) -> Index:
    """Where the weights lie that a model has no memory for.

    Args:
        stored: where the tensors of the checkpoint are.
        written: as from `undispatched`, of those that none of these is as it stands.
    """
    held, index = model.state_dict(), Index()
    for name, full, pattern in named_in_model(model, stored):
        if pattern is None and full in held and held[full].is_meta:
            dtype = str(held[full].dtype).removeprefix("torch.")
            index[full] = {"safetensors_file": str(stored[name].file), "weight_name": name, "dtype": dtype}
    index |= written
    tied = {name: index[other] for name, other in model.all_tied_weights_keys.items() if other in index}
    return tied | index


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
