"""Models larger than memory: the blocks lie on disk, and each is in memory only while it is worked on.

transformers and accelerate make the model without its blocks' weights and tell where on disk each of them lies, as they
do for offloading. Their way of bringing them, layer by layer in every forward, would read a block once for each batch;
a `Shelf` brings it once for all batches, and the next one is read meanwhile.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dass.checkpoint import require_places, require_weights, stored_tensors
from dass.errors import DassError, require_finite, told
from dass.models import DTYPES, from_folder, load_config, model_folder, require_supported
from dass.pruning.blocks import Block
from dass.pruning.layout import find_blocks

logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is meant here

Index = dict[str, dict[str, str]]
"""Where a weight lies, by its full name, as accelerate has it: `safetensors_file`, `weight_name`, and its `dtype`."""


class Shelf:
    """Where the blocks of a model lie while they are not in memory."""

    def __init__(
        self, model: PreTrainedModel, blocks: list[Block], index: Index, device_map: Any, folder: Path
    ) -> None:
        """`folder`: takes the blocks that are changed; the files of the source stay as they are."""
        self.model, self.blocks, self.index, self.device_map, self.folder = model, blocks, index, device_map, folder
        self.device = model.device
        self._followers = {one.name: other for one, other in pairwise(blocks)}
        self._reader: Executor = ThreadPoolExecutor(1, "read a block")
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None

    @contextmanager
    def hold(self, block: Block) -> Iterator[None]:
        """Have a block in memory, as it lies on disk; the one behind it is read meanwhile."""
        if self._next is not None and self._next[0] == block.name:
            found = self._next[1]
        else:
            found = self._reader.submit(self._read, block)
        tensors = found.result()
        del found  # or it would keep what is taken out of it here
        follower = self._followers.get(block.name)
        self._next = None if follower is None else (follower.name, self._reader.submit(self._read, follower))
        for name in list(tensors):
            _put(block, name, tensors.pop(name))
        try:
            yield
        finally:
            self.drop(block)

    def drop(self, block: Block) -> None:
        """Give up the memory of a block."""
        for name, parameter in list(block.module.named_parameters()):
            _put(block, f"{block.name}.{name}", torch.empty_like(parameter, device="meta"))

    @contextmanager
    def change(self, block: Block, stored: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Have a block in memory, and write it, as `stored` gives each weight by its name, unless there is an error."""
        with self.hold(block):
            yield
            path = block_path(self.folder, block)
            write_tensors(path, weights_of(block, stored))
        self.adopt(block, path)

    @contextmanager
    def dispatched(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
        """The model as transformers knows models that lie on disk, to be saved shard by shard in these dtypes."""
        words = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        index = {name: about | {"dtype": words.get(name, about["dtype"])} for name, about in self.index.items()}
        dispatch_model(self.model, self.device_map, offload_index=index, offload_dir=str(self.folder), force_hooks=True)
        try:
            yield
        finally:
            remove_hook_from_module(self.model, recurse=True)

    def adopt(self, block: Block, path: Path) -> None:
        """Take a block from a file that `change` wrote, in another process."""
        for name, _ in block.module.named_parameters():
            full = f"{block.name}.{name}"
            self.index[full] |= {"safetensors_file": str(path), "weight_name": full}

    def block_bytes(self) -> int:
        """The size of the largest block in memory, bytes."""
        return max(sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in self.blocks)

    def _read(self, block: Block) -> dict[str, Tensor]:
        tensors = {}
        for name, _ in block.module.named_parameters():
            about = self.index[f"{block.name}.{name}"]
            path, dtype = about["safetensors_file"], getattr(torch, about["dtype"])
            with (
                told(f"{path} cannot be read", "copy or download it again", OSError, SafetensorError),
                safe_open(path, framework="pt") as file,
            ):
                # a copy in any case: what is mapped from the file is read when it is used, and shared with it
                tensor = file.get_tensor(about["weight_name"]).to(self.device, dtype, copy=True)
            require_finite(tensor, f"The weights {block.name}.{name}")
            tensors[f"{block.name}.{name}"] = tensor
        return tensors


def block_path(folder: Path, block: Block) -> Path:
    """Where a block lies in a folder of changed ones."""
    return folder / f"{block.name}.safetensors"


def weights_of(block: Block, stored: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The weights of a block by their full names, as they are to be stored."""
    named = ((f"{block.name}.{name}", parameter.detach()) for name, parameter in block.module.named_parameters())
    return {name: stored(name, tensor) for name, tensor in named}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, whole or not at all; makes the folder. DassError where they cannot be written."""
    partial = path.with_suffix(".partial")
    with told(f"Cannot write {path}", "free space or choose another folder", OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def load_streamed(
    source: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    folder: Path,
    projections: dict[str, str] | None = None,
) -> tuple[PreTrainedModel, Shelf]:
    """A causal language model as `load_model` gives it, but for its blocks, which lie on the shelf.

    Args:
        folder: takes what changes, and weights that transformers stores otherwise than it holds them (experts).
        projections: see `find_blocks`.

    Raises:
        DassError: as `load_model`; a weight that is NaN or infinite inside a block is found when the block is read.
    """
    place = model_folder(source, revision)
    require_weights(place)
    config = load_config(str(place), None)
    require_supported(config)
    stored = stored_tensors(place)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {block.name for block in find_blocks(empty, projections)}
    device_map = dict(_places(empty, "", names, str(device)))
    model, loading = from_folder(place, config, source, dtype, device_map, folder)
    require_places(model, stored, loading, source)
    index = _index_of(model)
    remove_hook_from_module(model, recurse=True)
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            require_finite(parameter, f"The weights {name} of {source}")
    model.eval().requires_grad_(False)
    return model, Shelf(model, find_blocks(model, projections), index, device_map, folder)


def memory_needed(
    source: str,
    revision: str | None,
    dtype: str,
    projections: dict[str, str] | None = None,
    check: Callable[[list[Block]], object] | None = None,
) -> tuple[int, int]:
    """Bytes of a model's weights, and of those that are in memory at once where its blocks lie on disk.

    From its configuration alone.

    Args:
        check: is given the blocks, which hold no numbers; None: a model whose blocks are not understood will do, and is
            needed whole.

    Raises:
        DassError: the configuration cannot be read, its model cannot be pruned here, or what `check` raises.
    """
    config = load_config(source, revision)
    require_supported(config)
    advice = "correct its entries"
    with told(f"The config.json of {source} makes no causal language model", advice, Exception), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    size, whole = DTYPES[dtype].itemsize, sum(p.numel() for p in empty.parameters())
    try:
        found = find_blocks(empty, projections)
    except DassError:
        if check is not None:
            raise
        return whole * size, whole * size
    if check is not None:
        check(found)
    blocks = [sum(p.numel() for p in block.module.parameters()) for block in found]
    return whole * size, (whole - sum(blocks) + at_once(blocks)) * size


def at_once(sizes: list[int]) -> int:
    """What the blocks of these sizes take in memory at most: one is worked on while the next is read."""
    return max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True)))


def _places(module: nn.Module, name: str, blocks: set[str], device: str) -> Iterator[tuple[str, str]]:
    """Where each part of a model is to lie: blocks on disk, what holds no block on the device."""
    if name in blocks:
        yield name, "disk"
    elif any(block.startswith(f"{name}." if name else "") for block in blocks):
        for child, part in module.named_children():
            yield from _places(part, f"{name}.{child}" if name else child, blocks, device)
    else:
        yield name, device


def _index_of(model: nn.Module) -> Index:
    """Where the weights lie, out of the hooks that accelerate put on the modules."""
    for module in model.modules():
        for hook in getattr(getattr(module, "_hf_hook", None), "hooks", [getattr(module, "_hf_hook", None)]):
            if getattr(hook, "weights_map", None) is not None:
                return {name: dict(about) for name, about in hook.weights_map.dataset.index.items()}
    return {}


def _put(block: Block, name: str, tensor: Tensor) -> None:
    """Give a parameter of a block, by its full name, other memory."""
    path, _, key = name.removeprefix(f"{block.name}.").rpartition(".")
    block.module.get_submodule(path)._parameters[key] = nn.Parameter(tensor, requires_grad=False)
