"""Models larger than memory: the blocks lie on disk, and each is in memory only while it is worked on.

transformers and accelerate make the model without its blocks' weights and tell where on disk each of them lies, as they
do for offloading. Their way of bringing them, layer by layer in every forward, would read a block once for each batch;
a `Shelf` brings it once for all batches; meanwhile the next one is read, and the one before is written. Where a block
does not fit, either, its experts come one by one in every forward, see dass/pruning/stacks.py.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.checkpoint import Stored, require_places, require_weights, stored_tensors
from dass.errors import DassError, require_finite
from dass.experts import Apart, found_apart
from dass.models import auto_class, from_folder, load_config, model_folder, named_weights, require_supported
from dass.offloaded import Index, index_of, loading_map, mismatched, places, undispatched
from dass.pruning.blocks import Block
from dass.pruning.layout import find_blocks
from dass.pruning.stacks import Stack
from dass.shards import number_shards, read_from, write_in_turn

logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is meant here


class Shelf:
    """Where the blocks of a model lie while they are not in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[Block],
        index: Index,
        device_map: Any,
        folder: Path,
        by_expert: bool = False,
        apart: Mapping[str, Apart] | None = None,
        stored: Mapping[str, Stored] | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            folder: takes the blocks that are changed; the files of the source stay as they are.
            by_expert: whether experts come one by one.
            apart, stored: where those lie that the index does not know, and where the tensors of the source.
        """
        self.by_expert, self.apart, self.stored = by_expert, apart or {}, stored or {}
        self.stored_as = {name: about["weight_name"] for name, about in index.items()}
        self.model, self.blocks, self.index, self.device_map, self.folder = model, blocks, index, device_map, folder
        self.device = model.device
        self._followers = {one.name: other for one, other in pairwise(blocks)}
        # one thing at a time, so that no more than two blocks are in memory: what is read waits for what is written
        self._disk: Executor = ThreadPoolExecutor(1, "read or write a block")
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._written: tuple[Block, Future[None]] | None = None

    @contextmanager
    def hold(self, block: Block) -> Iterator[None]:
        """Have a block in memory, as it lies on disk; the one behind it is read meanwhile."""
        follower = self._followers.get(block.name)
        if self._written is not None and self._written[0].name in (block.name, follower and follower.name):
            self.settle()
        if self._next is not None and self._next[0] == block.name:
            found = self._next[1]
        else:
            found = self._disk.submit(self._read, block)
        tensors = found.result()
        del found  # or it would keep what is taken out of it here
        self._next = None if follower is None else (follower.name, self._disk.submit(self._read, follower))
        for name in list(tensors):
            _put(block, name, tensors.pop(name))
        for name, (module, key) in self.experts(block).items():
            whole = getattr(module, key)
            read = partial(self._read_one, name, whole.dtype)
            # it hides the parameter, which stays where it was, without memory
            module.__dict__[key] = Stack(whole, self.device, read, self.folder, self._disk)
        try:
            yield
        finally:
            self.drop(block)

    def experts(self, block: Block) -> dict[str, tuple[nn.Module, str]]:
        """The parameters of a block whose experts come one by one, by their full names: whose they are, and as what."""
        return block.experts if self.by_expert else {}

    def drop(self, block: Block) -> None:
        """Give up the memory of a block."""
        for module, key in self.experts(block).values():
            if key in module.__dict__:
                module.__dict__.pop(key).close()
        for name, parameter in list(block.module.named_parameters()):
            _put(block, f"{block.name}.{name}", torch.empty_like(parameter, device="meta"))

    @contextmanager
    def change(self, block: Block, stored: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Have a block in memory, and write it, as `stored` gives each weight by its name, unless there is an error.

        It is written while the next one is worked on: what goes wrong there is told by `settle`, or by the next change.
        """
        with self.hold(block):
            try:
                yield
            except BaseException:
                with suppress(DassError):  # another error is told already
                    self.settle()
                raise
            self.settle()
            path, dense = block_path(self.folder, block), weights_of(block, stored)
            header = {name: (tensor.dtype, tensor.shape) for name, tensor in dense.items()}
            stacks = {name: getattr(module, key) for name, (module, key) in self.experts(block).items()}
            for name, stack in stacks.items():
                header[name] = stored(name, torch.zeros(1, dtype=stack.dtype)).dtype, stack.shape
            each = (map(partial(stored, name), stack) for name, stack in stacks.items())  # holds none, unlike a loop
            tensors = chain((dense.pop(name) for name in list(dense)), *each)
            if stacks:  # which close with the block
                write_in_turn(path, header, tensors)
                self.adopt(block, path)
            else:
                self._written = block, self._disk.submit(write_in_turn, path, header, tensors)

    def settle(self) -> None:
        """Wait until the block that was changed last lies on the disk; DassError where it cannot be written."""
        if self._written is not None:
            (block, written), self._written = self._written, None
            written.result()
            self.adopt(block, block_path(self.folder, block))

    @contextmanager
    def dispatched(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
        """The model as transformers knows models that lie on disk, to be saved shard by shard in these dtypes."""
        self.settle()
        words = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        index = {name: about | {"dtype": words.get(name, about["dtype"])} for name, about in self.index.items()}
        dispatch_model(self.model, self.device_map, offload_index=index, offload_dir=str(self.folder), force_hooks=True)
        try:
            yield
        finally:
            remove_hook_from_module(self.model, recurse=True)

    def adopt(self, block: Block, path: Path) -> None:
        """Take a block from a file that `change` wrote, in another process."""
        for name, parameter in block.module.named_parameters():
            full, dtype = f"{block.name}.{name}", str(parameter.dtype).removeprefix("torch.")
            self.index[full] = {"safetensors_file": str(path), "weight_name": full, "dtype": dtype}

    def save(self, folder: Path, dtypes: Mapping[str, torch.dtype]) -> None:
        """Save the model to shards in these dtypes, as transformers does: one holds what is in memory of a block.

        Experts that come one by one, or that lie apart in the source, are written so, under the names that they have
        there, and have shards of their own behind those.
        """
        experts = {
            block.name: {name: one for name, one in block.experts.items() if self.by_expert or name in self.apart}
            for block in self.blocks
        }
        ours = {name for own in experts.values() for name in own}
        with warnings.catch_warnings(), self.dispatched(dtypes):
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in ours}
            self.model.save_pretrained(folder, state_dict=weights, max_shard_size=self.block_bytes())
        paths = []
        for name, own in experts.items():
            if own:
                paths.append(folder / f"experts of {name}.safetensors")
                self._write_experts(paths[-1], own, dtypes)
        if paths:
            number_shards(folder, paths)

    def block_bytes(self) -> int:
        """The size of the largest block in memory, without experts that come one by one, bytes."""
        return max(
            sum(
                parameter.numel() * parameter.element_size()
                for name, parameter in block.module.named_parameters()
                if f"{block.name}.{name}" not in self.experts(block)
            )
            for block in self.blocks
        )

    def _write_experts(
        self, path: Path, parameters: dict[str, tuple[nn.Module, str]], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        header = {}
        for name, (module, key) in parameters.items():
            whole, apart = getattr(module, key), self.apart.get(name)
            if apart is None:
                header[self.stored_as[name]] = dtypes[name], whole.shape
            else:
                shapes = [part.shape for part in apart.cut(whole[0])]
                header |= {
                    one: (dtypes[name], shape)
                    for names in apart.names
                    for one, shape in zip(names, shapes, strict=True)
                }
        each = (
            part
            for name, (module, key) in parameters.items()
            for e in range(len(getattr(module, key)))
            for part in self._parts(name, self._read_one(name, dtypes[name], e))
        )
        write_in_turn(path, header, each)

    def _parts(self, name: str, expert: Tensor) -> tuple[Tensor, ...]:
        return self.apart[name].cut(expert) if name in self.apart else (expert,)

    def _read_one(self, name: str, dtype: torch.dtype, expert: int) -> Tensor:
        """An expert of a parameter, by its full name, as it lies on disk."""
        if (about := self.index.get(name)) is not None:
            found = read_from(about["safetensors_file"], about["weight_name"], expert)
        else:
            apart = self.apart[name]
            found = torch.cat([read_from(self.stored[one].file, one) for one in apart.names[expert]], apart.axis)
        tensor = found.to(self.device, dtype, copy=True)
        require_finite(tensor, f"The weights {name}.{expert}")
        return tensor

    def _read(self, block: Block) -> dict[str, Tensor]:
        tensors, experts = {}, self.experts(block)
        for name, parameter in ((f"{block.name}.{name}", one) for name, one in block.module.named_parameters()):
            if name in experts:
                continue
            if (about := self.index.get(name)) is not None:
                found = read_from(about["safetensors_file"], about["weight_name"])
                # a copy in any case: what is mapped from the file is read when it is used, and shared with it
                tensors[name] = found.to(self.device, getattr(torch, about["dtype"]), copy=True)
                require_finite(tensors[name], f"The weights {name}")
            else:
                tensors[name] = torch.empty_like(parameter, device=self.device)
                for expert, place in enumerate(tensors[name]):
                    place.copy_(self._read_one(name, parameter.dtype, expert))
        return tensors


def block_path(folder: Path, block: Block) -> Path:
    """Where a block lies in a folder of changed ones."""
    return folder / f"{block.name}.safetensors"


def weights_of(block: Block, stored: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The weights of a block by their full names, as they are to be stored; but for experts that come one by one."""
    named = ((f"{block.name}.{name}", parameter.detach()) for name, parameter in block.module.named_parameters())
    return {name: stored(name, tensor) for name, tensor in named if not tensor.is_meta}


def load_streamed(
    source: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    folder: Path,
    projections: dict[str, str] | None = None,
    by_expert: bool = False,
) -> tuple[PreTrainedModel, Shelf]:
    """A causal language model as `load_model` gives it, but for its blocks, which lie on the shelf.

    Args:
        folder: takes what changes, and weights that transformers puts together in a way of its own.
        projections: see `find_blocks`.
        by_expert: whether the experts of a block come one by one, and are never in memory together.

    Raises:
        DassError: as `load_model`; a weight that is NaN or infinite inside a block is found when the block is read.
            Experts that are stored in a way in which they cannot come one by one.
    """
    place = model_folder(source, revision)
    require_weights(place)
    config = load_config(str(place), None)
    require_supported(config)
    stored = stored_tensors(place)
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=False)
    blocks = find_blocks(empty, projections)
    device_map = dict(places(empty, "", {block.name for block in blocks}, str(device)))
    apart = found_apart(empty, stored, {name for block in blocks for name in block.experts}, needed=by_expert)
    with undispatched() as written:
        loaded = loading_map(empty, device_map, stored, apart, str(device))
        model, loading = from_folder(place, config, source, dtype, loaded, folder)
    index = index_of(model, stored, written)
    # transformers does not look at the shapes of what lies on disk
    loading["mismatched_keys"] = {*loading["mismatched_keys"], *mismatched(model, index, stored, apart)}
    require_places(model, stored, loading, source)
    for name, tensor in named_weights(model):
        if not tensor.is_meta:
            require_finite(tensor, f"The weights {name} of {source}")
    model.eval().requires_grad_(False)
    return model, Shelf(model, find_blocks(model, projections), index, device_map, folder, by_expert, apart, stored)


def _put(block: Block, name: str, tensor: Tensor) -> None:
    """Give a parameter of a block, by its full name, other memory."""
    path, _, key = name.removeprefix(f"{block.name}.").rpartition(".")
    block.module.get_submodule(path)._parameters[key] = nn.Parameter(tensor, requires_grad=False)
