"""Load a causal language model from the hub, a folder or a package, and save a pruned one."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dass.data.calibration import Tokenizer
from dass.errors import DassError, first_line, require_finite
from dass.records import file_sha256

transformers_logging.disable_progress_bar()  # loading is a matter of seconds; the long stages have bars of ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CARD = "README.md"
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of the files of a saved model


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU; any other word is torch's own.

    Raises:
        DassError: an unknown device, or a GPU that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DassError(f"device={device} cannot be used here: choose auto, cpu or a GPU that torch sees.") from error
    return resolved


def resolve_dtype(dtype: str, source: str, revision: str | None) -> str:
    """The name of a dtype in `DTYPES`; `auto` is the model's own.

    Raises:
        DassError: an unknown dtype, or a model whose config cannot be read.
    """
    if dtype == "auto":
        dtype = str(load_config(source, revision).dtype or torch.float32).removeprefix("torch.")
    require_dtype(dtype)
    return dtype


def require_dtype(dtype: str) -> None:
    """Raise DassError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise DassError(f"model.dtype={dtype} is unknown: choose auto or one of {', '.join(DTYPES)}.")


def load_config(source: str, revision: str | None) -> Any:
    """The transformers config of a hub id or folder; DassError where it cannot be read."""
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # a foreign file can make transformers raise anything
        raise DassError(_why_not_loaded(source, error)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise DassError(f"{source} is quantised: pruning needs its weights in floating point, so dequantise it first.")
    return config


def load_model(source: str, revision: str | None, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in evaluation mode, on one device.

    Args:
        source: a hub id or a folder with safetensors (pickled weights are refused).
        revision: the hub's commit or branch; None for a folder.
        dtype: one of `DTYPES`.

    Raises:
        DassError: it cannot be loaded (absent, gated, without weights), or a weight is NaN or infinite.
    """
    if Path(source).is_dir():
        require_weights(Path(source))
    config = load_config(source, revision)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise DassError(_why_not_loaded(source, error)) from error
    if missing := sorted(loading["missing_keys"]):
        raise DassError(f"The weights of {source} lack {missing[0]} (and {len(missing) - 1} more): save it again.")
    for name, parameter in model.named_parameters():
        require_finite(parameter, f"The weights {name} of {source}")
    return model.eval().requires_grad_(False)


def require_weights(folder: Path) -> None:
    """Raise DassError if a model folder holds no safetensors; pickled weights do not count."""
    if not any(folder.glob("*.safetensors")):
        raise DassError(f"The model folder {folder} holds no weights (*.safetensors): save the model there first.")


def load_tokenizer(source: str, revision: str | None) -> Tokenizer:
    """The tokenizer of a hub id or folder; DassError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:
        if _is_gated(error):
            raise DassError(_why_not_loaded(source, error)) from error
        raise DassError(
            f"{source} has no usable tokenizer ({first_line(error)}): save one beside the model, "
            f"or use calibration=tokens_file and evaluation=none."
        ) from error


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights, configuration and tokenizer.

    Raises:
        DassError: there is no such folder, or it holds no weights.
    """
    if not folder.is_dir():
        raise DassError(f"There is no model folder {folder}: give a folder written by `save_pretrained`.")
    require_weights(folder)
    names = [p for p in sorted(folder.iterdir()) if p.suffix in MODEL_SUFFIXES]
    return "-".join(f"{path.name}:{file_sha256(path)}" for path in names)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer | None, folder: Path, card: str) -> None:
    """Write a normal transformers folder with a model card, whole or not at all; replaces one that we wrote.

    Raises:
        DassError: the folder holds something else, or cannot be written.
    """
    require_own_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            (temporary / CARD).write_text(card, encoding="utf-8")
            temporary.chmod(0o755)
            for path in temporary.iterdir():
                path.chmod(0o644)  # safetensors writes files that nobody else may read
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise DassError(f"Cannot write the model to {folder} ({why}): free space or choose another.") from error


def require_own_folder(folder: Path) -> None:
    """Raise DassError if a folder exists and holds anything but a model that `save_model` wrote."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and card_id(folder) is None):
        raise DassError(f"save_model={folder} exists and is not a model of this project: choose another folder.")
    foreign = [path.name for path in folder.iterdir() if path.name != CARD and path.suffix not in MODEL_SUFFIXES]
    if foreign:
        raise DassError(
            f"save_model={folder} would be replaced, but it also holds {foreign[0]}, which is not of a saved model: "
            f"choose another folder."
        )


def card_id(folder: Path) -> str | None:
    """The run's identity in the model card of a saved folder; None where there is none."""
    card = folder / CARD
    found = (
        re.search(r"^dass_run: (\w+)$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if card.is_file()
        else None
    )
    return found[1] if found else None


def batch_size_for(model: PreTrainedModel, seq_len: int) -> int:
    """How many sequences to run at once.

    On the CPU about 512 tokens, the fastest there: larger buffers cost page faults. On a GPU the largest power of two
    up to 16 whose activations inside one block take at most a quarter of the free memory.
    """
    if model.device.type != "cuda":
        return max(1, 512 // seq_len)
    config = model.config.get_text_config()
    free = torch.cuda.mem_get_info(model.device)[0]
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # torch's own cache
    # per token: three intermediate vectors and about a dozen of the hidden width, in fp32 where statistics are taken
    per_sequence = seq_len * (3 * config.intermediate_size + 12 * config.hidden_size) * 4
    return 2 ** min(4, max(0, int(free / 4 / per_sequence).bit_length() - 1))


def parameter_bytes(model: nn.Module) -> int:
    """The model's size in memory, shared (tied) parameters once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _why_not_loaded(source: str, error: BaseException) -> str:
    """One sentence on why a model could not be loaded."""
    if _is_gated(error):
        return f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`."
    return (
        f"Cannot load {source} ({first_line(error)}): check the path or id, the files in it, and the network; "
        f"it must be a causal language model with safetensors weights."
    )


def _is_gated(error: BaseException) -> bool:
    """Whether the hub refused because a licence has to be accepted first."""
    return any(word in str(error).lower() for word in ("gated", "restricted"))
