"""Text -> token ids: windows, BOS, and why calibration sets are drawn as they are."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dass.errors import DassError
from dass.progress import progress

Bos = Literal["tokenizer", "per_sequence", "none"]
"""Whether sequences begin with a BOS token: where the tokenizer puts one (before each document), in each, nowhere."""
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def default_bos(config: Any, tokenizer: Callable[[], Tokenizer]) -> Bos:
    """Where sequences begin with a BOS token if nobody says it: in each for the Gemma families, where there is one.

    They have never seen a text without it, and their perplexity is nonsense there. Others begin as their tokenizer
    does.

    Args:
        config: the model's, of transformers; nothing in it but the family tells them apart.
        tokenizer: what loads it, called only where it matters.
    """
    gemma = "gemma" in config.get_text_config().model_type
    return "per_sequence" if gemma and tokenizer().bos_token_id is not None else "tokenizer"


def encode(tokenizer: Tokenizer, text: str, bos: Bos) -> Tensor:
    """Token ids `(n_tokens,)` of a text; with a BOS in front only where `bos` is `tokenizer` and it adds one.

    What a tokenizer adds behind a text, such as an end token, is left out: the text goes on in the next window, or in
    the answer to a question.
    """
    if not isinstance(text, str):
        raise DassError(f"A document is {text!r} instead of text: mend the file.")
    adds = bos == "tokenizer"
    encoded = tokenizer(text, add_special_tokens=adds, return_special_tokens_mask=adds, verbose=False)
    tokens = encoded["input_ids"]
    if adds:
        added = encoded["special_tokens_mask"]
        while tokens and added[len(tokens) - 1]:
            tokens.pop()
    return torch.tensor(tokens, dtype=torch.int64)


def windows_of(tokens: Tensor, seq_len: int, bos: Bos, tokenizer: Tokenizer) -> Tensor:
    """Cut tokens `(n_tokens,)` into whole consecutive windows `(n_windows, seq_len)`; a rest is dropped."""
    length = _text_length(seq_len, bos)
    return _begin(tokens[: len(tokens) // length * length].view(-1, length), bos, tokenizer)


def _text_length(seq_len: int, bos: Bos) -> int:
    """Text tokens per window; the BOS of each takes one place."""
    if bos not in ("tokenizer", "per_sequence", "none"):
        raise DassError(f"bos={bos} is unknown: choose tokenizer, per_sequence or none.")
    length = seq_len - (bos == "per_sequence")
    if length < 1:
        raise DassError(f"seq_len={seq_len} is too short: it must hold at least one token of text.")
    return length


def _begin(windows: Tensor, bos: Bos, tokenizer: Tokenizer) -> Tensor:
    if bos != "per_sequence":
        return windows
    if tokenizer.bos_token_id is None:
        raise DassError("bos=per_sequence needs a tokenizer with a BOS token, which this one lacks: use bos=tokenizer.")
    return torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], dim=1)


def draw_documents(
    documents: Sequence[str], tokenizer: Tokenizer, n_sequences: int, seq_len: int, seed: int, bos: Bos
) -> Tensor:
    """Random windows of random long documents, as the reference draws them for the same seed.

    Wanda's `get_c4` (lib/data.py): a document longer than the window is drawn with `random.randint`, then the window's
    place in it. The draws are the same numbers in the same order. The documents, of which at least one must be longer
    than a window, are indexed, so that they may be a column of a data set on disk. None is read again that was found
    too short, so that all have been read once at most when that is known of all.
    """
    length = _text_length(seq_len, bos)
    rng = random.Random(seed)
    lengths: dict[int, int] = {}  # of the documents found too short
    windows: list[Tensor] = []
    bar = progress(None, "calibration", "sequence", n_sequences)
    while len(windows) < n_sequences:
        i = rng.randint(0, len(documents) - 1)
        if i in lengths:
            continue
        tokens = encode(tokenizer, documents[i], bos)
        if len(tokens) > length:
            windows.append(_draw_window(tokens, length, rng))
            bar.update()
            continue
        lengths[i] = len(tokens)
        if len(lengths) == len(documents):
            raise DassError(
                f"Too little text: none of the {len(documents)} documents is longer than {length} tokens (the longest "
                f"has {max(lengths.values())}): shorten seq_len or give longer documents.",
                field="calibration.seq_len",
            )
    bar.close()
    return _begin(torch.stack(windows), bos, tokenizer)


def _draw_window(tokens: Tensor, length: int, rng: random.Random) -> Tensor:
    """A random window; like the reference, never the last one possible."""
    start = rng.randint(0, len(tokens) - length - 1)
    return tokens[start : start + length]


def draw_joined(
    documents: Sequence[str], tokenizer: Tokenizer, n_sequences: int, seq_len: int, seed: int, bos: Bos
) -> Tensor:
    """Join the tokens of all documents, cut them into windows, and draw windows at random without repetition."""
    bar = progress(documents, "calibration", "document")
    tokens = torch.cat([encode(tokenizer, document, bos) for document in bar])
    windows = windows_of(tokens, seq_len, bos, tokenizer)
    if len(windows) < n_sequences:
        raise DassError(
            f"Too little text: {len(tokens)} tokens are {len(windows)} whole sequences of {seq_len}, and {n_sequences} "
            f"were asked for: lower n_sequences or seq_len, or give more text.",
            field="calibration.n_sequences",
        )
    return windows[random.Random(seed).sample(range(len(windows)), n_sequences)]


def draw_wikitext(
    rows: Sequence[str], tokenizer: Tokenizer, n_sequences: int, seq_len: int, seed: int, bos: Bos
) -> Tensor:
    """Random windows of WikiText-2's training split, as the reference draws them (Wanda's `get_wikitext2`)."""
    length = _text_length(seq_len, bos)
    tokens = encode(tokenizer, " ".join(rows), bos)
    if len(tokens) <= length:
        raise DassError(
            f"Too little text: {len(tokens)} tokens are not more than one sequence of {length}: shorten seq_len or "
            f"give more text.",
            field="calibration.seq_len",
        )
    rng = random.Random(seed)
    return _begin(torch.stack([_draw_window(tokens, length, rng) for _ in range(n_sequences)]), bos, tokenizer)


def first_sequences(
    input_ids: Tensor, tokenizer: Tokenizer, n_sequences: int | None, seq_len: int | None, seed: int, bos: Bos
) -> Tensor:
    """The first of given sequences `(n, length)`, as they are; None: all of them, of the length that they have."""
    n, length = input_ids.shape
    if bos != "none":
        raise DassError(
            "bos does not apply to tokens, each sequence is used as it is: leave it at none.", "calibration.bos"
        )
    if seq_len not in (None, length):
        raise DassError(
            f"These are sequences of {length} tokens, not seq_len={seq_len}: leave it null.", "calibration.seq_len"
        )
    if n_sequences is not None and n_sequences > n:
        raise DassError(
            f"These are {n} sequences, fewer than n_sequences={n_sequences}: lower it.", "calibration.n_sequences"
        )
    return input_ids[:n_sequences]


def require_in_vocabulary(input_ids: Tensor, vocabulary: int, what: str) -> None:
    """Raise DassError where a token id has no embedding."""
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise DassError(
            f"{what} hold token ids from {low} to {high}, but the model's vocabulary has {vocabulary}: "
            f"tokenise the text with this model's own tokenizer."
        )


def require_positions(model: nn.Module, length: int, what: str) -> bool:
    """Raise DassError where sequences of `length` tokens are longer than the model's table of positions.

    Without a table (rotary or relative positions) a longer one is possible, and a note on stderr tells that the model
    was not made for it; whether it did is returned.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or length <= positions:
        return False
    embeddings = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    others = [table for table in embeddings if table is not model.get_input_embeddings().weight]
    # OPT has two rows more; GPT-J keeps sines in a buffer
    if any(table.ndim == 2 and 0 <= len(table) - positions <= 2 for table in [*others, *model.buffers()]):
        raise DassError(f"{what} are sequences of {length} tokens, and the model has {positions} positions: cut them.")
    print(f"note: {what} are sequences of {length} tokens; the model was made for {positions}", file=sys.stderr)
    return True
