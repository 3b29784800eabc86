"""Claims: one of many processes has it, a living owner keeps it, a dead one is taken over by exactly one."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dass import claims
from dass.claims import claimed

OWNER = """
import sys, time
from pathlib import Path
from dass import claims

claims.BEAT = 0.1
if sys.argv[2:] == ["stranger"]:  # as a process of another machine, of which nothing is known
    claims._life = lambda pid: ""
with claims.claimed(Path(sys.argv[1])) as claim:
    print("mine", flush=True)
    sys.stdin.readline()
    print(claim.lost, flush=True)
"""
COUNTER = """
import sys
from pathlib import Path
from dass import claims

claims.BEAT, claims.LOOKS = 0.02, 60
path = Path(sys.argv[1])
for _ in range(20):
    with claims.claimed(path / "claim"):
        value = int((path / "count").read_text())
        (path / "count").write_text("")
        (path / "count").write_text(str(value + 1))
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "LOOKS", 10)
    return tmp_path / "not" / "there" / "claim"


def process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def owner_of(path, *arguments):
    owner = process(OWNER, path, *arguments)
    assert owner.stdout.readline() == "mine\n"
    return owner


def test_it_is_had_and_given_back(path):
    with claimed(path) as claim, claimed(path, wait=False) as second:
        assert second is None and os.listdir(path) == [claim.owner]
    assert not path.parent.exists()
    with pytest.raises(ZeroDivisionError), claimed(path):
        raise ZeroDivisionError
    assert not path.parent.exists()


def test_many_processes_have_it_in_turn_after_one_that_was_killed(tmp_path):
    owner = owner_of(tmp_path / "claim", "stranger")
    owner.kill()
    (tmp_path / "count").write_text("0")
    many = [process(COUNTER, tmp_path) for _ in range(3)]
    assert [one.wait(timeout=120) for one in many] == [0] * 3
    assert (tmp_path / "count").read_text() == "60" and os.listdir(tmp_path) == ["count"]
    owner.communicate()


@pytest.mark.parametrize("who", [[], ["stranger"]])
def test_a_living_owner_is_waited_for(path, capsys, who):
    owner = owner_of(path, *who)
    threading.Timer(3, lambda: owner.communicate("\n")).start()
    started = time.monotonic()
    with claimed(path):
        assert time.monotonic() - started > 2.9  # three times as long as until one without a sign of life is dead
    assert capsys.readouterr().err.count("waiting for it") == 1


@pytest.mark.parametrize("who", [[], ["stranger"]])
def test_a_killed_owner_is_taken_over_by_one(path, monkeypatch, who):
    owner = owner_of(path, *who)
    owner.kill()  # not waited for: it stays in the table of processes
    if not who:
        monkeypatch.setattr(claims, "LOOKS", 10**9)  # it is known to be dead at the first look
    counts, started = [], time.monotonic()

    def take():
        with claimed(path) as claim:
            counts.append(os.listdir(path) == [claim.owner])
            time.sleep(0.05)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counts == [True] * 6 and os.listdir(path.parent) == []
    assert not who or time.monotonic() - started > 0.9
    owner.communicate()


def test_who_stood_still_learns_that_the_claim_is_lost(path):
    owner = owner_of(path)
    owner.send_signal(signal.SIGSTOP)
    with claimed(path) as claim:
        owner.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert owner.communicate("\n")[0] == "True\n"
        assert os.listdir(path) == [claim.owner]  # it gave back nothing that was not its own
    claim.lost = True
    with pytest.raises(claims.DassError, match="stood still"):
        claim.require()


def test_where_there_are_neither_locks_nor_links_nor_exclusive_creation(path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    opened = os.open
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "open", lambda name, flags, *a, **k: opened(name, flags & ~os.O_EXCL, *a, **k))
    with claimed(path), claimed(path, wait=False) as second:
        assert second is None
    assert not path.parent.exists()


@pytest.mark.parametrize("left", ["nothing in it", "a claim never put in place"])
def test_what_killed_processes_leave_is_cleaned(path, left):
    folder = path if left == "nothing in it" else path.with_name(f"{path.name}.0123")
    folder.mkdir(parents=True)
    with claimed(path):
        assert os.listdir(path.parent) == [path.name]
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("what", ["a file", "refused"])
def test_without_a_claim_the_work_is_done_all_the_same(path, capsys, monkeypatch, what):
    path.parent.mkdir(parents=True)
    if what == "a file":
        path.write_text("")
    else:
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    with claimed(path, wait=False) as claim:
        assert claim is not None
        claim.require()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {path.parent} takes no claims")
    assert os.listdir(path.parent) == ([path.name] if what == "a file" else [])


@pytest.mark.parametrize(
    "name", ["x", "a-b-c-d-e", "-" * 4, "ÿ" * 60, "{0}-{1}-x-1-z", "{0}-{1}-99999999999999999999-1-z"]
)
def test_an_owner_of_any_name_is_taken_over_when_it_is_dead(path, name):
    path.mkdir(parents=True)
    (path / name.format(*claims._life(os.getpid()).split("-"))).touch()
    with claimed(path) as claim:
        assert os.listdir(path) == [claim.owner]
