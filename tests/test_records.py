"""Records: identity, atomic writing, and files that are none."""

import errno
import json
import os

import pytest
import torch

from dass.errors import DassError
from dass.records import (
    RECORD_KEYS,
    git_state,
    identity_of,
    machine_description,
    package_versions,
    read_record,
    read_records,
    require_writable,
    write_record,
)


def record(run_id="abc"):
    return dict.fromkeys(RECORD_KEYS, 0) | {"id": run_id}


def test_identity_does_not_depend_on_order():
    assert identity_of({"a": 1, "b": {"c": 2.0, "d": None}}) == identity_of({"b": {"d": None, "c": 2.0}, "a": 1})
    assert identity_of({"a": 1}) != identity_of({"a": 2})
    assert len(identity_of({})) == 16


def test_write_and_read(tmp_path):
    path = write_record(tmp_path / "new" / "runs", record())
    assert path.name == "abc.json" and read_record(path) == record()
    assert os.listdir(path.parent) == ["abc.json"]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, record() | {"windows": [float("nan")]})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DassError, match=r"abc\.json.*No space left on device"):
        write_record(tmp_path, record())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"id": "abc"}', json.dumps(record("another"))])
def test_files_that_are_no_records(tmp_path, content, capsys):
    write_record(tmp_path, record("good"))
    (tmp_path / "abc.json").write_text(content)
    with pytest.raises(DassError, match=r"abc\.json"):
        read_record(tmp_path / "abc.json")
    assert [r["id"] for r in read_records(tmp_path)] == ["good"]
    assert "abc.json" in capsys.readouterr().err


def test_writable(tmp_path):
    require_writable(tmp_path / "not" / "yet")
    (tmp_path / "file").touch()
    with pytest.raises(DassError, match="file"):
        require_writable(tmp_path / "file" / "runs")


def test_what_a_record_says_of_its_origin():
    assert set(git_state()) == {"commit", "dirty"}
    assert package_versions()["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    machine = machine_description(torch.device("cpu"))
    assert machine["cpu"] and machine["threads"] >= 1 and machine["memory_gb"] > 0.5 and machine["gpu"] is None
