"""Training goes on under the mask: W' = M o W, M a parametrisation, so that what is pruned stays an exact zero.

All weights are trained in fp32, or adapters (LoRA, arXiv 2106.09685) of which the mask is a part as well:
W' = M o (W + s B A). Every so many steps the model is judged, and what the training goes on from is written, so that a
run that is killed goes on to the same weights, and one that diverges leaves its last good ones.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.progress import progress
from dass.records import identity_of
from dass.training.checkpoint import bring_back, go_on
from dass.training.checkpoint import keep as keep_checkpoint
from dass.training.lora import adapted

LOSSES = ("next", "distill")
MAX_GRADIENT_NORM = 1.0

Keep = Mapping[tuple[nn.Module, str], Tensor]
"""The mask of a parameter, bool, by its module and its name there."""
Judge = Callable[[int], dict[str, Any]]
"""What is to be known of the model as it is after so many steps; its `loss` must be a finite number."""


class Diverged(DassError):
    """A training whose loss is no number any more; the model is again what it was at its last evaluation."""

    def __init__(self, message: str, field: str | None, history: list[dict[str, Any]]) -> None:
        """`history`: what was said up to that evaluation, see `train`."""
        super().__init__(message, field)
        self.history = history


@dataclass
class Recipe:
    """How training goes on; it may stand in a config."""

    steps: int = 0
    """Of the optimiser; 0: none."""
    learning_rate: float = 1e-4
    """Of AdamW, after the warmup; then it falls to 0 along a line."""
    warmup: int = 0
    """Steps in which it rises to that."""
    batch: int = 4
    """Sequences of a step."""
    accumulate: int = 1
    """Forward passes that a step's sequences are spread over; must divide them."""
    every: int = 50
    """Steps between two evaluations; one stands before the first step, and one behind the last."""
    loss: str = "next"
    """next: cross entropy of the next token; distill: KL divergence from the dense model's prediction of it."""
    lora_rank: int = 0
    """Of the adapters, which are trained in place of the weights; 0: the weights are."""
    lora_targets: str = r"(gate|up|down)_proj$"
    """Regular expression of the full names of the linear layers that get an adapter."""
    seed: int = 0
    """Of the order of the sequences, and of the adapters."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, with the reason."""
        wanted: list[tuple[str, bool, str]] = [
            ("steps", self.steps >= 0, "at least 1 (0 trains nothing)"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("warmup", 0 <= self.warmup <= self.steps or not self.steps, f"between 0 and steps={self.steps}"),
            ("batch", self.batch >= 1, "at least 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch, f"between 1 and batch={self.batch}"),
            ("every", self.every >= 1, "at least 1"),
            ("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("lora_rank", self.lora_rank >= 0, "at least 1 (0 trains the weights)"),
        ]
        for name, fits, what in wanted:
            if not fits:
                raise DassError(f"{name}={getattr(self, name)} must be {what}.", f"finetune.{name}")
        if self.batch % self.accumulate:
            raise DassError(f"accumulate={self.accumulate} does not divide batch={self.batch}.", "finetune.accumulate")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        rising, falling = (step + 1) / max(self.warmup, 1), (self.steps - step) / max(self.steps - self.warmup, 1)
        return self.learning_rate * min(rising if step < self.warmup else falling, 1.0)


class Masked(nn.Module):
    """M o W, or M o (W + s B A) with an adapter of peft's."""

    keep: Tensor

    def __init__(self, keep: Tensor, adapter: Any = None) -> None:
        """`adapter`: peft's layer around the one whose weight this is."""
        super().__init__()
        self.register_buffer("keep", keep, persistent=False)
        self._adapter = [adapter]  # in a list, so that torch does not find the layer inside itself

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the model sees it."""
        (adapter,) = self._adapter
        whole = weight if adapter is None else weight + adapter.get_delta_weight("default").to(weight.dtype)
        return whole.masked_fill(~self.keep, 0)


def require_batch(sequences: Tensor, recipe: Recipe) -> None:
    """Raise DassError where a text, `(n, seq_len)`, is shorter than one batch; known before a model is there."""
    if len(sequences) < recipe.batch:
        raise DassError(
            f"The text is {len(sequences)} sequences, shorter than one batch of {recipe.batch}: give more of it, or a "
            f"smaller finetune.batch.",
            "finetune.batch",
        )


def train(
    model: PreTrainedModel,
    keep: Keep,
    sequences: Tensor,
    recipe: Recipe,
    judge: Judge,
    folder: Path,
    by: str,
    teacher: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[dict[str, Any]], float]:
    """Train a model under its masks, from where an earlier process was stopped; it is a plain one again at the end.

    Args:
        keep: the weights outside are zeros for the model, whatever they are; at the end, they are zeros.
        sequences: `(n, seq_len)` int64; seen in a new order in each epoch.
        judge: asked before the first step, every so many, and behind the last.
        folder: for what it goes on from.
        by: what computes here, and what it starts with; what another has left is not gone on with.
        teacher: the dense model, for `loss=distill`.
        dtype: of the products (autocast); weights, gradients and AdamW's moments are fp32.

    Returns:
        What `judge` said, each with its `step` and, but for the first, the mean `training_loss` since; and the seconds
        that earlier processes spent on it.

    Raises:
        Diverged: a loss is not finite, and there was an evaluation before.
        DassError: the first loss is not finite, too little text, no such layer to adapt, or no peft.
    """
    require_batch(sequences, recipe)
    by = identity_of({"by": by, "recipe": asdict(recipe), "text": _sha256(sequences), "dtype": str(dtype)})
    with _trainable(model, keep, recipe) as weights, _last_good(folder, weights):
        optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=0.0)
        step, earlier, history = go_on(folder, by, weights, optimizer)
        began = time.perf_counter() - earlier
        order = _order(len(sequences), recipe)
        losses: list[float] = []
        bar = progress(None, "training", "step", recipe.steps)
        bar.update(step)
        while True:
            is_due = step % recipe.every == 0 or step == recipe.steps
            if is_due and (not history or history[-1]["step"] < step):
                seen = _judged(judge, step, history, folder)
                _require_finite(seen["loss"], step, "evaluation", history, folder)
                of_training = {"training_loss": sum(losses) / len(losses)} if losses else {}
                history, losses = [*history, {"step": step} | of_training | seen], []
                keep_checkpoint(folder, by, step, time.perf_counter() - began, history, weights, optimizer)
            if step == recipe.steps:
                return history, earlier
            batch = sequences[order[step * recipe.batch : (step + 1) * recipe.batch]].to(model.device)
            losses.append(_step(model, batch, recipe, teacher, dtype))
            _require_finite(losses[-1], step + 1, "training", history, folder)
            torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()


def _step(
    model: PreTrainedModel, batch: Tensor, recipe: Recipe, teacher: PreTrainedModel | None, dtype: torch.dtype
) -> float:
    """The gradients of one step, and its loss."""
    parts = batch.chunk(recipe.accumulate)
    found = []
    for part in parts:
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            if teacher is None:
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            else:
                with torch.no_grad():
                    wanted = log_softmax(teacher(input_ids=part, use_cache=False).logits.float()[:, :-1], -1)
                logits = model(input_ids=part, use_cache=False).logits.float()[:, :-1]
                loss = kl_div(
                    log_softmax(logits, -1).flatten(0, 1), wanted.flatten(0, 1), None, None, "batchmean", True
                )
        (loss / len(parts)).backward()
        found.append(loss.detach())
    return float(torch.stack(found).mean())


@contextlib.contextmanager
def _trainable(model: PreTrainedModel, keep: Keep, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """The weights that are trained, by name, under their masks; at the end they are the model's own, masked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapters = adapted(model, recipe.lora_rank, recipe.lora_targets) if recipe.lora_rank else {}
    bases = {id(adapter.base_layer): adapter for adapter in adapters.values()}
    masks = dict(keep)
    for adapter in adapters.values():
        masks.setdefault((adapter.base_layer, "weight"), torch.ones_like(adapter.base_layer.weight, dtype=torch.bool))
    model.requires_grad_(not recipe.lora_rank)
    for adapter in adapters.values():
        adapter.enable_adapters(False)  # its own way would add what the mask prunes
        adapter.lora_A.requires_grad_(True)
        adapter.lora_B.requires_grad_(True)
    for (module, name), mask in masks.items():
        parametrize.register_parametrization(module, name, Masked(mask, bases.get(id(module))))
    try:
        yield {name: p for name, p in model.named_parameters() if p.requires_grad}
    finally:
        for module, name in masks:
            with torch.no_grad():
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for name, adapter in adapters.items():
            model.set_submodule(name, adapter.base_layer)
        model.requires_grad_(False)


def _order(count: int, recipe: Recipe) -> Tensor:
    """Which sequences the steps see, one epoch after the other, each in an order of its own."""
    generator = torch.Generator().manual_seed(recipe.seed)
    epochs = -(-recipe.steps * recipe.batch // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)] or [torch.arange(0)])


@contextlib.contextmanager
def _last_good(folder: Path, weights: dict[str, Tensor]) -> Iterator[None]:
    """Where training diverges, give the weights back what they were at the last evaluation."""
    try:
        yield
    except Diverged:
        bring_back(folder, weights)
        raise


@torch.no_grad()
def _judged(judge: Judge, step: int, history: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What is to be known of the model; where that fails for a trained one, its training has mostly diverged."""
    try:
        return judge(step)
    except DassError as error:
        if not history:
            raise
        why = f"The model of step {step} cannot be judged ({str(error).rstrip('.')})"
        raise _diverged(why, history, folder, error.field) from error


def _require_finite(loss: float, step: int, what: str, history: list[dict[str, Any]], folder: Path) -> None:
    if not math.isfinite(loss):
        raise _diverged(f"The {what} loss of step {step} is {loss}", history, folder, "finetune.learning_rate")


def _diverged(why: str, history: list[dict[str, Any]], folder: Path, field: str | None) -> DassError:
    advice = "lower finetune.learning_rate"
    if not history:
        return DassError(f"{why}: {advice}; nothing is written.", field)
    kept = f"what it was at step {history[-1]['step']} is kept in {folder}"
    return Diverged(f"{why}: {advice}; {kept}.", field, history)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
