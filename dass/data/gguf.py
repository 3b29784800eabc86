"""From a GGUF file to a transformers folder, once, one weight in memory at a time."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from dass.data.catalogue import Asset
from dass.errors import told

Weights = dict[str, Callable[[], torch.Tensor]]
"""The weights that a GGUF holds, by transformers' names: each is read and dequantised, to fp32, when it is called."""

CHUNK = 2**22  # values, dequantised at once: `gguf` needs several times the result for it
SHARD = "100MB"  # loading maps one at a time; a larger weight has one of its own


def convert(asset: Asset, gguf: Path, folder: Path) -> None:
    """Write a model's GGUF as a transformers folder: safetensors, tokenizer, and `provenance.json`.

    The weights are stored in bf16 where that holds each of them exactly, else in fp32. Memory: 1.3 times the fp32 size
    of the largest weight, and below 2 GB for all else.

    Raises:
        DassError: the folder cannot be written, or the file is not understood.
    """
    print(f"converting {asset.name} (once, a minute or two)", file=sys.stderr, flush=True)
    what = f"Cannot convert {asset.name} into a model folder"
    advice = f"free space in {folder.parent}, and compare the installed transformers and gguf with the requirements"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # safetensors and tokenizers report a full disk by exceptions of their own; stderr has progress bars
        with told(what, advice, Exception), contextlib.redirect_stderr(io.StringIO()):
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            tokenizer = AutoTokenizer.from_pretrained(**source)
            if asset.individual_digits:
                # A GGUF only names its pre-tokenizer ("smollm"), and transformers takes GPT-2's for it. The model's
                # own has this step before; they differ where a digit follows two or more blanks or newlines.
                digits = pre_tokenizers.Digits(individual_digits=True)
                words = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
            tokenizer.save_pretrained(folder)

            config = AutoConfig.from_pretrained(**source)
            with torch.device("meta"):  # names and shapes, no memory
                model = AutoModelForCausalLM.from_config(config)
            weights = weights_of(gguf, model)
            dtype = exact_dtype(weights)
            save_model(model.to(dtype), weights, folder)
            provenance = {"packages": asset.requirements, "sha256": asset.sha256, "licence": asset.licence}
            provenance |= {"dtype": f"{model.config.dtype}, which holds each dequantised weight exactly"}
            provenance |= {name: metadata.version(name) for name in ("transformers", "gguf")}
            (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    finally:
        logging.set_verbosity(verbosity)


def weights_of(gguf: Path, model: PreTrainedModel) -> Weights:
    """The weights of a GGUF that a model has, named and laid out by transformers' own tables."""
    reader = GGUFReader(gguf)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)

    def read(tensor: ReaderTensor) -> torch.Tensor:
        # not through the reader's map of the file, whose pages would stay in this process
        data = np.fromfile(gguf, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
        rows = data.reshape(-1, tensor.data.shape[-1])
        values = np.empty((len(rows), tensor.n_elements // len(rows)), np.float32)
        step = max(1, CHUNK // values.shape[1])
        for first in range(0, len(rows), step):
            values[first : first + step] = dequantize(rows[first : first + step], tensor.tensor_type)
        shaped = values.reshape(tensor.shape.tolist()[::-1])  # GGUF has the fastest dimension first
        return torch.from_numpy(np.ascontiguousarray(processor.process(shaped, tensor.name).weights))

    return {names[tensor.name]: partial(read, tensor) for tensor in reader.tensors if tensor.name in names}


def exact_dtype(weights: Weights) -> torch.dtype:
    """bfloat16 where it holds every weight exactly, else float32; reads no further than the first that tells."""
    parts = (part for read in weights.values() for part in read().flatten().split(CHUNK))
    return torch.bfloat16 if all(torch.equal(part, part.bfloat16().float()) for part in parts) else torch.float32


def save_model(model: PreTrainedModel, weights: Weights, folder: Path) -> None:
    """What `save_pretrained` writes for a model without tensors (on the meta device), its weights taken from a GGUF."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    shards = split_torch_state_dict_into_shards(own, max_shard_size=SHARD)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name]().to(model.dtype) for name in names}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        total = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = {"metadata": total, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
