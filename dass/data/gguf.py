"""From a GGUF file to a transformers folder, once."""

import contextlib
import io
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dass.errors import DassError


def convert(name: str, gguf: Path, folder: Path, individual_digits: bool, provenance: dict[str, Any]) -> None:
    """Write a GGUF as a transformers folder: fp32 safetensors, tokenizer, and `provenance.json`.

    Args:
        name: of the model, for messages.
        individual_digits: the tokenizer cuts out each digit before it splits words.
        provenance: where the file comes from; the versions that convert it are added.

    Raises:
        DassError: the folder cannot be written, or the file is not understood.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print(f"converting {name} (once, about a minute)", file=sys.stderr, flush=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            dense = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # the weights are plain fp32 by now, so nothing may say "quantized" in the saved folder
            model.hf_quantizer = None
            vars(model.config).pop("quantization_config", None)
            if individual_digits:
                # A GGUF only names its pre-tokenizer ("smollm"), and transformers takes GPT-2's for it. The model's
                # own has this step before; they differ where a digit follows two or more blanks or newlines.
                digits = pre_tokenizers.Digits(individual_digits=True)
                words = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
            model.save_pretrained(folder, max_shard_size="100MB")  # loading maps one shard at a time
            tokenizer.save_pretrained(folder)
        provenance = provenance | {name: metadata.version(name) for name in ("transformers", "gguf")}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors and tokenizers report a full disk by exceptions of their own
        reason = " ".join(str(error).split())
        raise DassError(
            f"Cannot convert {name} into a model folder ({reason}): free space in {folder.parent}, and compare "
            "the installed transformers and gguf with the requirements."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
