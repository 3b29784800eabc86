"""Folders that appear whole or not at all: seals, what is ours, interruptions, and what killed processes leave."""

import itertools
import os
import signal
import sys

import pytest

from dass import folders
from dass.errors import DassError
from dass.folders import is_saved, read_seal, require_own_folder, temporary_beside, whole_folder


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


@pytest.mark.parametrize(
    "damage", ["", "[]", "[" * 10**5, '{"fingerprint": "abc"}', '{"fingerprint": "abc", "files": 3}']
)
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


def at_line(number: int, act):
    """A trace function that acts before the line of dass/folders.py that is run as the `number`-th, and all lines."""
    lines: list[int] = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != folders.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                act()
        return trace

    return trace, lines


def in_child(work) -> int:
    """Do something in a process of its own; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except DassError as error:
            os._exit(3 if "Another process is writing" in str(error) else 4)
        except BaseException:
            os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_line_leaves_one_under_the_name_or_the_next_start_puts_it_back(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    folder = tmp_path / "a"
    write(folder, "old", "0")
    for number in itertools.count(1):

        def killed(number=number):
            sys.settrace(at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL))[0])
            write(folder, "new", str(number))

        code = in_child(killed)
        if not folder.exists():
            assert not exchange
            with pytest.raises(RuntimeError), temporary_beside(folder):
                raise RuntimeError
        held = read_seal(folder)[0]
        assert held in (str(number), str(number - 1)) and is_saved(folder, held)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        write(folder, "old", str(number))  # what the killed one left is no obstacle
        assert os.listdir(tmp_path) == ["a"]
    assert number > 100 and os.listdir(tmp_path) == ["a"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("interruption", [SystemExit, OSError])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_interruption_at_any_line_leaves_one(tmp_path, monkeypatch, exchange, interruption):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    folder, previous = tmp_path / "a", sys.gettrace()

    def interrupt():
        raise interruption

    write(folder, "old", "0")
    for number in itertools.count(1):
        trace, lines = at_line(number, interrupt)
        sys.settrace(trace)
        try:
            write(folder, "new", str(number))
        except (interruption, DassError):
            assert len(lines) >= number
        finally:
            sys.settrace(previous)
        with temporary_beside(folder):  # an interruption of the cleaning itself leaves it to the next
            pass
        held = read_seal(folder)[0]
        assert held in (str(number), str(number - 1)) and is_saved(folder, held) and os.listdir(tmp_path) == ["a"]
        if len(lines) < number:
            break
        write(folder, "old", str(number))


def test_a_full_disk_leaves_the_old_one(tmp_path):
    folder = tmp_path / "a"
    write(folder, "old")
    with pytest.raises(OSError), whole_folder(folder, "def") as new:
        (new / "file").write_text("half")
        raise OSError
    assert is_saved(folder, "abc") and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_a_user_puts_in_meanwhile_is_kept(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    folder = tmp_path / "a"
    write(folder, "old")
    with pytest.raises(DassError, match="also holds notes meanwhile"), whole_folder(folder, "def") as new:
        (new / "file").write_text("new")
        (folder / "notes").write_text("mine")
    assert is_saved(folder, "abc") and (folder / "notes").read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_one_process_writes_at_a_time(tmp_path):
    """Real processes, over and over: each ends well or with the sentence, and the last whole one stands."""
    folder, ended = tmp_path / "a[b]*", []

    def work(name: int) -> None:
        for _ in range(20):
            write(folder, str(name) * 1000, str(name))

    children = []
    for name in range(5):
        if (pid := os.fork()) == 0:
            os._exit(in_child(lambda name=name: work(name)))
        children.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert set(ended) <= {0, 3} and os.listdir(tmp_path) == ["a[b]*"]
    assert is_saved(folder, read_seal(folder)[0])
    with whole_folder(folder, "one") as new:
        (new / "file").write_text("new")
        assert in_child(lambda: write(folder)) == 3
        assert in_child(lambda: write(tmp_path / "another")) == 0
    assert is_saved(folder, "one")


def test_who_waits_gets_its_turn(tmp_path):
    def work() -> None:
        for _ in range(20):
            with temporary_beside(tmp_path / "count") as temporary:
                assert sorted(os.listdir(temporary)) == ["lock"]
                (temporary / "mine").write_text("x")
                value = int((tmp_path / "count").read_text())
                (tmp_path / "count").write_text(str(value + 1))

    (tmp_path / "count").write_text("0")
    children = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            os._exit(in_child(work))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert (tmp_path / "count").read_text() == "80" and os.listdir(tmp_path) == ["count"]


def test_a_name_that_leaves_no_room_is_refused_before_the_work(tmp_path):
    for name in ("a" * 250, "a" * 300):
        with pytest.raises(DassError, match="File name too long"):
            require_own_folder(tmp_path / name)
