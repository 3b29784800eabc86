"""Text files of every form, and those that could be anything."""

import gzip
import json
import math

import pytest

from dass.data.sources import find_source, text_file
from dass.data.texts import read_documents
from dass.errors import DassError

TEXT = "w3\u2028w4\x85w5\n\x0bw6\x0c w7\x1c\n"
OBJECTS = [{"text": TEXT, "body": "w8", "id": 1}, {"text": "w9", "body": "", "id": 2}]


def packed(name, content):
    return gzip.compress(content) if name.lower().endswith(".gz") else content


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".raw", ".txt.gz", ".Txt.GZ"])
def test_a_text_is_the_same_however_it_is_stored(tmp_path, suffix, bom, ends):
    path = tmp_path / f"a b [1].x{suffix}"
    path.write_bytes(packed(suffix, (bom + TEXT.replace("\n", ends)).encode()))
    assert text_file(path) == [TEXT]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON", ".json", ".jsonl.gz", ".Json.gz"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_object_a_line(tmp_path, suffix, bom, ends, ascii_only):
    path = tmp_path / f"a{suffix}"
    objects = [entry | {"text": entry["text"].replace("\n", ends)} for entry in OBJECTS]
    lines = ends.join(["", *(json.dumps(entry, ensure_ascii=ascii_only) for entry in objects), ""])
    path.write_bytes(packed(suffix, (bom + lines).encode()))
    assert text_file(path) == [TEXT, "w9"]
    assert text_file(path, "body") == ["w8", ""]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "documents"),
    [(OBJECTS, [TEXT, "w9"]), ([TEXT, "w9"], [TEXT, "w9"]), (OBJECTS[0], [TEXT]), ([OBJECTS[1]], ["w9"])],
)
def test_whole_json(tmp_path, value, documents, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=indent))
    assert read_documents(path) == documents


LINE = b'{"text": "w3"}\n'
REFUSED = [
    *[(f"a{suffix}", b"w3 w4", "could be anything") for suffix in ("", ".csv", ".parquet", ".html", ".tsv", ".xml.gz")],
    ("a.gz", gzip.compress(b"w3", mtime=0), "could be anything"),
    ("a.txt", "w3 w4".encode("utf-16"), "not UTF-8"),
    ("a.txt", "w3 w4".encode("utf-16-le"), "not UTF-8"),
    ("a.jsonl", LINE.decode().encode("utf-32"), "not UTF-8"),
    ("a.txt", "wörter".encode("latin-1"), "not UTF-8"),
    ("a.txt", gzip.compress(b"w3", mtime=0), "not UTF-8"),
    ("a.txt", LINE, "begins with a JSON object"),
    ("a.txt", b"\xef\xbb\xbf \n", "holds no text"),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
    ("a.json", b"[]", "holds no text"),
    ("a.jsonl", b'{"text": " "}\n', "holds no text"),
    ("a.txt.gz", b"w3 w4", "Cannot read"),
    ("a.txt.gz", gzip.compress(b"w3 w4 " * 99, mtime=0)[:-9], "Cannot read"),
    ("a.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:20], "Cannot read"),
    ("a.jsonl.gz", gzip.compress(LINE, mtime=0) + b"more", "Cannot read"),
    *[("a.jsonl", LINE + line, "a.jsonl, line 2 is not") for line in (b"w4", b'"w4"', b"[1]", b"3", b"null", b"{")],
    ("a.jsonl", b'[\n{"text": "w3"}\n]', "line 1 is not JSON"),
    ("a.jsonl", b"[" * 10**5, "line 1 is not JSON"),
    ("a.json", b'{"a":' * 10**5, "is not JSON"),
    ("a.json", b"[1, 2]", "entry 1 is not a JSON object"),
    ("a.json", b'"w3"', "entry 1 is not a JSON object"),
    ("a.json", b'["w3", {"text": "w4"}]', "mixes objects and texts"),
    ("a.json", b'{"text": "w3"}\n"w4"', "line 2 is not a JSON object"),
    ("a.json", b'[{"text": "w3"}', "is not JSON"),
    ("a.json", b'{"data": [{"text": "w3"}]}', r"text in `text` \(it has texts in: nothing\)"),
    ("a.jsonl", LINE + b'{"txt": "w4", "n": 1}', r"line 2 .*\(it has texts in: txt\): mend it, or name another field"),
    *[("a.jsonl", b'{"text": %s}' % value, "line 1 is not an object with") for value in (b"null", b"3", b'["w3"]')],
    ("a.jsonl", rb'{"text": "\ud800"}', "line 1 holds half a character"),
    ("a" * 300 + ".txt", None, "Cannot find"),
    ("a\0.txt", None, "no file"),
    ("nowhere.txt", None, "no file"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED)
def test_what_is_not_certain_is_refused_in_one_sentence(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DassError, match=says) as raised:
        text_file(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w3")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    monkeypatch.setattr("dass.data.texts.file_sha256", refuse)
    for read in (text_file, lambda path: find_source("text_file", "evaluation").identity(path, None)):
        with pytest.raises(DassError, match=r"Cannot read .*a\.txt \(Permission denied\)"):
            read(tmp_path / "a.txt")


def test_paths_may_begin_with_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("w3")
    source = find_source("text_file", "calibration")
    assert source.documents("calibration", "~/a.txt", None) == ["w3"]
    assert source.identity("~/a.txt", None) == source.identity(tmp_path / "a.txt", None)
    with pytest.raises(DassError, match="Cannot find ~nobody-of-this-name"):
        source.documents("calibration", "~nobody-of-this-name/a.txt", None)


def test_the_field_is_passed_where_it_applies(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(OBJECTS))
    assert find_source("text_file", "evaluation").documents("evaluation", path, None, "body") == ["w8", ""]
    with pytest.raises(DassError, match="field does not apply to packaged_wiki") as raised:
        find_source("packaged_wiki", "evaluation").documents("evaluation", None, None, "body")
    assert raised.value.field == "evaluation.field"


def test_numbers_that_json_does_not_know_are_no_fault_of_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w3", "score": math.nan}))
    assert text_file(tmp_path / "a.jsonl") == ["w3"]
