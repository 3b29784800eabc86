"""A model's folder with its sparse weights packed, and back: the same tensors, bit for bit.

Each file of weights, NAME.safetensors, becomes NAME.packed.safetensors in the same subfolder; `packed.json` says how
each tensor is packed. The rest of the folder is copied. config.json is as it was: no other tool is told what it would
not understand.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dass.checkpoint import INDEX, PACKED, model_contents, require_weights
from dass.errors import DassError, told
from dass.folders import SEAL, whole_folder
from dass.kernels import speed_up
from dass.models import DTYPES, load_model, resolve_device, resolve_dtype
from dass.packing import Packed, pack, unpack
from dass.pruning.masks import NM
from dass.records import identity_of, read_json
from dass.saving import BESIDE

PARTS = ("values", "codes", "negative")
"""Behind the name of a tensor: the parts of a `Packed`."""


def pack_model(source: Path, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Write a model's folder packed, whole or not at all.

    Args:
        source: a folder with safetensors.
        folder: is made; one that this project wrote and nobody changed is replaced.

    Returns:
        By how tensors are packed (in, out, bitmask; dense: not), how many, and their bytes before and after.

    Raises:
        DassError: there is no model, it is packed already, or the folder holds something else.
    """
    if (source / PACKED).exists():
        raise DassError(f"{source} is packed already: unpack it with unpack=true.", field="model")
    contents, sums = model_contents(source), dict[str, tuple[int, int, int]]()
    index = read_json(source / INDEX) if (source / INDEX).is_file() else None
    about: dict[str, Any] = {"contents": contents, "index": index, "files": {}, "tensors": {}}
    with _written(source, folder, identity_of({"packed": contents})) as new:
        for path in require_weights(source):
            tensors: dict[str, Tensor] = {}
            for key, tensor in _tensors(path):
                is_weight = tensor.dtype in DTYPES.values() and tensor.ndim > 1 and tensor.numel()
                packed = pack(tensor) if is_weight else None
                if packed is None:
                    tensors[key] = tensor
                else:
                    parts = ((part, getattr(packed, part)) for part in PARTS)
                    tensors |= {f"{key} {part}": one.contiguous() for part, one in parts if one is not None}
                    pattern = None if packed.pattern is None else [packed.pattern.n, packed.pattern.m]
                    about["tensors"][key] = {"shape": packed.shape, "packing": packed.packing, "pattern": pattern}
                name, after = ("dense", tensor.nbytes) if packed is None else (packed.packing, packed.nbytes)
                count, *sizes = sums.get(name, (0, 0, 0))
                sums[name] = (count + 1, sizes[0] + tensor.nbytes, sizes[1] + after)
            file = path.relative_to(source)  # shards of other folders may bear the same name
            place = file.with_name(f"{path.stem}.packed.safetensors")
            about["files"][file.as_posix()] = place.as_posix()
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, new / place)
        (new / PACKED).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return sums


def unpack_model(packed: Path, folder: Path) -> None:
    """Write a packed folder as it was before: the same files of weights, with the same tensors bit for bit.

    Raises:
        DassError: it is not one that `pack_model` wrote, or `folder` holds something else.
    """
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
    with told(f"{packed} is no packed model", "pack it again with `python -m experiments.pack`", *kinds):
        about = read_json(packed / PACKED)
        contents, files, known = str(about["contents"]), dict(about["files"]), dict(about["tensors"])
        for name in (*files, *files.values()):
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ValueError(f"{name} lies outside of it")
        with _written(packed, folder, identity_of({"unpacked": contents})) as new:
            for name, file in files.items():
                found = dict(_tensors(packed / file))
                for key, facts in known.items():
                    if f"{key} values" in found:
                        parts = {part: found.pop(f"{key} {part}", None) for part in PARTS}
                        pattern = None if facts["pattern"] is None else NM(*facts["pattern"])
                        found[key] = unpack(Packed(tuple(facts["shape"]), facts["packing"], pattern, **parts))
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                save_file(found, new / name, {"format": "pt"})
            if about["index"] is not None:
                (new / INDEX).write_text(json.dumps(about["index"], indent=2) + "\n", encoding="utf-8")


def load_packed(
    folder: Path,
    dtype: str = "auto",
    device: str = "cpu",
    kernels: bool = False,
    projections: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """A packed model in transformers, in evaluation mode.

    Args:
        dtype: one of `DTYPES`, or auto: its own.
        device: as torch has it.
        kernels: whether layers that the audit calls accelerated are semi-structured tensors, which needs a GPU.
        projections: for these, see `find_blocks`.

    Raises:
        DassError: what `unpack_model` and `load_model` raise, or there is no GPU.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        unpack_model(folder, place)
        model = load_model(str(place), None, resolve_dtype(dtype, str(place), None), resolve_device(device))
    if kernels:
        speed_up(model, projections)
    return model


@contextmanager
def _written(source: Path, folder: Path, fingerprint: str) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, with what lies in the source beside the weights."""
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise DassError(f"out={folder} would replace {source}: choose another folder.", field="out")
    kinds = (OSError, SafetensorError)
    with (
        told(f"Cannot write {folder}", "free space or choose another", *kinds, field="out"),
        whole_folder(folder, fingerprint) as new,
    ):
        for path in (path for pattern in BESIDE for path in source.glob(pattern)):
            name = path.relative_to(source)
            if path.is_file() and name.name not in (SEAL, PACKED) and ".index." not in name.name:
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, new / name)
        yield new


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, by name, one at a time."""
    with (
        told(f"{path} cannot be read", "copy or pack it again", OSError, SafetensorError),
        safe_open(path, framework="pt") as file,
    ):
        for name in file.keys():  # noqa: SIM118  (it is no dictionary)
            yield name, file.get_tensor(name)
