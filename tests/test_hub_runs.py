"""Whole runs that read everything from the stand-in of the hub."""

import gzip
import json
import os
import re
import subprocess
import sys

import pandas
import pytest
import yaml

from dass.data.sources import find_source
from experiments import prune as app
from experiments.app import CONF
from tests.experiments.test_prune import ROOT, composed
from tests.hub_server import serving
from tests.models import random_tokens
from tests.test_hub import NEW, OLD, aim, go_offline, models, stand_in  # noqa: F401  (fixtures)
from tests.tokenizers import words

SMALL = ["calibration.n_sequences=4", "calibration.seq_len=24", "evaluation.seq_len=20", "tracking=none", "device=cpu"]


def add_texts(hub):
    """C4 and WikiText-2 in the hub's layout at the shipped commits."""
    rng = random_tokens(12, 60)
    for name, part in (("c4", "calibration"), ("wikitext2", "evaluation")):
        source = find_source(name, part)
        commit = yaml.safe_load((CONF / part / f"{name}.yaml").read_text())["revision"]
        texts = [words(ids) for ids in rng]
        shard = gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())
        body = shard if name == "c4" else pandas.DataFrame({"text": texts}).to_parquet()
        hub.add(source.repository, {source.files[part]: body}, commit, "dataset")


def add_shipped(hub, model, files):
    """A model under the name and at the commit of one of `conf/model`; returns both."""
    shipped = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    hub.add(shipped["hub_id"], files, shipped["revision"])
    return shipped["hub_id"], shipped["revision"]


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_the_main_table_at_paper_scale_and_its_report(tmp_path, models):  # noqa: F811
    with serving() as hub:
        add_texts(hub)
        pinned = dict(add_shipped(hub, *one) for one in (("llama2_7b", models["llama"]), ("gemma_7b", models["gemma"])))
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "", "OMP_NUM_THREADS": "1"}
        sweep = ["experiments.prune", "experiment=table1_perplexity", "scale=paper", "model=llama2_7b,gemma_7b"]
        sweep += ["sparsity=2of4", f"results_dir={tmp_path / 'runs'}", *SMALL]
        command(*sweep, **home)
    done = records(tmp_path / "runs")
    assert len(done) == 2 * (1 + 4 + 4 * 3)
    for record in done:
        assert record["determinants"]["model"]["revision"] == pinned[record["determinants"]["model"]["hub_id"]]
        assert "download" in record["stages"] and record["metrics"][0]["value"] > 1
    manifest = next((tmp_path / "runs" / "manifests").glob("*.json"))
    report = command("experiments.report", f"manifest={manifest}", f"output={tmp_path / 'report'}", **home)
    assert {"llama2_7b", "gemma_7b"} <= set(re.findall(r"\w+", report))


def command(*arguments, **variables):
    run = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_moved_branch_is_another_run(stand_in, models, monkeypatch, tmp_path, capsys):  # noqa: F811
    add_texts(stand_in)
    name, _ = add_shipped(stand_in, "llama2_7b", {})
    stand_in.add(name, models["llama"], OLD)
    setting = ["model=llama2_7b", "model.revision=main", "calibration=c4", "evaluation=wikitext2", *SMALL]
    setting += [f"results_dir={tmp_path / 'runs'}"]
    ids = [app.main(composed(*setting)), app.main(composed(*setting))]
    assert "already done" in capsys.readouterr().out
    config = json.loads(models["llama"]["config.json"]) | {"rms_norm_eps": 0.1}
    stand_in.add(name, models["llama"] | {"config.json": json.dumps(config).encode()}, NEW)
    ids.append(app.main(composed(*setting)))
    go_offline(monkeypatch)
    ids.append(app.main(composed(*setting, "rerun=true")))
    assert ids[0] == ids[1] != ids[2] == ids[3]
    found = {record["id"]: record for record in records(tmp_path / "runs")}
    assert [found[i]["determinants"]["model"]["revision"] for i in ids] == [OLD, OLD, NEW, NEW]
    assert found[ids[0]]["metrics"] != found[ids[2]]["metrics"]
    assert app.main(composed(*setting, f"model.revision={NEW}")) == ids[2]  # by its commit it is the same
    capsys.readouterr()
    app.main(composed(*setting, "model.revision=elsewhere", "dry_run=true"))
    assert re.match(r"\(identity not known yet: .*HF_HUB_OFFLINE.*llama2_7b", capsys.readouterr().out)


def test_the_models_errors_come_before_the_tokenizers_and_the_texts(stand_in, models, tmp_path):  # noqa: F811
    from dass.errors import DassError

    name, _ = add_shipped(stand_in, "mistral_7b", models["llama"])
    stand_in.gated = {name}
    with pytest.raises(DassError, match=f"the model {name} is gated"):
        app.main(composed("model=mistral_7b", "calibration=c4", *SMALL, f"results_dir={tmp_path / 'runs'}"))
