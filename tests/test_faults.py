"""Disks that are full or read-only, and models whose files are damaged: one sentence, and nothing half-written."""

import errno
import json
import os
import subprocess

import pytest
import torch
from safetensors import SafetensorError

from dass.checkpoint import INDEX, WEIGHTS
from dass.errors import DassError
from dass.folders import is_saved
from dass.sparsity import read_masks
from dass.streaming import load_streamed
from tests.experiments.test_prune import command, records, run, setting  # noqa: F401  (a fixture)
from tests.models import tiny_model

GIVEN = ["model", "text.txt", "tokens.safetensors"]


@pytest.fixture(params=["a small disk", "a write that fails"])
def full(request, tmp_path, monkeypatch):
    """A folder on a file system of 64 KB; where that may not be mounted, and once anyhow, one that takes no bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = request.param == "a small disk" and subprocess.run(options, capture_output=True).returncode == 0
    if not mounted:
        sync = os.fsync

        def fsync(handle):
            if os.readlink(f"/proc/self/fd/{handle}").startswith(str(disk)):
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        monkeypatch.setattr(os, "fsync", fsync)
    yield disk
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk):
    """Leave no byte on a small disk."""
    with open(disk / "filled", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) and file.tell() < 2**17:
                pass
        except OSError:
            pass


def told(caught, *names):
    """Whether an error is one sentence of a full disk, with the place."""
    text = str(caught.value)
    assert "No space left on device" in text and len(text.splitlines()) == 1 and all(name in text for name in names)


@pytest.mark.parametrize("what", ["save_model", "masks"])
def test_a_full_disk_costs_what_was_to_be_written_there_and_nothing_else(setting, tmp_path, full, what):  # noqa: F811
    if what == "masks":
        fill(full)
    other = {"save_model": "masks", "masks": "save_model"}[what]
    with pytest.raises(DassError) as caught:
        run(*setting, f"{what}={full / 'out'}", f"{other}={tmp_path / 'out'}")
    told(caught, str(full))
    left = [path for path in full.rglob("*") if path.is_file() and path.name != "filled"]
    assert left == [] and not list(full.rglob(".*"))
    (record,) = records(tmp_path)
    (why,) = record["failed"].values()
    assert "No space left" in why and len(record["windows"]) == 10
    assert read_masks(tmp_path / "out") if other == "masks" else is_saved(tmp_path / "out", record["id"])


def test_a_disk_that_is_too_full_for_the_record_keeps_the_model(setting, tmp_path, full):  # noqa: F811
    fill(full)
    with pytest.raises(DassError) as caught:
        run(*setting, f"results_dir={full / 'runs'}", f"save_model={tmp_path / 'out'}")
    told(caught, str(full / "runs"), ".json")
    assert (tmp_path / "out" / WEIGHTS).is_file() and not list(full.rglob("*.json"))


def test_a_disk_that_is_too_full_for_streamed_blocks(setting, tmp_path, full):  # noqa: F811
    with pytest.raises(DassError) as caught:
        run(*setting, "memory=stream", f"results_dir={full / 'runs'}")
    told(caught, str(full / "runs"), ".safetensors")
    assert not [path for path in full.rglob("*") if path.is_file()]


def test_a_read_only_folder_is_told_before_the_work(setting, tmp_path, monkeypatch):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    mounted = subprocess.run(options, capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:  # who may all, and yet not mount

        def refuse(**_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    elif not mounted:
        disk.chmod(0o500)
    try:
        for what in ("results_dir", "save_model", "masks"):
            with pytest.raises(DassError, match=rf"Nothing can be written to {disk}.* choose another folder") as caught:
                run(*setting, f"{what}={disk / 'out'}")
            assert len(str(caught.value).splitlines()) == 1
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert sorted(os.listdir(tmp_path)) == ["disk", *GIVEN]


@pytest.mark.parametrize("what", ["results_dir", "save_model", "masks"])
def test_a_link_to_nothing_is_told_before_the_work(setting, tmp_path, what):  # noqa: F811
    """As an unmounted disk leaves it."""
    (tmp_path / "link").symlink_to(tmp_path / "away" / "runs")
    with pytest.raises(DassError, match=str(tmp_path / "link")) as caught:
        run(*setting, f"{what}={tmp_path / 'link'}")
    assert "another folder" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == sorted(["link", *GIVEN])


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["safetensors", "system"],
)
def test_a_disk_that_is_too_full_for_experts_is_not_the_models_fault(tmp_path, monkeypatch, error):
    """transformers writes those there that it stores otherwise than it holds them."""
    tiny_model("mixtral").save_pretrained(tmp_path / "model")

    def save_file(*_, **__):
        raise error

    monkeypatch.setattr("dass.streaming.found_apart", lambda *_, **__: {})  # as if put together in a way of their own
    monkeypatch.setattr("transformers.integrations.accelerate.save_file", save_file)
    with pytest.raises(DassError) as caught:
        load_streamed(str(tmp_path / "model"), None, "float32", torch.device("cpu"), tmp_path / "scratch")
    told(caught, f"Cannot write weights to {tmp_path / 'scratch'}", "choose another results_dir")


# models


def of_another_config(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    return "mlp.down_proj.weight as (32, 64) where its config.json says (32, 48)"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def unreadable(folder, monkeypatch):
    allowed, shut = os.access, str(shards(folder)[1])
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != shut and allowed(path, mode))  # root may all
    return f"{shards(folder)[1].name} may not be read"


def truncated(folder, monkeypatch):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def emptied(folder, monkeypatch):
    shards(folder)[1].write_bytes(b"")
    return shards(folder)[1].name


def not_in_the_index(folder, monkeypatch):
    index = json.loads((folder / INDEX).read_text())
    left_out = shards(folder)[1].name
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != left_out}
    (folder / INDEX).write_text(json.dumps(index))
    return f"The weights of {folder} lack model.layers"


def not_there(folder, monkeypatch):
    shards(folder)[1].unlink()
    return "which its index names"


def without_weights(folder, monkeypatch):
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    return f"The model folder {folder} holds no weights"


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize(
    "damage", [unreadable, truncated, emptied, not_in_the_index, not_there, without_weights, of_another_config]
)
def test_a_model_that_cannot_be_read_whole(setting, tmp_path, monkeypatch, damage, memory):  # noqa: F811
    folder = tmp_path / "model"
    (folder / WEIGHTS).unlink()
    tiny_model().save_pretrained(folder, max_shard_size="50KB")
    says = damage(folder, monkeypatch)
    with pytest.raises(DassError) as caught:
        run(*setting, f"memory={memory}", f"save_model={tmp_path / 'saved'}", f"masks={tmp_path / 'masks'}")
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == GIVEN


def test_a_shard_that_goes_bad_while_it_is_read(setting, tmp_path, monkeypatch):  # noqa: F811
    from dass import shards

    read = shards.safe_open

    def safe_open(path, framework):
        if framework == "pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, framework=framework)

    monkeypatch.setattr(shards, "safe_open", safe_open)
    with pytest.raises(DassError, match=rf"{WEIGHTS} cannot be read \(Input/output error\)"):
        run(*setting, "memory=stream", f"save_model={tmp_path / 'saved'}")
    assert sorted(os.listdir(tmp_path)) == GIVEN


@pytest.mark.slow
def test_the_exit_code_is_not_zero(setting, tmp_path):  # noqa: F811
    truncate = tmp_path / "model" / WEIGHTS
    truncate.write_bytes(truncate.read_bytes()[:-100])
    done = command(*setting, f"save_model={tmp_path / 'saved'}")
    assert done.returncode == 1 and WEIGHTS in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == GIVEN
