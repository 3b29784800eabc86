"""Save a pruned model: in its source's dtype, with all that the source had beside the weights, whole or not at all.

The folder is one of ours in the sense of dass/folders.py, and replaces no other.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from dass import hub
from dass.data.tokens import Tokenizer
from dass.errors import DassError, finite, first_line, told
from dass.folders import SEAL, read_seal, seal, temporary_beside, whole_folder, write_seal
from dass.models import DTYPES
from dass.records import file_sha256, write_atomically
from dass.streaming import Shelf

CARD, SOURCE_CARD = "README.md", "SOURCE_README.md"
BESIDE = [*hub.BESIDE, "additional_chat_templates/*.jinja"]
"""What is copied of a source: no weights, pickles or code; nor the names below and indices, which are written anew."""
WRITTEN = ("config.json", SOURCE_CARD, SEAL)
FOREIGN_KEYS = ("sparsity_config", "auto_map")
"""Of config.json: another tool's, which transformers and vLLM refuse, and code that is not copied."""


def model_card(
    name: str,
    base_model: str,
    licence: str | None,
    command: str,
    facts: dict[str, str],
    metrics: list[dict[str, Any]] | None = None,
) -> str:
    """The README.md of a pruned model, with the hub's metadata.

    Args:
        base_model: hub id, or a name, which the hub is not told.
        facts: method with its parameters, pattern, axis of each role, shares of zeros, fingerprint: a line each.
        metrics: as a record holds them; None: not evaluated.
    """
    metrics = metrics or []
    known = re.fullmatch(r"[a-z0-9.+-]*", (licence or "").lower()) is not None
    data = ModelCardData(
        model_name=name,
        base_model=base_model if "/" in base_model else None,
        license=(licence or "").lower() or None if known else "other",
        license_name=None if known else licence,
        tags=["pruning", "sparse", "dass"],
        library_name="transformers",
        pipeline_tag="text-generation",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=metric["dataset"],
                dataset_name=metric["dataset"],
                metric_type=metric["metric"],
                metric_value=metric["value"],
                metric_args={key: metric[key] for key in ("stderr", "n", "seq_len")},
            )
            for metric in metrics
        ],
        pruning=facts,
    )
    lines = "\n".join(f"- {fact}: {value}" for fact, value in facts.items())
    results = "\n".join(f"- {m['dataset']}, {m['metric']}: {m['value']:.4f} (n = {m['n']})" for m in metrics)
    return f"""---
{data.to_yaml()}
---

# {name}

{base_model}, pruned. Beside the weights all is as it was there; its own card, if it had one, is {SOURCE_CARD}.

{lines}

Made by [the DaSS reproduction](https://arxiv.org/abs/2405.01943) with

    {command}

{results or "Not evaluated."}
"""


def source_licence(source: str, revision: str | None) -> str | None:
    """The licence that a model's card, or the provenance of a packaged one, tells; None where neither does."""
    folder = _beside(source, revision)
    found = None
    if folder is not None and (folder / CARD).is_file():
        with contextlib.suppress(Exception):  # the header may hold anything
            data = ModelCard.load(folder / CARD).data
            found = data.license_name if data.license == "other" and data.license_name else data.license
    if folder is not None and found is None and (folder / "provenance.json").is_file():
        with contextlib.suppress(Exception):  # it may be somebody else's
            found = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["licence"]
    return None if found is None else ", ".join(map(str, found if isinstance(found, list) else [found]))


@torch.no_grad()
def round_to(model: PreTrainedModel, dtype: str) -> None:
    """Round every weight in place to what `save_model` will write, so that what is scored is what is saved.

    The dtype in which the model computes stays. DassError where a weight is too large for the other.
    """
    rounded = rounding(model, dtype)
    for name, tensor, target in _stored(model, dtype):
        if tensor.dtype != target and tensor.numel() and not tensor.is_meta:
            tensor.copy_(rounded(name, tensor))


def rounding(model: PreTrainedModel, dtype: str) -> Callable[[str, Tensor], Tensor]:
    """From a weight, by its full name, to what `save_model` writes; DassError where it is too large for that."""
    targets = {name: target for name, _, target in _stored(model, dtype)}

    def rounded(name: str, tensor: Tensor) -> Tensor:
        target = targets.get(name, tensor.dtype)
        found = tensor.to(target)
        if target != tensor.dtype and not finite(found):
            raise DassError(
                f"The weights {name}, rounded to {dtype}, hold NaN or infinite values, its largest being "
                f"{torch.finfo(target).max:g}: set model.dtype=bfloat16, or let the update obs clip them with "
                f"method.clip=true.",
                field="model.dtype",
            )
        return found

    return rounded


def save_model(
    model: PreTrainedModel,
    folder: Path,
    card: str,
    fingerprint: str,
    dtype: str,
    source: str | None = None,
    revision: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = "5GB",
    shelf: Shelf | None = None,
) -> dict[str, str]:
    """Write a normal transformers folder, whole or not at all; replaces one that we wrote and nobody changed.

    Args:
        model: is rounded to the dtype, too.
        card: the text of its README.md.
        fingerprint: of the run.
        dtype: one of `DTYPES`, of the saved weights; what the model's class keeps in fp32 remains so.
        source, revision: the hub id or folder that the model comes from; its files beside the weights are copied.
        tokenizer: to be saved where the source has none.
        shelf: of a model whose blocks lie on disk; a shard holds one of them.

    Returns:
        SHA-256 of the weight files by name.

    Raises:
        DassError: the folder holds something else, another process writes it just now, or it cannot be written.
    """
    round_to(model, dtype)
    kinds = (OSError, SafetensorError)
    with (
        told(f"Cannot write the model to {folder}", "free space or choose another", *kinds, field="save_model"),
        whole_folder(folder, fingerprint) as new,
    ):
        with _as_stored(model, dtype):
            if shelf is None:
                model.save_pretrained(new, max_shard_size=max_shard_size)
            else:
                shelf.save(new, {name: target for name, _, target in _stored(model, dtype)})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        _copy_beside(source, revision, new)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
        (new / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        (new / CARD).write_text(card, encoding="utf-8")
        files = seal(new, fingerprint)
    return {name: sha256 for name, sha256 in files.items() if name.endswith(".safetensors")}


def write_card(folder: Path, card: str, fingerprint: str) -> None:
    """Give a saved model another card, such as one with the metrics measured since.

    DassError if the folder is not ours as we wrote it, or another run has replaced it since.
    """
    with (
        told(f"Cannot write into {folder}", "free space or check its permissions", OSError, field="save_model"),
        temporary_beside(folder.absolute()) as temporary,  # so that nobody replaces it meanwhile
    ):
        held = read_seal(folder)
        if held is None or not (folder / CARD).is_file() or held[1].get(CARD) != file_sha256(folder / CARD):
            raise DassError(f"{folder} holds no saved model, or its card was changed since: save it again.")
        if held[0] != fingerprint:
            raise DassError(f"{folder} holds the model of another run by now, so its card stays: use a folder each.")
        write_atomically(temporary / CARD, card)
        write_seal(temporary, held[0], held[1] | {CARD: file_sha256(temporary / CARD)})
        for name in (CARD, SEAL):  # one after the other, with nothing between them
            os.replace(temporary / name, folder / name)


def _stored(model: PreTrainedModel, dtype: str) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Each floating-point weight that a checkpoint holds, shared ones once, and the dtype that it has there."""
    kept = model._get_dtype_plan(DTYPES[dtype])  # by patterns of names: what the class wants in fp32
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor, next((d for pattern, d in kept.items() if re.search(pattern, name)), DTYPES[dtype])


@contextlib.contextmanager
def _as_stored(model: PreTrainedModel, dtype: str) -> Iterator[None]:
    """The weights in the dtypes of the checkpoint for a while, one copy of each at a time; they are rounded already."""
    previous, config_dtype = [], model.config.dtype
    try:
        for _, tensor, target in _stored(model, dtype):
            previous.append((tensor, tensor.dtype))
            tensor.data = tensor.data.to(target)
        yield
    finally:
        for tensor, computed in previous:
            tensor.data = tensor.data.to(computed)
        model.config.dtype = config_dtype


def _beside(source: str, revision: str | None) -> Path | None:
    """The folder with what a source holds beside its weights: its own, or the hub's snapshot of it in the cache."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return hub.model_files(source, revision, weights=False)
    except Exception as error:  # the weights are worth saving all the same
        print(f"note: the files beside the weights of {source} are out of reach: {first_line(error)}", file=sys.stderr)
        return None


def _copy_beside(source: str | None, revision: str | None, folder: Path) -> None:
    """Copy what a source holds beside its weights; its README.md takes another name."""
    origin = None if source is None else _beside(source, revision)
    if origin is None:
        return
    for path in (path for pattern in BESIDE for path in origin.glob(pattern)):
        name = path.relative_to(origin).as_posix()
        if path.is_file() and name not in WRITTEN and ".index." not in name:
            target = folder / (SOURCE_CARD if name == CARD else name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
