"""Text files: what can be read with certainty, and one sentence on what cannot.

A file is UTF-8, packed by gzip or not, and its name, in letters of any case, says what it holds: `.txt` and `.raw` one
text; `.jsonl` and `.ndjson` an object a line; `.json` a list of objects or of texts, one object, or an object a line as
C4's shards. All else is refused. Line ends become LF, those inside the texts of a JSON file too, so that a text gives
the same number on every system; the other separators of Unicode are a part of their line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dass.errors import DassError, told
from dass.records import file_sha256

FIELD = "text"
"""What the text of an object is called, where nothing else is said."""
PLAIN, JSON = (".txt", ".raw"), (".jsonl", ".ndjson", ".json")


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds: in lower case, before `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def existing_file(path: Path) -> Path:
    """The path, `~` resolved; DassError where there is no such file."""
    with told(f"Cannot find {path}", "check the path", OSError, RuntimeError):
        path = path.expanduser()
        found = path.is_file()
    if not found:
        raise DassError(f"There is no file {path}: check the path.")
    return path


def sha256_of(path: Path) -> str:
    """The checksum of a file; DassError where it cannot be read."""
    with told(f"Cannot read {path}", "check the file", OSError):
        return file_sha256(existing_file(path))


def read_text(path: Path) -> str:
    """A file of text, with LF alone at the end of lines; DassError where it is missing, damaged, empty or not text."""
    path = existing_file(path)
    with told(f"Cannot read {path}", "check the file", OSError, EOFError, zlib.error):
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    with told(f"{path} is not UTF-8 text", "convert it", UnicodeDecodeError):
        text = content.decode("utf-8-sig")
    if "\0" in text:
        raise DassError(f"{path} is not UTF-8 text, since it holds the character 0: convert it.")
    if not text.strip():
        raise DassError(f"{path} holds no text: give another file.")
    return _with_lf(text)


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON file, objects or, in a list, texts, each with the words for its place.

    Raises:
        DassError: the file is none of those that the head of this module names, or an entry is something else.
    """
    suffix = suffix_of(path)
    if suffix not in JSON:
        raise DassError(f"{path} must end in {', '.join(JSON)}, or one of these and .gz: convert it.")
    text, kinds = read_text(path), set()
    for place, entry, in_list in _lines(path, text) if suffix != ".json" else _whole(path, text):
        if not isinstance(entry, (dict, str) if in_list else dict):
            raise DassError(f"{place} is not a JSON object: mend it.")
        kinds.add(type(entry))
        if len(kinds) > 1:
            raise DassError(f"{path} mixes objects and texts, as {place} shows: give only one of them.")
        yield place, entry


def read_documents(path: Path, field: str = FIELD) -> list[str]:
    """The texts of a file: the whole of a plain one, of a JSON file the `field` of every object.

    Raises:
        DassError: the file cannot be read, its name does not say what it holds, or an object has no such text.
    """
    suffix = suffix_of(path)
    if suffix not in PLAIN + JSON:
        raise DassError(
            f"{path} could be anything by its name: a text file ends in {', '.join(PLAIN + JSON)}, or one of these and "
            f".gz; rename or convert it."
        )
    if suffix in PLAIN:
        return [_plain(path)]
    documents = [_with_lf(_text(place, entry, field)) for place, entry in read_json(path)]
    if not any(document.strip() for document in documents):
        raise DassError(f"{path} holds no text: give another file.")
    return documents


def _with_lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(path: Path) -> str:
    """A text that is not JSON under the name of a text."""
    text = read_text(path)
    try:
        objects = isinstance(json.loads(text.strip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return text
    if objects:
        raise DassError(f"{path} begins with a JSON object: if its lines are objects, let its name end in .jsonl.")
    return text


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any, bool]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            with told(f"{place} is not JSON", "mend it", ValueError, RecursionError):
                entry = json.loads(line)
            yield place, entry, False


def _whole(path: Path, text: str) -> Iterator[tuple[str, Any, bool]]:
    with told(f"{path} is not JSON", "mend it", ValueError, RecursionError):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # more after a whole value
                raise
            yield from _lines(path, text)
            return
    in_list = isinstance(value, list)
    for number, entry in enumerate(value if in_list else [value], start=1):
        yield f"{path}, entry {number}", entry, in_list


def _text(place: str, entry: Any, field: str) -> str:
    text = entry if isinstance(entry, str) else entry.get(field)
    if not isinstance(text, str):
        found = ", ".join(sorted(key for key, value in entry.items() if isinstance(value, str))[:5])
        raise DassError(
            f"{place} is not an object with a text in `{field}` (it has texts in: {found or 'nothing'}): mend it, or "
            f"name another field."
        )
    with told(f"{place} holds half a character", "mend it", UnicodeEncodeError):  # a lone surrogate
        text.encode()
    return text
