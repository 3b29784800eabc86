"""Load a causal language model from the hub or a folder, and refuse what cannot be pruned."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dass.data.tokens import Tokenizer
from dass.errors import DassError, first_line, require_finite, told
from dass.folders import SEAL
from dass.records import file_sha256, identity_of

transformers_logging.disable_progress_bar()  # loading is a matter of seconds; the long stages have bars of ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NEEDED = "check path or id, files and network; it must be a causal language model with safetensors weights"
CONTENT_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of weights, configuration and tokenizer


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU; any other word is torch's own, of a device that is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = (RuntimeError, AssertionError, ValueError)
    with told(f"device={device} cannot be used here", "choose auto, cpu or a GPU", *kinds, field="device"):
        return torch.empty(0, device=device).device


def resolve_dtype(dtype: str, source: str, revision: str | None) -> str:
    """The name of a dtype in `DTYPES`, or DassError; `auto` is the model's own, and only then it is looked at."""
    if dtype == "auto":
        dtype = str(load_config(source, revision).dtype or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise DassError(f"dtype={dtype} is unknown: choose auto or one of {', '.join(DTYPES)}.", "model.dtype")
    return dtype


def load_config(source: str, revision: str | None) -> Any:
    """The transformers config of a hub id or folder; DassError where it cannot be read."""
    with _loading(source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def require_supported(config: Any) -> None:
    """Raise DassError if a transformers config tells that its model cannot be pruned here; reads no weight."""
    text = config.get_text_config()
    name = config.model_type
    if any(getattr(part, "quantization_config", None) is not None for part in (config, text)):
        raise DassError(f"{name} is quantised: pruning needs its weights in floating point, so dequantise it first.")
    if config.is_encoder_decoder:
        raise DassError(f"{name} is an encoder and a decoder: choose a causal language model, a decoder alone.")
    if getattr(text, "num_attention_heads", None) is None:
        raise DassError(f"{name} has no attention, and so no blocks of attention and an MLP: choose a transformer.")
    if getattr(text, "altup_num_inputs", None) is not None:
        raise DassError(f"The blocks of {name} read several streams at once (AltUp): choose a model with one stream.")
    if {"mlp", "moe"} & set(getattr(text, "layer_types", None) or ()):
        raise DassError(f"The blocks of {name} are attention or an MLP, not both: choose a model with both in each.")


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
    require_supported(config)
    with _loading(source):
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
    if missing := sorted(loading["missing_keys"]):
        raise DassError(f"The weights of {source} lack {missing[0]} (and {len(missing) - 1} more): save it again.")
    for name, parameter in model.named_parameters():
        require_finite(parameter, f"The weights {name} of {source}")
    return model.eval().requires_grad_(False)


def require_weights(folder: Path) -> None:
    """Raise DassError if a model folder holds no safetensors; pickled weights do not count."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
        raise DassError(f"The model folder {folder} holds no weights (*.safetensors): save the model there first.")


def load_tokenizer(source: str, revision: str | None) -> Tokenizer:
    """The tokenizer of a hub id or folder; DassError where there is none."""
    advice = "save one beside the model, or calibrate on tokens and evaluate nothing"
    with _loading(source, f"{source} has no usable tokenizer", advice):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def model_contents(folder: Path) -> str:
    """16 hex digits over the names and contents of a model folder's weights, configuration and tokenizer.

    Shards that an index names count wherever they lie; cards, licences and our own seal do not. DassError if one lacks.
    """
    if not folder.is_dir():
        raise DassError(f"There is no model folder {folder}: give a folder written by `save_pretrained`.", "model.path")
    require_weights(folder)
    ours = (SEAL, "LICEN", "NOTICE", "COPYING", "USE_POLICY")
    names = {p.name for p in folder.iterdir() if p.suffix in CONTENT_SUFFIXES and not p.name.startswith(ours)}
    for index in folder.glob("*.safetensors.index.json"):
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in names:
        if not (folder / name).exists():
            raise DassError(f"{folder} lacks {name}, which its index names: fetch it again.")
    return identity_of({name: file_sha256(folder / name) for name in names})


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
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2's kind, where nothing is said
    per_sequence = seq_len * (3 * width + 12 * config.hidden_size) * 4
    return 2 ** min(4, max(0, int(free / 4 / per_sequence).bit_length() - 1))


def parameter_bytes(model: nn.Module) -> int:
    """The model's size in memory, shared (tied) parameters once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextlib.contextmanager
def _loading(source: str, what: str | None = None, advice: str = NEEDED) -> Iterator[None]:
    """Tell in a sentence why a model or its tokenizer cannot be loaded."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a foreign file can make transformers raise anything
        if any(word in str(error).lower() for word in ("gated", "restricted")):  # its licence has to be accepted first
            reason = f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`."
            raise DassError(reason) from error
        raise DassError(f"{what or f'Cannot load {source}'} ({first_line(error)}): {advice}.") from error
