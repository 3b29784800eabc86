"""Calibration sets: a source by its name -> input_ids `(n_sequences, seq_len)` int64."""

from pathlib import Path

from torch import Tensor

from dass.data.sources import Source, find_source
from dass.data.tokens import Bos, Tokenizer, draw_documents, draw_joined
from dass.errors import DassError
from dass.stages import release_freed_memory


def calibration_tokens(
    name: str,
    tokenizer: Tokenizer | None,
    path: str | Path | None,
    n_sequences: int | None,
    seq_len: int | None,
    seed: int,
    bos: Bos,
    join: bool,
    revision: str | None = None,
) -> Tensor:
    """The calibration set of one of the names in `conf/calibration`, `(n_sequences, seq_len)` int64.

    Args:
        tokenizer: the model's; None will do for a source of tokens.
        path: a local file; needed by text_file and tokens_file, in place of the hub for c4 and wikitext2.
        n_sequences: how many; None only for tokens (all of them).
        seq_len: tokens per sequence; None only for tokens.
        seed: of the draws; 0 in the paper.
        bos: see `Bos`.
        join: whether the documents of packaged and local texts are joined; else each window lies in one document.
        revision: commit of a data set on the hub; None: its newest.

    Raises:
        DassError: unknown name, missing file, too little text.
    """
    found = find_source(name, "calibration")
    if n_sequences is not None and n_sequences < 1:
        raise DassError(f"n_sequences={n_sequences} must be at least 1.", "calibration.n_sequences")
    if join and (found.tokens or found.draw is not None):
        raise DassError(f"join does not apply to {name}, which has its own draw: leave it false.", "calibration.join")
    if found.tokens:
        if bos != "none":
            raise DassError(f"bos does not apply to {name}, used as it is: leave it at none.", "calibration.bos")
        return _first(found, found.documents("calibration", path, revision), n_sequences, seq_len)
    if n_sequences is None or seq_len is None:
        raise DassError(f"{name} needs n_sequences and seq_len: set both.", "calibration.n_sequences")
    documents = found.documents("calibration", path, revision)
    draw = found.draw or (draw_joined if join else draw_documents)
    input_ids = draw(documents, tokenizer, n_sequences, seq_len, seed, bos)
    release_freed_memory()
    return input_ids


def _first(found: Source, input_ids: Tensor, n_sequences: int | None, seq_len: int | None) -> Tensor:
    """The first sequences of given tokens `(n, length)`, used as they are."""
    n, length = input_ids.shape
    if seq_len is not None and seq_len != length:
        raise DassError(
            f"{found.name} holds sequences of {length} tokens, not seq_len={seq_len}: leave it null.",
            "calibration.seq_len",
        )
    if n_sequences is not None and n_sequences > n:
        raise DassError(
            f"{found.name} holds {n} sequences, fewer than n_sequences={n_sequences}: lower it.",
            "calibration.n_sequences",
        )
    return input_ids[:n_sequences]
