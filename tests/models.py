"""Tiny models of the real architectures, with random weights."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 8}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, WINDOW),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, **WINDOW}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
}


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model of three blocks with weights large enough that every block matters."""
    model_class, config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def random_tokens(n_sequences: int = 5, seq_len: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids `(n_sequences, seq_len)` of the tiny vocabulary."""
    return torch.randint(3, VOCABULARY, (n_sequences, seq_len), generator=torch.Generator().manual_seed(seed))
