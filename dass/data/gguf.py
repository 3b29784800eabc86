"""From a GGUF file to a transformers folder, once."""

import contextlib
import io
import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from dass.data.catalogue import Asset
from dass.errors import told


def convert(asset: Asset, gguf: Path, folder: Path) -> None:
    """Write a model's GGUF as a transformers folder: fp32 safetensors, tokenizer, and `provenance.json`.

    Raises:
        DassError: the folder cannot be written, or the file is not understood.
    """
    print(f"converting {asset.name} (once, about a minute)", file=sys.stderr, flush=True)
    what = f"Cannot convert {asset.name} into a model folder"
    advice = f"free space in {folder.parent}, and compare the installed transformers and gguf with the requirements"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # safetensors and tokenizers report a full disk by exceptions of their own; stderr has progress bars
        with told(what, advice, Exception), contextlib.redirect_stderr(io.StringIO()):
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            dense = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=dense, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            # the weights are plain fp32 by now, so nothing may say "quantized" in the saved folder
            model.hf_quantizer = None
            vars(model.config).pop("quantization_config", None)
            if asset.individual_digits:
                # A GGUF only names its pre-tokenizer ("smollm"), and transformers takes GPT-2's for it. The model's
                # own has this step before; they differ where a digit follows two or more blanks or newlines.
                digits = pre_tokenizers.Digits(individual_digits=True)
                words = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
            model.save_pretrained(folder, max_shard_size="100MB")  # loading maps one shard at a time
            tokenizer.save_pretrained(folder)
            provenance = {"packages": asset.requirements, "sha256": asset.sha256, "licence": asset.licence}
            provenance |= {name: metadata.version(name) for name in ("transformers", "gguf")}
            (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    finally:
        logging.set_verbosity(verbosity)
