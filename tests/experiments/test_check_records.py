"""Records of others: good ones pass and are reported, and each way to doctor one is told in its line."""

import copy
import math
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dass.fingerprint import Fingerprint
from dass.manifests import read_manifest, write_manifest
from dass.records import read_record, write_record
from experiments.app import CONF
from experiments.check_records import PUBLISHED, check_folder, faults_of, main
from experiments.resolve import check
from report.rows import read_published
from report.runs import Pattern
from tests.experiments import test_prune
from tests.experiments.test_prune import ROOT, setting  # noqa: F401  (a fixture)
from tests.experiments.test_training import TRAINED

RUNS = ROOT / "results" / "runs"
MANIFEST = RUNS / "manifests" / "reproduce-small.json"
PLANNED = read_manifest(MANIFEST).runs
DASS = next(RUNS / f"{run.fingerprint}.json" for run in PLANNED if run.config["method"]["name"] == "dass")
Change = Callable[[dict[str, Any]], Any]


def place(record: dict[str, Any], where: str, value: Any) -> None:
    """Put a value at a place such as config.method.alpha."""
    *parts, last = where.split(".")
    for part in parts:
        record = record[int(part)] if isinstance(record, list) else record[part]
    record[last] = value


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the identity that its determinants have now."""
    found = Fingerprint(record["determinants"], record["identity"]["numerics"])
    return record | {"id": found.id, "identity": found.as_dict()}


def faults(folder: Path, record: dict[str, Any]) -> str:
    return "; ".join(faults_of(write_record(folder, record), read_published(PUBLISHED)))


def paper(perplexity: float, *overrides: str) -> dict[str, Any]:
    """A record as a GPU would leave it, of windows with this perplexity."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("prune", ["calibration=c4", "evaluation=wikitext2", "model.dtype=float16", *overrides])
    plan = check(config).pinned()
    record = copy.deepcopy(read_record(DASS)) | {"determinants": plan.fingerprint.parts}
    composed = OmegaConf.to_container(config, resolve=True)
    record["config"] = composed | {"resolved": {"dtype": plan.dtype, "batch_size": 1}}
    for projection in record["sparsity"]["projections"].values() if plan.pruners else ():
        axis = next(iter(plan.pruners.values())).method.axis_for(projection["role"])
        projection["axis"] = "in" if axis == "layer" and composed["sparsity"]["n"] else axis
        projection["pattern"] = str(Pattern.of(**{key: composed["sparsity"][key] for key in ("ratio", "n", "m")}))
    losses = np.log(perplexity) + 0.1 * np.cos(np.arange(40))
    losses += np.log(perplexity) - losses.mean()
    length = plan.config.evaluation.seq_len
    stderr = perplexity * losses.std(ddof=1) / 40**0.5
    metric = {"dataset": "wikitext2", "metric": "perplexity", "value": perplexity, "stderr": stderr, "n": 40}
    record |= {"metrics": [metric | {"seq_len": length, "tokens": 40 * length}], "windows": losses.tolist()}
    if "method=dense" in overrides:
        record["sparsity"] |= {"projections": {}, "targeted": 0.0}
        record["stages"] = {name: record["stages"][name] for name in ("load", "evaluation")}
    return sealed(record)


@pytest.mark.parametrize("name", ["reproduce", "diagnostics", "table_zero_shot"])
def test_what_is_committed_is_good(name: str) -> None:
    for run in read_manifest(MANIFEST.with_name(f"{name}-small.json")).runs:
        assert faults_of(RUNS / f"{run.fingerprint}.json", read_published(PUBLISHED)) == []


@pytest.mark.parametrize(
    "given", [["method=dense"], ["method=sparsegpt"], TRAINED, ["method=compare", "evaluation=none"]]
)
def test_what_a_run_leaves_today_is_good(setting: list[str], tmp_path: Path, given: list[str]) -> None:  # noqa: F811
    test_prune.run(*setting, *given)
    (record,) = test_prune.records(tmp_path)
    record["machine"]["processes"] = 2  # as several leave it
    assert faults(tmp_path / "checked", record) == ""


@pytest.mark.slow
def test_all_that_is_committed_is_good() -> None:
    assert check_folder(RUNS)


def test_a_good_folder_is_told_line_by_line_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    (folder / "manifests").mkdir(parents=True)
    for file in (MANIFEST, *(RUNS / f"{run.fingerprint}.json" for run in PLANNED)):
        shutil.copy(file, folder / file.relative_to(RUNS))
    main([str(folder)])
    assert {f"{run.fingerprint}: ok" for run in PLANNED} <= set(capsys.readouterr().out.splitlines())
    table = (tmp_path / "tables" / "reproduce.md").read_text()
    assert table == (ROOT / "results" / "tables" / "reproduce.md").read_text()


def test_a_bad_folder_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_record(DASS)
    record["metrics"][0]["value"] *= 0.9
    write_record(tmp_path / "runs", record)
    (tmp_path / "runs" / "foreign.json").write_text("[]")
    manifest = read_manifest(MANIFEST)
    manifest.command.append("model.path=/home/alice/llama")
    write_manifest(tmp_path / "runs", manifest)
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "runs")])
    told, error = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in told.splitlines())
    assert exit.value.code == 1 and error.startswith("error: Not all of") and not (tmp_path / "tables").exists()
    assert set(lines) == {record["id"], "foreign", "manifests/reproduce-small"}
    assert "windows contradict its perplexity" in lines[record["id"]]
    assert "not a record" in lines["foreign"] and "command holds the path" in lines["manifests/reproduce-small"]


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("config.method.alpha", 1.0, "its method is not what its config"),
        ("config.method.axis.gate", "in", "its method is not what its config"),
        ("config.method.order", "spread", "its method is not what its config"),
        ("config.targets", "all", "its method is not what its config"),
        ("config.exclude", "layers.0", "its method is not what its config"),
        ("config.method.update", "none of these", "update"),
        ("config.method.frobnicate", 1, "its config means nothing here"),
        ("config.methods", "x", "its config means nothing here"),
        ("config.calibration.name", "packaged_wiki", "its calibration has name packaged_wiki, sha256"),
        ("config.calibration.join", False, "its calibration has join False by its config, but it ran with join True"),
        ("config.calibration.bos", "none", "its calibration has bos none"),
        ("config.evaluation.n_windows", None, "its evaluation has articles"),
        ("config.evaluation.field", "page", "its evaluation has field page"),
        ("config.evaluation.name", "none", "its evaluation has n_windows None, name None"),
        ("config.model.packaged", "gemma3_270m", "its model has packaged gemma3_270m"),
        ("config.model.dtype", "float16", "its model has dtype float16 by its config, but it ran with dtype float32"),
        ("config.model.name", "gemma3_270m", "called gemma3_270m, but is of"),
        ("determinants.method.parameters", {"alpha": 1.0}, "its identity is not that of its determinants"),
        ("determinants.calibration.seed", 1, "its identity is not that of its determinants"),
        ("windows", [3.0] * 24, "windows contradict its perplexity"),
        ("windows", [3.0], "numbers of windows"),
        ("metrics.0.dataset", "wikitext2", "its perplexity is of wikitext2, and its config names packaged_wiki"),
        ("versions.torch", "", "the version of torch is missing"),
        ("versions.torch", "unknown", "the version of torch is missing"),
        ("versions", {}, "the version of python is missing"),
        ("versions.owner", "x", "versions holds owner, which no record does"),
        ("git.commit", None, "the commit is missing"),
        ("git.commit", "main", "the commit is missing"),
        ("git", None, "it is not sound"),
        ("machine.hostname", "gpu-17", "machine holds hostname, which no record does"),
        ("owner", "x", "it holds owner, which no record does"),
        ("config.model.path", "/data/llama", "config.model.path holds the path"),
        ("config.masks", "~/masks", "config.masks holds the path"),
        ("config.masks", "a-/home/alice/masks", "config.masks holds the path"),
        ("config.tracking.group", "gpu17", "config.tracking.group holds the name"),
        ("failed.save", "no room on GPU17.cluster", "failed.save holds the address"),
        ("config.masks", "C:\\masks", "config.masks holds the path"),
        ("config.masks", "../../masks", "config.masks holds the path"),
        ("command", "python -m experiments.prune masks=/scratch/m", "command holds the path"),
        ("command", "ssh alice@gpu17", "command holds the e-mail address or login"),
        ("failed.save", "a.b+c@example.org wrote it", "failed.save holds the e-mail address"),
        ("failed.save", "HF_TOKEN=hello", "failed.save holds the token"),
        ("failed.save", "with hf_abcdefghijklmnop", "failed.save holds the token"),
        ("failed.save", "no route to 10.0.0.17", "failed.save holds the address"),
        ("failed.save", "no route to 10.0.0.17.", "failed.save holds the address"),
        ("failed.save", "no route to [2001:db8::8a2e:7334]:80", "failed.save holds the address"),
        ("failed.save", "no route to fe80::1%eth0", "failed.save holds the address"),
        ("failed.save", "no link on 00:1A:2b:3c:4d:5e", "failed.save holds the address"),
        ("failed.save", "no link on 00-1a-2b-3c-4d-5e", "failed.save holds the address"),
        ("failed.save", "AWS_ACCESS_KEY_ID=hello", "failed.save holds the token"),
        ("failed.save", "https://x.org/a?X-Amz-Signature=0123", "failed.save holds the token"),
        ("failed.save", "https://who:what@x.org/a", "failed.save holds the token"),
        ("config.masks", "s3://who:what@bucket/masks", "config.masks holds the token"),
        ("config.masks", "s3://bucket/masks", "config.masks holds the path"),
        ("config.masks", "gs://bucket/masks", "config.masks holds the path"),
        ("machine.platform", "Linux gpu17.cs.example.edu", "machine.platform holds the address"),
        ("config.tracking.username", "x", "config.tracking holds the name"),
        ("config.tracking./home/x", "y", "config.tracking holds the path"),
    ],
)
def test_a_doctored_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: Any, told: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: "gpu17.example")
    record = read_record(DASS)
    place(record, where, value)
    assert told in faults(tmp_path, record)


@pytest.mark.parametrize(("key", "value"), [("axis", "in"), ("pattern", "4:8"), ("order", "spread")])
def test_a_projection_of_another_method(tmp_path: Path, key: str, value: str) -> None:
    record = read_record(DASS)
    name = next(iter(record["sparsity"]["projections"]))
    record["sparsity"]["projections"][name][key] = value
    told = faults(tmp_path, record)
    assert f"{name} has {key} {value}, and its method" in told or (key == "pattern" and "contradict" in told)


def test_some_of_the_windows_and_a_stage_that_is_lacking(tmp_path: Path) -> None:
    record = read_record(DASS)
    del record["stages"]["evaluation"]
    assert "windows without the stage evaluation" in faults(tmp_path, record)
    record = read_record(DASS)
    kept = record["windows"][::2]
    record["windows"] = kept
    (metric,) = record["metrics"]
    metric["value"] = float(np.exp(np.mean(kept)))
    metric["stderr"] = metric["value"] * float(np.std(kept, ddof=1)) / len(kept) ** 0.5
    metric["n"] = metric["windows"] = len(kept)
    metric["tokens"] = len(kept) * metric["seq_len"]
    record["metrics"] = [{key: value for key, value in metric.items() if key in read_record(DASS)["metrics"][0]}]
    assert f"it has {len(kept)} windows, and its config asks for" in faults(tmp_path, record)


def test_numbers_of_another_core(tmp_path: Path) -> None:
    record = read_record(DASS)
    record["identity"]["numerics"] += 1
    assert "numerics 2, and this version of 1" in faults(tmp_path, sealed(record))


def test_contents_that_are_not_those_of_the_name(tmp_path: Path) -> None:
    record = read_record(DASS)
    record["determinants"]["model"]["sha256"] = "0" * 64
    assert "its model has sha256 b179" in faults(tmp_path, sealed(record))


def test_an_equation_that_is_another_here(tmp_path: Path) -> None:
    record = read_record(DASS)
    record["determinants"]["method"]["code"]["dass"] = "0" * 16
    assert faults(tmp_path, sealed(record)).startswith("its method is not what its config and the equations")


def test_determinants_that_are_not_whole(tmp_path: Path) -> None:
    record = read_record(DASS)
    del record["determinants"]["evaluation"]
    assert "determinants are not whole" in faults(tmp_path, record)


LENGTH = "evaluation.seq_len=4096"


@pytest.mark.parametrize(
    ("perplexity", "overrides", "told"),
    [
        (5.47, ["method=dense"], ""),
        (5.57, ["method=dense"], ""),
        (5.60, ["method=dense"], "perplexity 5.60 is more than 2% off the published 5.47"),
        (5.47, ["method=dense", LENGTH], "more than 2% off the published 5.12"),
        (5.12, ["method=dense", LENGTH], ""),
        (9.00, ["method=dense", "evaluation.seq_len=1024"], ""),  # nothing is published at this length
        (9.00, ["method=dense", "evaluation.n_windows=40"], ""),  # nor for a part of the text
        (8.50, ["method=wanda", "sparsity=2of4", LENGTH], ""),
        (11.10, ["method=wanda", "sparsity=2of4", LENGTH], ""),
        (11.20, ["method=wanda", "sparsity=2of4", LENGTH], "outside of the published band, 5.12 (dense) to 11.15"),
        (5.00, ["method=sparsegpt", "sparsity=2of4", LENGTH], "the published band, 5.12 (dense) to 10.17"),
        (11.20, ["method=wanda", "sparsity=2of4"], ""),
        (5.10, ["method=wanda", "sparsity=unstructured", "sparsity.ratio=0.5", LENGTH], "5.12 (dense) to 6.42"),
        (20.0, ["method=dass", "sparsity=2of4", LENGTH], ""),  # of which nothing is published: by the worst other
        (60.0, ["method=dass", "sparsity=2of4", LENGTH], "the published band, 5.12 (dense) to 54.59"),
        (60.0, ["method=dass", "sparsity=2of4", LENGTH, "method.alpha=0"], ""),
        (5.00, ["method=ria", "sparsity=2of4", LENGTH], "5.00 is below the published dense value, 5.12"),
        (20.0, ["method=wanda", "sparsity=2of4", LENGTH, "method.update=obs"], ""),
        (20.0, ["method=wanda", "sparsity=2of4", LENGTH, "targets=all"], ""),
    ],
)
def test_beside_published_numbers(tmp_path: Path, perplexity: float, overrides: list[str], told: str) -> None:
    found = faults(tmp_path, paper(perplexity, "model=llama2_7b", *overrides))
    assert told in found if told else found == ""


def test_fewer_windows_than_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hub's text has no known number of windows, but all runs of it have the same."""
    records = [paper(5.47, "model=llama2_7b", f"method={method}") for method in ("dense", "wanda", "dass")]
    short = records[2]
    losses = short["windows"] = short["windows"][:30]
    value = math.exp(np.mean(losses))
    stderr = value * np.std(losses, ddof=1) / 30**0.5
    short["metrics"][0] |= {"value": value, "stderr": stderr, "n": 30, "tokens": 30 * short["metrics"][0]["seq_len"]}
    for record in records:
        write_record(tmp_path, record)
    assert not check_folder(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(": ok") for line in lines) == 2
    assert f"{short['id']}: it has more or fewer windows or items than most of its model and evaluation" in lines


def test_the_command_wants_a_folder_with_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (([], "Give one folder"), ([str(tmp_path)], "No records in")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert told in capsys.readouterr().err
