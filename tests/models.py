"""Tiny models of the real architectures, with random weights."""

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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

SMALL = SIZES | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1}
GPT2_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = {
    **SMALL_EXPERTS,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    # a gate, in matrices of their own or fused
    "llama_biased": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "phi3": ("phi3", {}),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    # no gate
    "gpt2": ("gpt2", GPT2_SIZES),
    "opt": ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {**GPT2_SIZES, "rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT2_SIZES),
    "starcoder2": ("starcoder2", {}),
    "phi": ("phi", {}),
    "falcon": ("falcon", {"ffn_hidden_size": 32, "bias": True}),
    "falcon_new": ("falcon", {"ffn_hidden_size": 32, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_serial": ("falcon", {"ffn_hidden_size": 32, "parallel_attn": False, "alibi": True, "bias": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}),
    "mpt": ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2}),
    "nemotron": ("nemotron", {"mlp_bias": True, "attention_bias": True}),
    # experts
    "mixtral": ("mixtral", EXPERTS),
    "qwen2_moe": ("qwen2_moe", {**SMALL_EXPERTS, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": ("qwen3_moe", {**SMALL_EXPERTS, "head_dim": 8, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 3, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "granitemoeshared": ("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 12}),
    "jetmoe": ("jetmoe", {**EXPERTS, "kv_channels": 8}),
    "llama4_text": (
        "llama4_text",
        {"num_local_experts": 3, "intermediate_size_mlp": 24, "head_dim": 8, "interleave_moe_layer_step": 2},
    ),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "head_dim": 8}),
    "gemma4_text": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 3,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
"""Every other layout of an MLP, by the type of its config in transformers; two blocks each."""


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model of three blocks (two of `LAYOUTS`) with weights large enough that every block matters."""
    torch.manual_seed(0)
    if architecture in ARCHITECTURES:
        model_class, config_class, own = ARCHITECTURES[architecture]
        model = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    else:
        model_type, own = LAYOUTS[architecture]
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SMALL, **own, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products know no fp64
    return model if model.dtype == dtype else model.to(dtype)  # tensors of a pretended device cannot be converted


def image_model(kind: str) -> PreTrainedModel:
    """A tiny model that reads images, too: llama4, mistral3 or qwen3_vl_moe."""
    text_type, own = LAYOUTS["llama4_text" if kind == "llama4" else "mixtral"]
    text: dict[str, object] = {**SMALL, **own, "model_type": text_type}
    vision: dict[str, object] = {"hidden_size": 16, "intermediate_size": 32}
    few: dict[str, object] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "llama4":
        vision |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
        vision["intermediate_size"] = 64
    elif kind == "mistral3":
        text = {**SMALL, "head_dim": 8, "model_type": "mistral"}
        vision["model_type"] = "pixtral"
    else:
        text = {**SMALL, **SMALL_EXPERTS, "head_dim": 8}
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        few = {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14, "deepstack_visual_indexes": [0]}
        few["num_position_embeddings"] = 16
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision | few)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def random_tokens(n_sequences: int = 5, seq_len: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids `(n_sequences, seq_len)` of the tiny vocabulary."""
    return torch.randint(3, VOCABULARY, (n_sequences, seq_len), generator=torch.Generator().manual_seed(seed))
