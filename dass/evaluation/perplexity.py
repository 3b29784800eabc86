"""Perplexity over whole windows of a text, as the pruning papers score it.

The text is tokenised once and cut into whole windows; the mean token loss of each window counts alike:
perplexity = exp(mean over windows of the window's mean loss), loss in nats over its seq_len - 1 predictions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dass.data import assets
from dass.data.calibration import Bos, Tokenizer, encode, windows_of
from dass.data.texts import read_documents, read_wikitext
from dass.errors import DassError
from dass.forward import replaced_forward
from dass.stages import release_freed_memory

LOGITS_AT_ONCE = 2**24
"""Elements of the chunk of logits that exists at a time: 64 MB in fp32."""


@dataclass(frozen=True)
class Perplexity:
    """The result with its uncertainty."""

    value: float
    stderr: float | None
    """Standard error over windows (of the mean loss, times the value); None for a single window."""
    seq_len: int
    losses: list[float]
    """Mean token loss of each window, nats."""

    @property
    def tokens(self) -> int:
        """Tokens counted: windows times seq_len."""
        return len(self.losses) * self.seq_len


def evaluation_windows(
    name: str, tokenizer: Tokenizer, path: str | Path | None, seq_len: int, n_windows: int | None, bos: Bos
) -> Tensor:
    """The windows of one of the names in `conf/evaluation`, `(n_windows, seq_len)` int64.

    Args:
        path: a local file; needed by text_file, in place of the hub for wikitext2.
        n_windows: the first that many; None: all.

    Raises:
        DassError: unknown name, missing file, too little text.
    """
    path = Path(path) if path is not None else None
    if path is not None and name == "packaged_wiki":
        raise DassError("evaluation.path does not apply to packaged_wiki: use evaluation=text_file for your own text.")
    if name == "wikitext2":
        text = "\n\n".join(read_wikitext(path, "test"))
    elif name == "packaged_wiki":
        text = "\n\n".join(assets.wiki_articles()[: assets.HELD_OUT_ARTICLES])
    elif name == "text_file":
        if path is None:
            raise DassError("evaluation=text_file needs a file: give `evaluation.path=FILE`.")
        text = "\n\n".join(read_documents(path))
    else:
        raise DassError(f"evaluation={name} is unknown: choose one of the files in conf/evaluation.")
    if seq_len < 2:
        raise DassError(f"evaluation.seq_len={seq_len} must be at least 2: the first token is not predicted.")
    tokens = encode(tokenizer, text, bos)
    release_freed_memory()
    windows = windows_of(tokens, seq_len, bos, tokenizer)
    wanted = 1 if n_windows is None else n_windows
    if not 1 <= wanted <= len(windows):
        raise DassError(
            f"Too little text: {len(tokens)} tokens are {len(windows)} whole windows of {seq_len}, and {wanted} "
            f"were asked for: lower `evaluation.n_windows` or `evaluation.seq_len`, or give more text."
        )
    return windows[:n_windows]


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> Perplexity:
    """Perplexity of a causal language model over batches of windows, `(batch, seq_len)` int64 each.

    Raises:
        DassError: a loss is not finite, or there is no window.
    """
    losses: list[float] = []
    seq_len = 0
    for batch in batches:
        seq_len = batch.shape[1]
        losses += window_losses(model, batch.to(model.device)).tolist()
    if not losses:
        raise DassError("There is no window to evaluate: give more text.")
    if not all(map(math.isfinite, losses)):
        raise DassError(
            f"The loss of window {next(i for i, x in enumerate(losses) if not math.isfinite(x))} is not finite: "
            f"check the model's weights, or load it in a wider dtype with `model.dtype`."
        )
    values = torch.tensor(losses, dtype=torch.float64)
    mean = values.mean().item()
    if mean > 700:
        raise DassError(f"The mean loss is {mean:.0f} nats per token, too much for a perplexity: the model is broken.")
    stderr = math.exp(mean) * values.std().item() / len(losses) ** 0.5 if len(losses) > 1 else None
    return Perplexity(math.exp(mean), stderr, seq_len, losses)


@torch.no_grad()
def window_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Mean token loss of each window, `(batch,)` fp64, for input_ids `(batch, seq_len)`.

    The model's own forward makes the logits (with its scaling or soft capping), a chunk of positions at a time: its
    base model is replaced by one that hands over a slice of hidden states already computed.
    """
    batch, seq_len = input_ids.shape
    if model.base_model is model:
        raise DassError(f"{type(model).__name__} does not tell its decoder from its head: it cannot be evaluated here.")
    output = model.base_model(input_ids=input_ids, use_cache=False, return_dict=True)
    hidden = output.last_hidden_state
    sums = torch.zeros(batch, dtype=torch.float64, device=input_ids.device)
    step = max(1, LOGITS_AT_ONCE // (batch * model.get_input_embeddings().weight.shape[0]))
    for start in range(0, seq_len - 1, step):
        stop = min(start + step, seq_len - 1)
        output.last_hidden_state = hidden[:, start:stop]
        with replaced_forward(model.base_model, lambda *_, **__: output):
            logits = model(input_ids=input_ids[:, start:stop], use_cache=False, return_dict=True).logits
        targets = input_ids[:, start + 1 : stop + 1]
        chunk = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        sums += chunk.view(batch, -1).sum(1, dtype=torch.float64)
    return sums / (seq_len - 1)
