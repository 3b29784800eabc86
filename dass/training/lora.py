"""Adapters: W + s B A, of which only A and B are trained (LoRA, arXiv 2106.09685); peft's own layers."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dass.errors import DassError, told


def adapted(model: PreTrainedModel, rank: int, targets: str) -> dict[str, Any]:
    """Put an adapter around each linear layer whose full name fits; peft's layers by the name of what they stand for.

    Args:
        rank: of `B A`; their scale s is 2.
        targets: a regular expression.

    Raises:
        DassError: no peft, or no layer that can be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise DassError(
            "LoRA needs the package peft: install it with `pip install '.[finetune]'`, or set finetune.lora_rank=0.",
            "finetune.lora_rank",
        ) from None
    what = f"lora_targets={targets} is not a regular expression"
    with told(what, "correct it", re.error, field="finetune.lora_targets"):
        fits = re.compile(targets)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and fits.search(name)]
    if not names:
        raise DassError(
            f"lora_targets={targets} matches no linear layer of the model (torch.nn.Linear; experts and "
            f"Conv1D take no adapter): name some that are there.",
            "finetune.lora_targets",
        )
    embedding = model.get_input_embeddings().weight
    if tied := [name for name in names if model.get_submodule(name).weight is embedding]:
        raise DassError(
            f"lora_targets={targets} matches {tied[0]}, whose weight is the embedding's: leave it out.",
            "finetune.lora_targets",
        )
    within = [f"model.{name}" for name in names]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=within)
    # in a plain module, as peft would adapt the experts of some models in the place of what is named
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}))
    return {name: model.get_submodule(name) for name in names}
