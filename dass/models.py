"""Load a causal language model from the hub or a folder, and refuse what cannot be pruned."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dass import hub
from dass.activations import know_activation
from dass.checkpoint import most_stored, require_places, require_weights, stored_tensors
from dass.data.tokens import Tokenizer
from dass.errors import DassError, finite, first_line, require_finite, told

transformers_logging.disable_progress_bar()  # loading is a matter of seconds; the long stages have bars of ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
GPU_ACTIVATIONS = 12e9
"""Bytes: 16 sequences of 2048 tokens in LLaMA2-7B, 4 in LLaMA2-70B."""
NEEDED = "check its files; it must be a causal language model with safetensors weights"


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU of this process if there is one, else the CPU; other words are torch's, of what is there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = (RuntimeError, AssertionError, ValueError)
    with told(f"device={device} cannot be used here", "choose auto, cpu or a GPU", *kinds, field="device"):
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise ValueError("it holds no numbers")
        return found


def resolve_dtype(dtype: str, source: str, revision: str | None) -> str:
    """The name of a dtype in `DTYPES`, or DassError; `auto` is the model's own, and only then it is looked at.

    Where its configuration does not tell, that of most weights in the folder does; of a hub id it is fp32 then.
    """
    if dtype == "auto":
        said = load_config(source, revision).dtype
        dtype = str(said or torch.float32).removeprefix("torch.")
        if said is None and Path(source).is_dir():
            with contextlib.suppress(DassError):  # weights that cannot be read are told when they are loaded
                dtype = most_stored(Path(source)) or dtype
    if dtype not in DTYPES:
        raise DassError(f"dtype={dtype} is unknown: choose auto or one of {', '.join(DTYPES)}.", "model.dtype")
    return dtype


def load_config(source: str, revision: str | None) -> Any:
    """The transformers config of a hub id or folder; DassError where it cannot be read."""
    folder = source if Path(source).is_dir() else hub.fetch(source, "config.json", revision).parent
    with _loading(source, f"Cannot load {source}, whose config.json is not understood"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if _sparse_format(config) == "dense":
        del config.quantization_config
    know_activation(str(getattr(config.get_text_config(), "hidden_act", "")))
    return config


def _sparse_format(config: Any) -> str | None:
    """How llm-compressor has stored zeros, `dense` being as ever; None where a config does not speak of zeros alone."""
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != "compressed-tensors" or said.get("config_groups"):
        return None
    return str((said.get("sparsity_config") or {}).get("format", "dense"))


def require_supported(config: Any) -> None:
    """Raise DassError if a transformers config tells that its model cannot be pruned here; reads no weight."""
    text = config.get_text_config()
    name = config.model_type
    if (stored := _sparse_format(config)) not in (None, "dense"):
        raise DassError(
            f"The weights of {name} are stored compressed, as {stored}, and not quantised: save the model with "
            f"save_compressed=False in llm-compressor, or load it with the tool that compressed it and save it plain."
        )
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


def auto_class(config: Any) -> Any:
    """transformers' door to the class of a config: the whole model, where a language model is one part of it.

    Some of these have no entry as causal language models (Mistral 3), or one for the text alone (Llama 4).
    """
    causal, whole = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = type(config)
    is_text = kind in causal and getattr(causal[kind], "config_class", kind) is kind
    return AutoModelForImageTextToText if kind in whole and not is_text else AutoModelForCausalLM


def model_folder(source: str, revision: str | None, weights: bool = True) -> Path:
    """The folder to read a model from: the source itself, or where the hub's files are in the cache, fetched first."""
    return Path(source) if Path(source).is_dir() else hub.model_files(source, revision, weights)


def load_model(
    source: str, revision: str | None, dtype: str, device: torch.device, device_map: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on one device.

    Args:
        source: a hub id or a folder with safetensors (pickled weights are refused).
        revision: the hub's commit or branch; None for a folder.
        dtype: one of `DTYPES`.
        device_map: `auto` spreads it over all GPUs, block by block, in place of `device`.

    Raises:
        DassError: it cannot be loaded (absent, gated, without weights, quantised), its weights are not those that its
            configuration speaks of, one is NaN or infinite, or the GPUs do not hold it.
    """
    folder = model_folder(source, revision)
    require_weights(folder)
    config = load_config(str(folder), None)
    require_supported(config)
    stored = stored_tensors(folder)
    places = device_map or (None if device.type == "cpu" else {"": device})
    model, loading = from_folder(folder, config, source, dtype, places)
    require_places(model, stored, loading, source)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DassError(f"{source} does not fit the GPUs: use more, or memory=stream on one.", "model.device_map")
    for name, tensor in named_weights(model):
        if dtype == "float16" and not finite(tensor):
            why = f"hold NaN or infinite values as float16, whose largest is {torch.finfo(torch.float16).max:g}"
            raise DassError(f"The weights {name} of {source} {why}: choose model.dtype=bfloat16.", "model.dtype")
        require_finite(tensor, f"The weights {name} of {source}")
    return model.eval().requires_grad_(False)


def from_folder(
    folder: Path, config: Any, source: str, dtype: str, device_map: Any, offload_folder: Path | None = None
) -> tuple[PreTrainedModel, Any]:
    """transformers' own loading, from a folder alone: the model, and what was missing or left over."""
    with _loading(source), _writing(offload_folder), _quiet():
        return auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map,
            offload_folder=offload_folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by name afterwards
        )


def load_tokenizer(source: str, revision: str | None) -> Tokenizer:
    """The tokenizer of a hub id or folder; DassError where there is none."""
    advice = "save one beside the model, or calibrate on tokens and evaluate nothing"
    folder = model_folder(source, revision, weights=False)
    if (folder / "config.json").is_file():
        load_config(str(folder), None)  # a tokenizer asks for it, too, and would take the blame
    with _loading(source, f"{source} has no usable tokenizer", advice):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def batch_size_for(model: PreTrainedModel, seq_len: int) -> int:
    """How many sequences to run at once, by the shapes alone: numbers hang on no free memory.

    On the CPU about 512 tokens, the fastest there: larger buffers cost page faults. On a GPU the largest power of two
    up to 16 whose activations inside one block take at most `GPU_ACTIVATIONS`; see `dass.memory` if that is too much.
    """
    if model.device.type != "cuda":
        return max(1, 512 // seq_len)
    config = model.config.get_text_config()
    # per token: three intermediate vectors and about a dozen of the hidden width, in fp32 where statistics are taken
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2's kind, where nothing is said
    per_sequence = seq_len * (3 * width + 12 * config.hidden_size) * 4
    return 2 ** min(4, max(0, int(GPU_ACTIVATIONS / per_sequence).bit_length() - 1))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All numbers in floating point that a checkpoint holds, once: parameters, and buffers such as a router's bias."""
    yield from model.named_parameters()
    held = model.state_dict()
    yield from ((name, one) for name, one in model.named_buffers() if name in held and one.is_floating_point())


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor on a device could still take; on the host, as the system counts, whatever a container may."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a pretended one has that of the host
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own
    return torch.cuda.mem_get_info(device)[0] + cached


def parameter_bytes(model: nn.Module) -> int:
    """The model's size in memory, shared (tied) parameters once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own reports of what does not match."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextlib.contextmanager
def _loading(source: str, what: str | None = None, advice: str = NEEDED) -> Iterator[None]:
    """Tell in a sentence why a model or its tokenizer cannot be loaded."""
    try:
        yield
    except (torch.OutOfMemoryError, DassError):
        raise
    except Exception as error:  # a foreign file can make transformers raise anything
        raise DassError(f"{what or f'Cannot load {source}'} ({first_line(error)}): {advice}.") from error


@contextlib.contextmanager
def _writing(folder: Path | None) -> Iterator[None]:
    """Tell in a sentence why a folder does not take what transformers writes there while it reads a model."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if folder is None or not (full or str(error).startswith("Error while serializing")):
            raise
        advice = "free space or choose another results_dir"
        raise DassError(f"Cannot write weights to {folder} ({first_line(error)}): {advice}.", "results_dir") from error
