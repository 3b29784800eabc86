"""Texts and tokens: from the hub, or from files."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dass.errors import DassError, first_line

C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


def read_c4_shard(path: Path | None) -> Sequence[str]:
    """The documents of C4's first training shard: from the hub, or a local `json.gz` of the same format."""
    import datasets

    try:
        if path is None:
            data = datasets.load_dataset("allenai/c4", data_files={"train": C4_SHARD}, split="train")
        else:
            data = datasets.load_dataset("json", data_files=str(existing_file(path)), split="train")
        return data["text"]
    except DassError:
        raise
    except Exception as error:  # a damaged file can make datasets raise anything
        source = path or "allenai/c4"
        raise DassError(f"Cannot read {source} as C4 ({first_line(error)}): check the file or the network.") from error


def read_wikitext(path: Path | None, split: str) -> list[str]:
    """The rows of WikiText-2 (raw): from the hub, or from a local `.raw` file, whose lines are the rows.

    In the data set the blank line (one space) is the empty string; every other line keeps its newline.
    """
    if path is not None:
        lines = read_text(path).removesuffix("\n").split("\n")
        return [line + "\n" if line.strip() else "" for line in lines]
    import datasets

    try:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DassError(
            f"Cannot load WikiText-2 from the hub ({first_line(error)}): check the network or give a local .raw file "
            f"as `path`."
        ) from error


def read_documents(path: Path) -> list[str]:
    """The documents of a text file: the whole of a .txt, or the field `text` of every line of a .jsonl.

    Raises:
        DassError: a missing or empty file, or a line that is not JSON with a `text`.
    """
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                document = json.loads(line)["text"]
                if not isinstance(document, str):
                    raise TypeError("`text` is not a string")
            except (ValueError, KeyError, TypeError) as error:
                raise DassError(
                    f"{path}, line {number} is not a JSON object with a text in `text`: mend it."
                ) from error
            documents.append(document)
    return documents


def read_tokens(path: Path, n_sequences: int | None, seq_len: int | None) -> Tensor:
    """The tensor `input_ids` of a safetensors file, int64 `(n_sequences, seq_len)`, used as it is.

    Args:
        n_sequences: the first that many; None takes all.
        seq_len: checked against the file; None takes what it has.

    Raises:
        DassError: not such a file, fewer sequences than asked for, or another length.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(existing_file(path), framework="pt") as file:
            input_ids = file.get_tensor("input_ids")
    except (SafetensorError, OSError) as error:
        raise DassError(f"{path} is not a safetensors file with a tensor `input_ids` ({first_line(error)}).") from error
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or not input_ids.numel():
        raise DassError(
            f"`input_ids` in {path} is {input_ids.dtype} {tuple(input_ids.shape)}: it must be int64 with the shape "
            f"(n_sequences, seq_len)."
        )
    if seq_len is not None and seq_len != input_ids.shape[1]:
        raise DassError(
            f"{path} holds sequences of {input_ids.shape[1]} tokens, not calibration.seq_len={seq_len}: leave it null."
        )
    if n_sequences is not None and n_sequences > len(input_ids):
        raise DassError(
            f"{path} holds {len(input_ids)} sequences, fewer than calibration.n_sequences={n_sequences}: lower it."
        )
    return input_ids[:n_sequences]


def existing_file(path: Path) -> Path:
    """The path; DassError where there is no such file."""
    if not path.is_file():
        raise DassError(f"There is no file {path}: check the path.")
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, line ends as they are; DassError where it is missing, empty or not text."""
    try:
        text = existing_file(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DassError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it.") from error
    if not text.strip():
        raise DassError(f"{path} holds no text: give another file.")
    return text
