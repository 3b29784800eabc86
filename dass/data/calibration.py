"""Calibration sets: a source by its name -> input_ids `(n_sequences, seq_len)` int64."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dass.data.sources import find_source
from dass.data.texts import FIELD
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
    field: str = FIELD,
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
        field: what a text is called in the objects of a JSON file.

    Raises:
        DassError: unknown name, missing file, too little text.
    """
    found = find_source(name, "calibration")
    if n_sequences is not None and n_sequences < 1:
        raise DassError(f"n_sequences={n_sequences} must be at least 1.", "calibration.n_sequences")
    if not found.tokens and None in (n_sequences, seq_len):
        raise DassError(f"{name} needs n_sequences and seq_len: set both.", "calibration.n_sequences")
    if join and found.draw is not None:
        raise DassError(f"join does not apply to {name}, which has its own draw: leave it false.", "calibration.join")
    draw: Callable[..., Tensor] = found.draw or (draw_joined if join else draw_documents)
    # no name for the documents, so that they are freed when they are drawn from
    input_ids = draw(found.documents("calibration", path, revision, field), tokenizer, n_sequences, seq_len, seed, bos)
    release_freed_memory()
    return input_ids


def facts_of(input_ids: Tensor) -> dict[str, int]:
    """For the record: how many sequences, how long, and how many of them are an earlier one again, as a note says."""
    n_sequences, seq_len = input_ids.shape
    repeated = n_sequences - len(torch.unique(input_ids, dim=0))
    if repeated:
        print(f"note: {repeated} of the {n_sequences} calibration sequences were drawn before", file=sys.stderr)
    return {"n_sequences": n_sequences, "seq_len": seq_len, "repeated": repeated}
