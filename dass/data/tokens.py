"""Text -> token ids: windows, BOS, and why calibration sets are drawn as they are."""

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dass.errors import DassError
from dass.progress import progress

Bos = Literal["tokenizer", "per_sequence", "none"]
"""Whether sequences begin with a BOS token: where the tokenizer puts one (before each document), in each, nowhere."""
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def encode(tokenizer: Tokenizer, text: str, bos: Bos) -> Tensor:
    """Token ids `(n_tokens,)` of a text; with a BOS in front only where `bos` is `tokenizer` and it adds one."""
    if not isinstance(text, str):
        raise DassError(f"A document is {text!r} instead of text: mend the file.")
    encoded = tokenizer(text, add_special_tokens=bos == "tokenizer", verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


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
    than a window, are indexed, so that they may be a column of a data set on disk.
    """
    length = _text_length(seq_len, bos)
    rng = random.Random(seed)
    lengths: dict[int, int] = {}  # of the documents found too short
    windows: list[Tensor] = []
    bar = progress(None, "calibration", "sequence", n_sequences)
    while len(windows) < n_sequences:
        i = rng.randint(0, len(documents) - 1)
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
