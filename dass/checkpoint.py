"""What a model's folder holds, by its files and their headers: what cannot be loaded as it stands is told by name."""

import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dass.errors import DassError, told
from dass.folders import SEAL
from dass.records import file_sha256, identity_of, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKED = "packed.json"  # in a folder whose weights are packed, see dass/packed_model.py
CONTENT_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of weights, configuration and tokenizer
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
COMPUTED = re.compile(r"(^|[._])(inv_freq|position_ids|causal_mask)$")
"""Buffers that the code computes anew, whatever an old checkpoint holds."""
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
"""Such buffers of the first GPT models, and by its shape no bias."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of weights."""

    dtype: str  # as safetensors writes it: F16, I8, ...
    shape: tuple[int, ...]
    file: Path


def require_weights(folder: Path) -> list[Path]:
    """The files of a model folder that its weights are read from, none of which is opened.

    Raises:
        DassError: it holds no safetensors (pickled weights do not count), a file of them is lacking or no file, or an
            adapter lies beside them.
    """
    if adapters := sorted([*folder.glob("adapter_config.json"), *folder.glob("adapter_model*")]):
        raise DassError(
            f"{adapters[0]} is an adapter (LoRA) that is not merged into the weights: merge it, as with peft's "
            f"`merge_and_unload`, and save the model without it."
        )
    if os.path.lexists(folder / WEIGHTS):
        files = [folder / WEIGHTS]
    elif os.path.lexists(folder / INDEX):
        files = [folder / name for name in _shards(folder / INDEX)]
    elif os.path.lexists(folder / PACKED):
        raise DassError(
            f"The weights of {folder} are packed: unpack them with `python -m experiments.pack model={folder} out=DIR "
            f"unpack=true`."
        )
    else:
        raise DassError(
            f"The model folder {folder} holds no weights ({WEIGHTS}, or {INDEX} and its shards): save the model there."
        )
    for file in files:
        _require_file(file)
    return files


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors in the weights of a model folder by name; DassError where a file is damaged or they are quantised."""
    stored = {name: tensor for path in require_weights(folder) for name, tensor in tensors_in(path).items()}
    for name, tensor in stored.items():
        if _is_quantised(name, tensor):
            raise DassError(
                f"{folder} holds {name} as {tensor.dtype}, so it is quantised, though its config.json does not say so: "
                f"pruning needs weights in floating point, so dequantise it first."
            )
    return stored


def tensors_in(path: Path) -> dict[str, Stored]:
    """The tensors in a file of weights by name; DassError where it is damaged."""
    with (
        told(f"Cannot load the weights {path}", "fetch or save them again", OSError, SafetensorError, ValueError),
        safe_open(path, framework="np") as file,
    ):
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        return {name: Stored(part.get_dtype(), tuple(part.get_shape()), path) for name, part in parts.items()}


def most_stored(folder: Path) -> str | None:
    """torch's name of the floating-point dtype that most weights of a model folder are stored in; None: of none."""
    counts = dict.fromkeys(FLOATS, 0)
    for tensor in stored_tensors(folder).values():
        if tensor.dtype in FLOATS:
            counts[tensor.dtype] += math.prod(tensor.shape)
    most = max(counts, key=lambda dtype: counts[dtype])
    return FLOATS[most] if counts[most] else None


def require_places(model: PreTrainedModel, stored: dict[str, Stored], loading: dict[str, Any], source: str) -> None:
    """Raise DassError if a model and the weights that it was loaded from do not match, unless it does no harm.

    Args:
        loading: what `from_pretrained` tells of it.
    """
    if missing := sorted(loading["missing_keys"]):
        raise DassError(f"The weights of {source} lack {missing[0]}{_more(missing)}: save it again.")
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise DassError(
            f"The weights of {source} hold {name} as {tuple(found)} where its config.json says {tuple(expected)}: "
            f"use the config.json that belongs to them."
        )
    if surplus := sorted(name for name in loading["unexpected_keys"] if not _is_harmless(name, stored.get(name))):
        lora = any(".lora_" in name or ".base_layer." in name for name in surplus)
        advice = "merge the adapter" if lora else "correct its number of layers and the like"
        raise DassError(
            f"The weights of {source} hold {surplus[0]}{_more(surplus)}, for which its config.json has no place: "
            f"{advice}, or save the model again."
        )
    untied = set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys)
    if untied:
        raise DassError(
            f"The weights of {source} hold {min(untied)} with values of its own, though its config.json ties it to the "
            f"embedding: set tie_word_embeddings to false there, or remove it from the weights."
        )


def model_contents(folder: Path) -> str:
    """16 hex digits over the names and contents of a model folder's weights, configuration and tokenizer.

    Shards that an index names count wherever they lie; cards, licences and our own seal do not. Hashed again only if a
    file was touched since. DassError if one lacks, or changes meanwhile.
    """
    with told(f"The model folder {folder} cannot be read", "fetch it again or ask its owner", OSError):
        if not folder.is_dir():
            advice = "give a folder written by `save_pretrained`"
            raise DassError(f"There is no model folder {folder}: {advice}.", "model.path")
        require_weights(folder)
        ours = (SEAL, "LICEN", "NOTICE", "COPYING", "USE_POLICY")
        found = [path for path in folder.iterdir() if path.suffix in CONTENT_SUFFIXES and not path.is_dir()]
        names = {path.name for path in found if not path.name.startswith(ours)}
        for index in folder.glob("*.safetensors.index.json"):
            names |= set(_shards(index))
        stamps = _stamps(folder, names)
        contents = _contents_at(folder, stamps)
        if _stamps(folder, names) != stamps:
            raise DassError(f"The model folder {folder} is being written to: wait until it is whole.")
    return contents


def require_contents(folder: Path, contents: str) -> None:
    """Raise DassError if a folder no longer holds what it did, so that no other model bears its identity."""
    if model_contents(folder) != contents:
        raise DassError(f"The model folder {folder} was changed while it was in use: run again with what it holds now.")


def _stamps(folder: Path, names: set[str]) -> tuple[tuple[Any, ...], ...]:
    """What the system changes whenever a file is replaced or written to."""
    stamps = []
    for name in sorted(names):
        _require_file(folder / name)
        found = os.stat(folder / name)
        times = (found.st_mtime_ns, found.st_ctime_ns)  # the second cannot be set
        stamps.append((name, found.st_dev, found.st_ino, found.st_size, *times))
    return tuple(stamps)


@functools.lru_cache(maxsize=64)
def _contents_at(folder: Path, stamps: tuple[tuple[Any, ...], ...]) -> str:
    return identity_of({name: file_sha256(folder / name) for name, *_ in stamps})


def _shards(index: Path) -> list[str]:
    """The files that an index names, relative to its folder."""
    with told(f"{index} cannot be read as an index of weights", "fetch it again", OSError, ValueError):
        _require_file(index)
        tree = read_json(index)
        weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ValueError("it has no weight_map from names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise DassError(f"{index} names {name}, which is not in its folder: put all files of a model into it.")
        if not os.path.lexists(index.parent / name):
            raise DassError(f"{index.parent} lacks {name}, which its index names: fetch it again.")
    return names


def _require_file(path: Path) -> None:
    if not path.is_file():
        why = "is a link to nothing" if path.is_symlink() and not path.exists() else "is no file"
        raise DassError(f"{path} {why}: fetch the model again.")
    if not os.access(path, os.R_OK):
        raise DassError(f"{path} may not be read: change its permissions or ask its owner.")


def _is_quantised(name: str, tensor: Stored) -> bool:
    """Whether these are weights in anything but the floating point that they are computed with."""
    if tensor.dtype in FLOATS or _is_harmless(name, tensor):
        return False
    if tensor.dtype.startswith("F") or name.endswith("weight"):
        return True
    return len(tensor.shape) > 1 and tensor.dtype not in ("BOOL", "I64")  # those are masks, and tables of indices


def _is_harmless(name: str, tensor: Stored | None) -> bool:
    if COMPUTED.search(name):
        return True
    return tensor is not None and len(tensor.shape) in (0, 4) and CAUSAL_MASK.search(name) is not None


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
