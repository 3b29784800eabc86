"""Folders that appear whole or not at all: seals, what is ours, interruptions, and what killed processes leave."""

import os
import socket
import subprocess
import sys

import pytest

from dass import folders
from dass.errors import DassError
from dass.folders import is_saved, read_seal, require_own_folder, whole_folder


def write(folder, content: str = "new", fingerprint: str = "abc") -> None:
    with whole_folder(folder, fingerprint) as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").write_text(content)
        (new / "other").write_text("other")


def test_a_folder_is_of_its_fingerprint_until_it_is_changed(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    write(folder)
    assert os.listdir(folder.parent) == ["yet"] and (folder / "deep" / "file").read_text() == "new"
    assert is_saved(folder, "abc") and not is_saved(folder, "def") and not is_saved(tmp_path, "abc")
    assert set(read_seal(folder)[1]) == {"deep/file", "other"}
    (folder / "deep" / "file").write_text("neW")
    assert not is_saved(folder, "abc")
    (folder / "deep" / "file").unlink()
    assert not is_saved(folder, "abc")


@pytest.mark.parametrize("damage", ["", "[]", '{"fingerprint": "abc"}', '{"fingerprint": "abc", "files": 3}'])
def test_a_seal_that_is_none(tmp_path, damage):
    write(tmp_path / "a")
    (tmp_path / "a" / "dass.json").write_text(damage)
    assert not is_saved(tmp_path / "a", "abc")
    with pytest.raises(DassError, match="choose another folder"):
        require_own_folder(tmp_path / "a")


def test_only_what_is_ours_is_replaced(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    write(folder, "old")  # an empty one will do
    write(folder, "new", "def")
    assert is_saved(folder, "def") and (folder / "deep" / "file").read_text() == "new"
    (folder / "deep" / "notes").write_text("mine")
    with pytest.raises(DassError, match="also holds deep/notes"):
        write(folder)
    (folder / "deep" / "notes").unlink()
    (folder / "other").write_text("edited")
    with pytest.raises(DassError, match="was changed since"):
        write(folder)
    assert (folder / "other").read_text() == "edited" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["foreign", "file", "link", "dangling"])
def test_what_is_not_ours_is_never_touched(tmp_path, kind):
    write(tmp_path / "ours")
    folder = tmp_path / "a"
    if kind == "foreign":
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    elif kind == "file":
        folder.write_text("years of work")
    else:
        folder.symlink_to(tmp_path / ("ours" if kind == "link" else "nowhere"))
    with pytest.raises(DassError, match="is not one that this project wrote"):
        write(folder)
    assert folder.is_symlink() or "years of work" in (folder if kind == "file" else folder / "thesis.tex").read_text()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["writing", "sealing", "moving the old", "moving the new"])
def test_an_interruption_leaves_the_old_one(tmp_path, monkeypatch, step, interruption):
    folder, rename, calls = tmp_path / "a", os.rename, []
    write(folder, "old")

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if step == "moving the new" else 1):
            raise interruption
        rename(*arguments)

    if step == "sealing":
        monkeypatch.setattr(folders, "write_seal", interrupted)
    elif step != "writing":
        monkeypatch.setattr(folders.os, "rename", interrupted)
    with pytest.raises(interruption), whole_folder(folder, "def") as new:
        (new / "file").write_text("half")
        if step == "writing":
            raise interruption
    assert is_saved(folder, "abc") and os.listdir(tmp_path) == ["a"]


def test_what_killed_processes_left_goes_and_an_old_one_comes_back(tmp_path):
    """A process killed between the two renames leaves the old folder aside and nothing under the name."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host, name = socket.gethostname(), "a[b]*"
    dead, alive = (tmp_path / f".{name}.{host}-{pid}.x" for pid in (int(ended.stdout), os.getpid()))
    elsewhere = tmp_path / f".{name}.{host}x-{int(ended.stdout)}.x"
    for leftover in (dead, alive, elsewhere):
        write(leftover / "old", "old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / name, "def"):
        raise RuntimeError
    assert is_saved(tmp_path / name, "abc") and not dead.exists() and alive.exists() and elsewhere.exists()
    write(dead / "old", "older")
    write(tmp_path / name, "new")
    assert (tmp_path / name / "deep" / "file").read_text() == "new" and not dead.exists()
