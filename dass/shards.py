"""Files of safetensors that are read and written a tensor, or a part of one, at a time."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass.checkpoint import INDEX
from dass.errors import told
from dass.pruning.stacks import bytes_of

SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SAFETENSORS |= {torch.int64: "I64", torch.int16: "I16", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
CHUNK = 2**16  # bytes at a time: for larger writes the system looks for large pages in its cache, which costs far more
Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors of a file in order: dtype and shape by name."""


def read_from(file: str | Path, name: str, expert: int | None = None) -> Tensor:
    """A tensor of a file, or a row of it; on the host, perhaps mapped."""
    with (
        told(f"{file} cannot be read", "copy or download it again", OSError, SafetensorError),
        safe_open(file, framework="pt") as opened,
    ):
        return opened.get_tensor(name) if expert is None else opened.get_slice(name)[expert]


def write_in_turn(path: Path, header: Header, tensors: Iterable[Tensor]) -> None:
    """Write a file of safetensors, whole or not at all, each tensor, or part of one, as it comes; makes the folder.

    Args:
        tensors: in the order and of the dtypes of the header; of the parts of a tensor along its first axis, each.

    Raises:
        DassError: it cannot be written.
    """
    entries, end = {}, 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with told(f"Cannot write {path}", "free space or choose another folder", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                found = memoryview(bytes_of(tensor))
                del tensor
                for start in range(0, len(found), CHUNK):
                    file.write(found[start : start + CHUNK])
                del found  # before the next one is there
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same of whole tensors."""
    write_in_turn(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, tensors.values())


def number_shards(folder: Path, more: list[Path]) -> None:
    """Make the weight files of a folder, with more of them behind, the shards of one model, and write their index."""
    own = sorted(path for path in folder.glob("*.safetensors") if path not in more)
    places: dict[str, str] = {}
    size = 0
    for i, path in enumerate([*own, *more], 1):
        shard = folder / f"model-{i:05d}-of-{len(own) + len(more):05d}.safetensors"
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), shard.name)
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (mapped, and not read)
        os.rename(path, path.with_name(f"{shard.name}.new"))  # none takes the name of another before that is read
    for path in folder.glob("*.new"):
        os.rename(path, path.with_suffix(""))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
