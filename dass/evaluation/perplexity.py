"""Perplexity over whole windows of a text, as the pruning papers score it.

The text is tokenised once and cut into whole windows; the mean token loss of each window counts alike:
perplexity = exp(mean over windows of the window's mean loss), loss in nats over its seq_len - 1 predictions.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dass.data.sources import find_source
from dass.data.texts import FIELD
from dass.data.tokens import Bos, Tokenizer, encode, windows_of
from dass.distributed import everyone, share_of, world
from dass.errors import DassError
from dass.forward import replaced_forward
from dass.memory import Halved, attempted, half, note_halved
from dass.progress import progress
from dass.pruning.calls import block_by_block
from dass.stages import release_freed_memory
from dass.streaming import Shelf

LOGITS_AT_ONCE = 2**24
"""Elements of the chunk of logits that exists at a time: 64 MB in fp32."""


@dataclass(frozen=True)
class Perplexity:
    """The result with its uncertainty."""

    value: float
    stderr: float | None  # over windows (of the mean loss, times the value); None for a single window
    seq_len: int
    losses: list[float]  # mean token loss of each window, nats

    @property
    def tokens(self) -> int:
        """Tokens counted: windows times seq_len."""
        return len(self.losses) * self.seq_len


def evaluation_windows(
    name: str,
    tokenizer: Tokenizer,
    path: str | Path | None,
    seq_len: int,
    n_windows: int | None,
    bos: Bos,
    revision: str | None = None,
    field: str = FIELD,
) -> Tensor:
    """The windows of one of the texts in `conf/evaluation`, `(n_windows, seq_len)` int64.

    Args:
        path: a local file; needed by text_file, in place of the hub for wikitext2.
        n_windows: the first that many; None: all.
        revision: commit of a data set on the hub; None: its newest.
        field: what a text is called in the objects of a JSON file.

    Raises:
        DassError: unknown name, missing file, too little text.
    """
    text = "\n\n".join(find_source(name, "evaluation").documents("evaluation", path, revision, field))
    if seq_len < 2:
        raise DassError(f"seq_len={seq_len} must be at least 2: nothing predicts the first.", "evaluation.seq_len")
    tokens = encode(tokenizer, text, bos)
    release_freed_memory()
    windows = windows_of(tokens, seq_len, bos, tokenizer)
    wanted = 1 if n_windows is None else n_windows
    if not 1 <= wanted <= len(windows):
        raise DassError(
            f"Too little text: {len(tokens)} tokens are {len(windows)} whole windows of {seq_len}, and {wanted} "
            f"were asked for: lower n_windows or seq_len, or give more text.",
            "evaluation.n_windows",
        )
    return windows[:n_windows]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    shelf: Shelf | None = None,
    known: Sequence[float] = (),
    done: Callable[[list[float]], None] | None = None,
    halved: Halved = note_halved,
) -> Perplexity:
    """Perplexity of a causal language model over batches of windows, `(batch, seq_len)` int64 each.

    Several processes share the batches, and each has the result.

    Args:
        shelf: of a model whose blocks lie on disk; all windows go through one after the other.
        known: losses of the first windows, as an earlier call on the same batches had them.
        done: is told of all losses so far, after each batch; of streamed ones only once the blocks are through.
        halved: is told of a smaller batch size, from where on the memory of the device does not suffice for it.

    Raises:
        DassError: a loss is not finite, there is no window, or too little memory.
    """
    if not batches:
        raise DassError("There is no window to evaluate: give more text.")
    losses: list[float] = []
    waiting = list(batches)
    while waiting and len(losses) + len(waiting[0]) <= len(known):
        losses += known[len(losses) : len(losses) + len(waiting.pop(0))]
    inputs = [batch.to(model.device) for batch in share_of(waiting)]
    ready = (
        repeat(nullcontext())
        if shelf is None or not inputs
        else block_by_block(model, shelf.blocks, inputs, shelf.hold, shelf.folder, halved)
    )
    size = max(map(len, batches))
    pairs = zip(inputs, ready, strict=False)
    for _ in progress(range(0, len(waiting), world()), "evaluation", "batch"):
        own: list[float] = []
        for batch, prepared in islice(pairs, 1):  # in the last round some processes have none
            with prepared:
                while (found := attempted(partial(_losses_of, model, batch.split(size)))) is None:
                    # of streamed ones only the head is left, and its chunks are no larger for a larger batch
                    size = half(min(size, len(batch)) if shelf is None else 1, halved)
            own = found
        losses += chain.from_iterable(everyone(own))
        if done is not None:
            done(losses)
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise DassError(f"The loss of window {i} is not finite: check the weights, or load them in a wider dtype.")
    values = torch.tensor(losses, dtype=torch.float64)
    mean = values.mean().item()
    if mean > 700:
        raise DassError(f"The mean loss is {mean:.0f} nats per token, too much for a perplexity: the model is broken.")
    stderr = math.exp(mean) * values.std().item() / len(losses) ** 0.5 if len(losses) > 1 else None
    return Perplexity(math.exp(mean), stderr, batches[0].shape[1], losses)


def _losses_of(model: PreTrainedModel, parts: Sequence[Tensor]) -> list[float]:
    return [loss for part in parts for loss in window_losses(model, part).tolist()]


@torch.no_grad()
def window_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Mean token loss of each window, `(batch,)` fp64, for input_ids `(batch, seq_len)`.

    The model's own forward makes the logits (with its scaling or soft capping), a chunk of positions at a time: its
    decoder is replaced by one that hands over a slice of hidden states already computed.

    Raises:
        DassError: the model's forward does not go through a decoder of its own.
    """
    batch, seq_len = input_ids.shape
    decoder = _decoder(model)
    output = decoder(input_ids=input_ids, use_cache=False, return_dict=True)
    hidden = output.last_hidden_state
    slices: list[Any] = []

    def hand_over(*_: Any, **__: Any) -> Any:
        return slices.pop()

    sums = torch.zeros(batch, dtype=torch.float64, device=input_ids.device)
    step = max(1, LOGITS_AT_ONCE // (batch * model.get_input_embeddings().weight.shape[0]))
    for start in range(0, seq_len - 1, step):
        stop = min(start + step, seq_len - 1)
        output.last_hidden_state = hidden[:, start:stop]
        slices.append(output)
        with replaced_forward(decoder, hand_over):
            logits = model(input_ids=input_ids[:, start:stop], use_cache=False, return_dict=True).logits
        if slices:
            raise DassError(f"{type(model).__name__} goes another way than its decoder: it cannot be evaluated here.")
        targets = input_ids[:, start + 1 : stop + 1]
        chunk = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        sums += chunk.view(batch, -1).sum(1, dtype=torch.float64)
    return sums / (seq_len - 1)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its head: the one that transformers names, or that embeds tokens."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [model.get_decoder(), *model.children()]
    for part in parts:
        if part in (model, embedding) or embedding not in part.modules():
            continue
        if head not in part.modules():
            return part
        parts += part.children()  # it is a whole language model itself, as inside Llama 4
    raise DassError(f"{type(model).__name__} does not tell its decoder from its head: it cannot be evaluated here.")
