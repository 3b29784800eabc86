"""The experiments of the paper: what each would run at both scales, what a failing run leaves, what the report says."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import OmegaConf

from dass.errors import DassError
from dass.records import read_failures, write_failure, write_record
from experiments import prune
from experiments.app import CONF
from experiments.experiment import experiment_names, load_experiment
from experiments.identity import design_of, design_of_record
from experiments.report import report
from hydra_plugins.grids_sweeper import jobs_of
from report.kinds import KINDS
from tests.experiments.test_prune import ROOT, records, setting  # noqa: F401  (a fixture)
from tests.report.records import losses, make_record

PAPER = {  # the paper's models, methods and settings, counted by hand
    "table1_perplexity": 6 * (1 + 4 * 3),
    "table_glu_variants": 3 * (1 + 4 * 2),
    "table_zero_shot": 6 * (1 + 4),
    "ablation_alpha": 2 * (1 + 3 + 5 * 3),
    "ablation_granularity": 2 * (1 + 3 * 2 * 2),
    "ablation_calibration": 2 * (1 + 2 * 4 * 3 + 2 * 3),
    "ablation_update": 2 * (1 + 4 * 2 * 2),
    "sparsity_curve": 2 * (1 + 4 * (8 + 5)),
    "pruning_time": 3 * 4 * 2,
    "diagnostics": 4,
    "reproduce": 5,
}


loaded = functools.cache(lambda name, scale: load_experiment(name, scale, []))


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def test_a_grid_is_a_product_and_the_command_line_takes_its_place():
    grids = [{"method": "dense"}, {"method": "wanda,dass", "seed": "0,1"}]
    assert jobs_of(grids, [{"model": "a"}], ["seed=5"]) == [
        ["method=dense", "model=a", "seed=5"],
        ["method=wanda", "seed=5", "model=a"],
        ["method=dass", "seed=5", "model=a"],
    ]
    variants = [{"model": "a"}, {"model": "b", "seed": 7}]
    assert ["method=dass", "seed=7", "model=b"] in jobs_of(grids, variants, [])
    assert len(jobs_of(grids, variants, [])) == 2 + 4 + 2
    assert jobs_of([{}], [{}], ["method=wanda,dass"]) == [["method=wanda"], ["method=dass"]]


def test_every_experiment_is_counted_here():
    assert set(PAPER) == set(experiment_names())


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", sorted(PAPER))
def test_an_experiment_is_what_hydra_composes(hydra, name, scale):
    experiment = loaded(name, scale)
    assert experiment.kind in KINDS
    if scale == "paper":
        assert len(experiment.runs) == PAPER[name]
        assert {run.config["calibration"]["name"] for run in experiment.runs} <= {"c4", "wikitext2"}
        assert all(run.config["calibration"]["seq_len"] == 2048 for run in experiment.runs)
        assert all(run.config["model"]["hub_id"] for run in experiment.runs)
    else:
        assert not any(run.config["model"]["hub_id"] for run in experiment.runs)
    assert len({run.design for run in experiment.runs}) == len(experiment.runs)

    whole = compose("prune", [f"experiment={name}", f"scale={scale}"], return_hydra_config=True)
    sweeper = OmegaConf.to_container(whole.hydra.sweeper, resolve=True)
    jobs = jobs_of(sweeper["grids"], sweeper["scales"][scale], [f"experiment={name}", f"scale={scale}"])
    launched = Plugins.instance().instantiate_sweeper(  # what Hydra itself makes of the file
        hydra_context=HydraContext(config_loader=None, callbacks=None), task_function=lambda _: None, config=whole
    )
    assert jobs == jobs_of(launched.grids, launched.scales[scale], [f"experiment={name}", f"scale={scale}"])
    by_design = {run.design: run.config for run in experiment.runs}
    for job in jobs[:: max(1, len(jobs) // 2)]:
        hydras = compose("prune", job)
        assert OmegaConf.to_container(hydras, resolve=True) == by_design[design_of(OmegaConf.to_object(hydras))]
        if scale == "paper":
            hydras.device = "cpu"
            assert re.match(r"[0-9a-f]{16} \w+ \w+.*: model hub_id \S+/\S+ @ [0-9a-f]{40} in ", prune.dry_run(hydras))


def test_the_scales_of_an_experiment_differ_in_scale_only(hydra):
    """The same grids; what differs comes with the scale: models, texts and numbers of tokens."""
    for name in experiment_names():
        small, paper = (loaded(name, scale) for scale in ("small", "paper"))
        methods = [{json.dumps(run.config["method"]) for run in each.runs} for each in (small, paper)]
        assert methods[0] == methods[1], name


def test_a_dry_run_prints_every_run_and_loads_nothing(tmp_path):
    command = [sys.executable, "-m", "experiments.prune", "experiment=table1_perplexity", "scale=paper"]
    settings = ["model=llama2_70b,mistral_7b", "dry_run=true", f"results_dir={tmp_path}", "device=cpu"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"[0-9a-f]{16} ", line)]
    assert len(lines) == 2 * 13
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert sum("meta-llama/Llama-2-70b-hf" in line for line in lines) == 13
    assert any("llama2_70b dass 4:8: model" in line and "128 x 2048 tokens" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_recorded_and_the_others_go_on(setting, tmp_path):  # noqa: F811
    shutil.copytree(tmp_path / "model", tmp_path / "broken")
    next((tmp_path / "broken").glob("*.safetensors")).write_bytes(b"no weights")
    rest = [o for o in setting if not o.startswith("model.path=")]
    sweep = [f"model.path={tmp_path}/broken,{tmp_path}/model", "method=dense,wanda", "report=perplexity"]
    command = [sys.executable, "-m", "experiments.prune", "-m", *rest, *sweep]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "2 of 4 runs failed:" in done.stderr and done.stderr.count(f"model.path={tmp_path}/broken") >= 2
    assert "Traceback" not in done.stderr
    assert len(records(tmp_path)) == 2
    failures = read_failures(tmp_path / "runs")
    assert len(failures) == 2 and all("Cannot load" in why and "broken" in why for why in failures.values())

    shutil.copytree(tmp_path / "model", tmp_path / "broken", dirs_exist_ok=True)
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert len(records(tmp_path)) == 2  # with the same contents it is the same model, whose records are there
    assert read_failures(tmp_path / "runs") == {}


def make_report(tmp_path, hydra, name="table1_perplexity", **settings):
    overrides = [f"tables={name}", f"records={tmp_path}/runs", f"output={tmp_path}/out"]
    report(compose("report", [*overrides, *(f"{key}={value}" for key, value in settings.items())]))
    return (tmp_path / "out" / "tables" / f"{name}.md").read_text()


def record_of(run, values, run_id):
    """A record of a planned run, with the losses of its windows."""
    calibrates = ["calibration"] * run.calibrates
    record = make_record(run_id, run.config["method"]["name"], values)
    record["config"] = run.config | {"resolved": {"dtype": "float32"}}
    record["stages"] = {name: record["stages"]["load"] for name in ("load", "pruning", "evaluation", *calibrates)}
    record["metrics"][0] |= {"dataset": run.config["evaluation"]["name"], "seq_len": 512}
    return record


def test_a_missing_cell_is_shown_with_the_reason(tmp_path, hydra):
    runs = loaded("table1_perplexity", "small").runs
    label = {(r.config["model"]["name"], r.config["method"]["name"], r.config["sparsity"]["name"]): r for r in runs}
    wanda, dass = label["smollm2_135m", "wanda", "2of4"], label["smollm2_135m", "dass", "2of4"]
    gemma = label["gemma3_270m", "wanda", "2of4"]
    for run_id, run, values in (("a" * 16, wanda, losses(0.4, 0.02)), ("b" * 16, dass, losses(0.2, 0.03))):
        record = record_of(run, values, run_id)
        assert design_of_record(record) == run.design
        write_record(tmp_path / "runs", record)
    write_failure(tmp_path / "runs", {"design": gemma.design, "why": "Gemma is gated: log in.", "config": gemma.config})
    text = make_report(tmp_path, hydra)
    rows = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines() if line[:1] == "|"}
    assert f"{np.exp(losses(0.2, 0.03).mean()):.2f}" in rows["2:4", "dass"]
    assert rows["50%", "dass"].count("—") == 5
    assert "gemma3_270m" in text and "Gemma is gated: log in." in text and "not run yet" in text

    (tmp_path / "runs" / "corrupt.json").write_text("{")
    (tmp_path / "runs" / "foreign.json").write_text('{"id": "foreign"}')
    assert make_report(tmp_path, hydra) == text


def test_published_numbers_stand_beside_ours_and_say_whether_they_compare(tmp_path, hydra):
    runs = loaded("table1_perplexity", "paper").runs
    run = next(
        r
        for r in runs
        if (r.config["model"]["name"], r.config["method"]["name"], r.config["sparsity"]["name"])
        == ("llama2_7b", "wanda", "2of4")
    )
    dense = next(r for r in runs if (r.config["model"]["name"], r.config["method"]["name"]) == ("llama2_7b", "dense"))
    for index, each in enumerate((run, dense)):
        record = record_of(each, losses(0.1 * index), f"{index}" * 16)
        record["metrics"][0] |= {"seq_len": 4096 if each is dense else 2048}
        write_record(tmp_path / "runs", record)
    overrides = ["tables=table1_perplexity", "at_scale=paper", f"records={tmp_path}/runs", f"output={tmp_path}/out"]
    report(compose("report", [*overrides, f"published={ROOT}/results/published"]))
    text = (tmp_path / "out" / "tables" / "table1_perplexity_paper.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| llama2_7b")]
    wanda = [row for row in rows if row[1:3] == ["wanda", "2:4"]]
    assert {row[4] for row in wanda} == {"11.02", "11.15"}
    assert all(row[7] == "no: sequence length, targets" for row in wanda)
    at_4096 = [row for row in rows if row[1] == "dense" and row[4] == "5.12"]
    assert at_4096 and all(row[7] == "yes" for row in at_4096)
    assert all(row[3] == "—" for row in rows if row[1] == "sparsegpt")


def test_the_ten_experiments_have_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.split("EXPERIMENTS := ")[1].split("\n\n")[0].replace("\\\n", " ").split("\n")[0].split()
    names = {"table1_perplexity" if target == "table1" else target.replace("-", "_") for target in targets}
    assert names == set(PAPER) - {"reproduce"}


def test_evaluate_scores_a_saved_model_like_a_dense_run(setting, tmp_path):  # noqa: F811
    from experiments.evaluate import evaluate

    with initialize_config_dir(str(CONF), version_base="1.3"):
        prune.main(compose("prune", [*setting, "method=dass", f"save_model={tmp_path}/pruned"]))
        (pruned,) = records(tmp_path)
        others = [o for o in setting if not o.startswith(("model.path=", "results_dir="))]
        folder = Path(tmp_path) / "evaluated" / "runs"
        evaluate(compose("evaluate", [*others, f"model.path={tmp_path}/pruned", f"results_dir={folder}"]))
    (evaluated,) = records(tmp_path / "evaluated")
    assert evaluated["windows"] == pytest.approx(pruned["windows"], rel=1e-6)
    assert evaluated["config"]["method"]["name"] == "dense"


def test_methods_are_compared_and_the_model_stays_dense(setting, tmp_path):  # noqa: F811
    others = [o for o in setting if not o.startswith("evaluation")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        prune.main(compose("prune", [*others, "method=compare", "evaluation=none"]))
    (record,) = records(tmp_path)
    assert record["sparsity"]["targeted"] == 0 and record["sparsity"]["projections"] == {}
    measured = record["diagnostics"]
    assert set(measured["errors"]) == {"magnitude", "wanda", "sparsegpt", "dass"}
    assert all(len(values) == 3 for values in measured["errors"]["dass"].values())  # blocks
    assert measured["jaccard"]["wanda|dass"]["down"] == [1.0] * 3  # the same rule
    assert measured["errors"]["wanda"]["down"] == measured["errors"]["dass"]["down"]
    assert len(measured["norms"]["cv"]) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=compare"], "evaluation=none"),
        (["method=compare", "evaluation=none", "masks=m"], "only compared"),
        (["method=compare", "evaluation=none", "method.methods=[wanda]"], "at least two"),
        (["method=compare", "evaluation=none", "method.methods=[wanda,dense]"], "dense, which is no method"),
    ],
)
def test_comparisons_that_mean_nothing_are_refused(setting, overrides, message):  # noqa: F811
    from experiments.resolve import resolve

    others = [o for o in setting if not o.startswith("evaluation.")]
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(DassError, match=message):
        resolve(compose("prune", [*others, *overrides]))


def test_tables_and_figures_go_to_wandb_offline(tmp_path, hydra, monkeypatch):
    run = next(r for r in loaded("reproduce", "small").runs if r.config["method"]["name"] == "wanda")
    write_record(tmp_path / "runs", record_of(run, losses(0.4), "a" * 16))
    monkeypatch.chdir(tmp_path)
    logged = {}
    import wandb

    init = wandb.init

    def spy(**settings):
        run = init(**settings)
        logged["group"] = settings["group"]
        monkeypatch.setattr(run, "log", lambda values: logged.update(values))
        return run

    monkeypatch.setattr(wandb, "init", spy)
    make_report(tmp_path, hydra, "reproduce", log_to="wandb")
    assert logged["group"] == "reproduce" and isinstance(logged["reproduce_figure"], wandb.Image)
    table = logged["reproduce"]
    assert len(table.data) == 5 and "perplexity" in table.columns
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))


def test_a_wrong_experiment_is_one_sentence(tmp_path, hydra):
    with pytest.raises(DassError, match="There is no experiment tabel1: choose one of ablation_alpha"):
        make_report(tmp_path, hydra, "tabel1")
