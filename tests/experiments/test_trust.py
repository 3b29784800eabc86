"""What a run leaves tells nobody's secrets: with fakes in the environment and in git's settings."""

import getpass
import json
import platform
import subprocess
import sys

import pytest

from dass.data import sources
from dass.errors import DassError
from experiments import outputs, prune
from experiments.private import private_in
from tests.experiments.test_prune import records, run, setting  # noqa: F401  (a fixture)

TOKEN, KEY, USER = "hf_abcdefghijklmnopqrst", "0123456789abcdef0123456789abcdef01234567", "alicefake"
MAIL = "alice@secret.example"


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A user with a home, tokens and a git that knows who they are; what nothing may tell."""
    git = tmp_path / "gitconfig"
    remote = f"https://{USER}:{TOKEN}@git.secret.example/"
    git.write_text(f'[user]\n\tname = {USER}\n\temail = {MAIL}\n[url "{remote}"]\n\tinsteadOf = https://\n')
    names = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": KEY}
    names |= {"WANDB_EMAIL": MAIL, "WANDB_USERNAME": USER, "USER": USER, "LOGNAME": USER, "HOME": str(tmp_path)}
    names |= {"GIT_CONFIG_GLOBAL": str(git), "GIT_AUTHOR_EMAIL": MAIL, "EMAIL": MAIL, "WANDB_SILENT": "true"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert subprocess.run(["git", "config", "user.email"], capture_output=True, text=True).stdout.strip()
    assert getpass.getuser() == USER
    return [TOKEN, KEY, USER, MAIL, "secret.example", str(tmp_path), str(sys.prefix)]


def test_nothing_that_a_run_leaves_tells_whose_it_is(setting, tmp_path, monkeypatch, fakes):  # noqa: F811
    given = [one for one in setting if not one.startswith("tracking")]
    out = tmp_path / "out"
    folders = [f"save_model={out / 'model'}", f"masks={out / 'masks'}", f"tracking.folder={out}"]
    monkeypatch.setattr(prune, "command_of", lambda: " ".join(map(outputs.public_override, [*given, *folders])))
    run(*given, *folders)
    (record,) = records(tmp_path)
    assert private_in(record) == [] and "save_model=…/model" in record["command"]
    (offline,) = (out / "wandb").glob("offline-run-*")
    assert record["id"].encode() in next(offline.glob("*.wandb")).read_bytes()
    written = [path for path in [*(tmp_path / "runs").rglob("*"), *out.rglob("*")] if path.is_file()]
    assert {".wandb", ".json", ".md", ".safetensors"} <= {path.suffix for path in written}
    for path in written:
        content = path.read_bytes()
        told = [fake for fake in fakes if fake.encode() in content]
        assert not told, (path.name, told)
        if path.suffix == ".wandb" and len(platform.node()) > 3:
            assert platform.node().encode() not in content


def test_the_reason_of_a_failure_tells_no_secret(setting, tmp_path, monkeypatch, fakes):  # noqa: F811
    def refuse(*_, **__):
        raise DassError(f"No route to https://{USER}:{TOKEN}@host/x?sig={KEY} for {tmp_path}/mine or s3://{KEY}@lab/x.")

    monkeypatch.setattr(outputs, "save_model", refuse)
    with pytest.raises(DassError):
        run(*setting, "save_model=" + str(tmp_path / "saved"))
    (record,) = records(tmp_path)
    assert "No route to https://host/x" in record["failed"]["save"]
    assert not [fake for fake in fakes if fake in json.dumps(record)]


def test_files_of_data_are_never_executed(tmp_path):
    """A pickle under the name of a file that is read is refused, and does nothing."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "tokens.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DassError, match="not a safetensors file"):
        sources.tokens_file(path)
    assert not (tmp_path / "executed").exists()
