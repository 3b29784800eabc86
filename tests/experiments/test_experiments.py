"""The experiments of the paper: what each would run at both scales, its manifest, and what a failing run leaves."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import OmegaConf

from dass.errors import DassError
from dass.manifests import read_manifest
from dass.records import read_record
from dass.sparsity import read_masks
from experiments import prune
from experiments.app import CONF
from experiments.public import public
from experiments.resolve import check
from experiments.sweep import plan_sweep, write_sweep
from hydra_plugins.grids_sweeper import jobs_of
from report.grid import MISSING
from report.kinds import KINDS, Material
from report.reading import runs_of
from report.repair import UPDATES
from report.rows import COLUMNS
from tests.experiments.test_prune import ROOT, command, records, setting  # noqa: F401  (a fixture)
from tests.report.test_kinds import material

PAPER = {  # the paper's models, methods and settings, counted by hand
    "table1_perplexity": 6 * (1 + 4 * 3 + 4 * 2 * 3),
    "table_glu_variants": 3 * (1 + 4 * 2 + 4 * 2),
    "stability": 2 * 4,
    "table_repair": 2 * (1 + 6 * 5 * 2),
    "table_no_glu": 4 * (1 + 5 * 2 + 1),
    "table_activations": 3 * (1 + 4 * 2 + 1),
    "table_experts": 1 + 5 * 2 + 1,
    "table_hardware": 3 * (1 + 7 * 2 * 3 + 4),
    "table_scale": 3 * (1 + 6 * 2 + 3),
    "table_zero_shot": 6 * (1 + 4),
    "ablation_alpha": 2 * (1 + 3 + 5 * 3 + 6 * 2 * 2),
    "ablation_granularity": 2 * (1 + 3 * 2 * 2 + 3 * 2 * 2),
    "ablation_order": 2 * (1 + 2 * (4 * 3 + 3 * 8 + 3) + 4 * 2),
    "ablation_calibration": 2 * (1 + 2 * 4 * 3 + 2 * 3),
    "ablation_update": 2 * (1 + 4 * 2 * 2 + 4 * 2 * 2),
    "sparsity_curve": 2 * (1 + 4 * (8 + 5) + 4 * 5 * 2),
    "pruning_time": 3 * 4 * 2,
    "diagnostics": 4,
    "reproduce": 5,
}


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def sweep_of(name, scale):
    """The whole config of an experiment and its jobs, as Hydra's own sweeper launches them."""
    arguments = [f"experiment={name}", f"scale={scale}"]
    whole = compose("prune", arguments, return_hydra_config=True)
    launched = Plugins.instance().instantiate_sweeper(
        hydra_context=HydraContext(config_loader=None, callbacks=None), task_function=lambda _: None, config=whole
    )
    return whole, jobs_of(launched.grids, launched.scales[scale], arguments), arguments


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


def test_values_that_are_listed_are_chosen():
    grids = [
        {"method": "dense"},
        {"method": "wanda,dass", "sparsity": "2of4,4of8"},
        {"method": "dass", "sparsity": "2of4", "method.order": "random", "method.order_seed": "0,1"},
        {"method": "wanda,dass", "sparsity": "2of4", "update": "swap,mlp", "method.epochs": 1},
    ]

    def jobs(*arguments):
        return {" ".join(sorted(job)) for job in jobs_of(grids, [{}], list(arguments))}

    assert jobs("sparsity=2of4", "method=dense,dass", "method.order=random") == {
        "method.order=random method.order_seed=0 method=dass sparsity=2of4",
        "method.order=random method.order_seed=1 method=dass sparsity=2of4",
    }
    assert jobs("update=mlp", "method=wanda") == {"method.epochs=1 method=wanda sparsity=2of4 update=mlp"}
    assert jobs("sparsity=4of8") == {
        "method=dense sparsity=4of8",  # which has no pattern
        "method=wanda sparsity=4of8",
        "method=dass sparsity=4of8",
    }
    assert jobs("method=dense", "method.order=random") == set()  # which the sweeper refuses
    assert len(jobs("method=dass,wanda")) == len(jobs()) - 1
    assert len(jobs("method=ria")) == 7 and all("method=ria" in job for job in jobs("method=ria"))


def test_every_experiment_is_counted_here_and_has_a_target():
    assert set(PAPER) == {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.split("EXPERIMENTS := ")[1].split("\n\n")[0].replace("\\\n", " ").split("\n")[0].split()
    names = {"table1_perplexity" if target == "table1" else target.replace("-", "_") for target in targets}
    long = {"table_scale", "table_repair", "table_hardware", "stability"}
    assert names == set(PAPER) - {"reproduce"} - long  # the one is quick


@pytest.mark.parametrize("name", sorted(PAPER))
def test_an_experiment_at_both_scales(hydra, name):
    """The same methods; what differs comes with the scale: models, texts and numbers of tokens."""
    whole, jobs, _ = sweep_of(name, "paper")
    twice = 2 if name == "ablation_calibration" else 0  # the dense runs, whose calibration text is not read
    assert whole.report in KINDS and len(jobs) == PAPER[name] + twice
    sample = {methods_of(job): job for job in jobs[:: max(1, len(jobs) // 6)]}
    configs = {key: check(compose("prune", job)).composed for key, job in sample.items()}
    assert {config["calibration"]["name"] for config in configs.values()} <= {"c4", "wikitext2"}
    assert all(config["calibration"]["seq_len"] == 2048 for config in configs.values())
    assert all(config["model"]["hub_id"] and config["model"]["revision"] for config in configs.values())
    small = {methods_of(job): job for job in sweep_of(name, "small")[1]}
    assert small.keys() == {methods_of(job) for job in jobs}
    for key, config in configs.items():
        composed = check(compose("prune", small[key])).composed
        assert composed["method"] == config["method"] and not composed["model"]["hub_id"]


def methods_of(job):
    """What a job says of its method and pattern."""
    return tuple(sorted(one for one in job if one.startswith(("method", "sparsity", "update"))))


@pytest.mark.parametrize("name", ["reproduce", "ablation_granularity", "ablation_calibration", "diagnostics"])
def test_the_committed_manifest_is_the_experiment(hydra, tmp_path, name):
    """Its runs in the order of the sweep, with the identities that they have today, and each with its record."""
    whole, jobs, arguments = sweep_of(name, "small")
    planned = read_manifest(write_sweep(tmp_path, plan_sweep(whole, jobs, arguments)))
    committed = read_manifest(ROOT / "results" / "runs" / "manifests" / f"{name}-small.json")
    assert (planned.name, planned.report, planned.command) == (committed.name, committed.report, committed.command)
    assert planned.runs == committed.runs
    for run in committed.runs:
        assert read_record(ROOT / "results" / "runs" / f"{run.fingerprint}.json")["config"]["method"] is not None


def test_a_sweep_of_ones_own_has_a_manifest_of_its_own(hydra):
    whole, jobs, arguments = sweep_of("reproduce", "small")
    assert plan_sweep(whole, jobs, arguments).name == "reproduce-small"
    assert plan_sweep(whole, jobs, [*arguments, "results_dir=x", "hydra.launcher.n_jobs=2"]).name == "reproduce-small"
    restricted = plan_sweep(whole, jobs, [*arguments, "method=wanda"]).name
    assert re.fullmatch(r"reproduce-small-[0-9a-f]{8}", restricted)
    assert plan_sweep(whole, jobs, [*arguments, "method=dass"]).name != restricted
    assert re.fullmatch(r"sweep-[0-9a-f]{8}", plan_sweep(whole, jobs, ["method=dass,wanda"]).name)
    whole.dry_run = True
    assert plan_sweep(whole, jobs, arguments) is None


def test_a_dry_run_prints_every_run_and_loads_nothing(tmp_path):
    settings = ["model=llama2_70b", "sparsity=4of8", "dry_run=true", f"results_dir={tmp_path}", "device=cpu"]
    done = command("experiment=table1_perplexity", "scale=paper", *settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"[0-9a-f]{16} ", line)]
    assert len(lines) == 1 + 4 + 4 * 3
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert sum("meta-llama/Llama-2-70b-hf @ 3aba440b" in line for line in lines) == 1 + 4 + 4 * 3
    assert any(
        "llama2_70b dass 4:8: update none, alpha=0.5; model" in line and "128 x 2048 tokens" in line for line in lines
    )
    assert list(tmp_path.iterdir()) == []


def test_runs_without_a_setting_that_is_given_are_left_out(tmp_path):
    given = ["experiment=ablation_update", "sparsity=2of4", "dry_run=true", f"results_dir={tmp_path}", "device=cpu"]
    done = command(*given, "method=dense,dass", "method.update=swap", "method.order=matched")
    assert done.returncode == 0 and "runs of the experiment are left out, which have no such setting: method=dense" in (
        done.stderr
    )
    lines = [line for line in done.stdout.splitlines() if re.match(r"[0-9a-f]{16} ", line)]
    assert lines and all("dass 2:4 matched: update swap, " in line for line in lines)
    nowhere = ["model=qwen25_coder_05b", "sparsity=4of8", "method=wanda"]
    done = command("experiment=ablation_order", *nowhere, "dry_run=true", "device=cpu")
    assert done.returncode == 1 and "error: No run of the experiment has all of" in done.stderr


def test_a_failing_run_of_a_sweep_is_told_in_its_manifest(setting, tmp_path):  # noqa: F811
    shutil.copytree(tmp_path / "model", tmp_path / "broken")
    next((tmp_path / "broken").glob("*.safetensors")).write_bytes(b"no weights")
    rest = [o for o in setting if not o.startswith("model.path=")]
    sweep = [f"model.path={tmp_path}/broken,{tmp_path}/model", "method=dense,wanda"]
    done = command("-m", *rest, *sweep, f"save_model={tmp_path}/saved")
    assert done.returncode == 1
    assert "2 of 4 runs failed:" in done.stderr and done.stderr.count(f"model.path={tmp_path}/broken") >= 2
    assert "Traceback" not in done.stderr
    ids = {record["id"] for record in records(tmp_path)}
    assert len(ids) == 2
    assert {path.name for path in (tmp_path / "saved").iterdir()} == ids  # a folder for each run, none overwritten
    (path,) = (tmp_path / "runs" / "manifests").iterdir()
    assert f"experiments.report manifest={path}" in done.stdout
    manifest = read_manifest(path)
    assert {run.fingerprint for run in manifest.runs if run.why is None} == ids
    assert [run.why for run in manifest.runs if run.why] == [
        run.why for run in manifest.runs if "broken" in str(run.config["model"]["path"])
    ]
    report = [sys.executable, "-m", "experiments.report", f"manifest={path}", f"records={tmp_path}/runs"]
    done = subprocess.run([*report, f"output={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Cannot load" in next((tmp_path / "out" / "tables").glob("*.md")).read_text()

    shutil.copytree(tmp_path / "model", tmp_path / "broken", dirs_exist_ok=True)
    assert command("-m", *rest, *sweep).returncode == 0
    assert len(records(tmp_path)) == 2  # with the same contents it is the same model, whose records are there
    assert all(run.why is None for run in read_manifest(path).runs)


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
    assert set(measured["errors"]) == {"magnitude", "wanda", "sparsegpt", "dass", "dass alpha=1.0"}
    assert all(len(values) == 3 for values in measured["errors"]["dass"].values())  # blocks
    assert set(measured["errors"]["dass"]) == {"gate", "up", "down", "mlp"}
    assert runs_of([record])  # it is sound
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
def test_comparisons_that_mean_nothing_are_refused(setting, hydra, overrides, message):  # noqa: F811
    others = [o for o in setting if not o.startswith("evaluation.")]
    with pytest.raises(DassError, match=message):
        check(compose("prune", [*others, *overrides]))


def test_the_composed_config_is_what_a_record_holds(setting, hydra, tmp_path):  # noqa: F811
    config = compose("prune", [*setting, "method=magnitude"])
    prune.main(config)
    (record,) = records(tmp_path)
    resolved = record["config"].pop("resolved")
    expected = public(OmegaConf.to_container(config, resolve=True))
    expected["evaluation"]["bos"] = "tokenizer"  # nobody said it: what it was found to be
    assert record["config"] == expected and resolved["dtype"] == "float32"


def test_the_repairs_of_an_experiment(hydra, setting, tmp_path):  # noqa: F811
    """Its own runs of one method on a tiny model: what each repair may change, what it must not, and the table."""
    _, jobs, _ = sweep_of("table_repair", "small")
    jobs = [[one for one in job if not one.startswith("model=")] for job in jobs]
    jobs = [job for job in jobs if {"method=wanda", "sparsity=2of4"} <= set(job)][::3]  # there are three models
    sizes, keep = ["calibration.n_sequences=null", "evaluation.n_windows=null"], {}
    for job in jobs:
        folder = tmp_path / "masks" / str(len(keep))
        config = compose("prune", [*job, *setting, *sizes, f"masks={folder}"])
        prune.main(config)
        keep[config.method["update"]] = read_masks(folder)[0]["model.layers.0.mlp.up_proj"].keep
    found = {one["config"]["method"]["update"]: one for one in records(tmp_path)}
    assert found.keys() == keep.keys() == set(UPDATES)
    for update, record in found.items():
        assert record["sparsity"]["targeted"] == 0.5 and runs_of([record])
        facts = record["sparsity"]["projections"].values()
        assert all(("damping" in one) == (update in ("obs", "swap_obs")) for one in facts)
        assert all(("mlp_error_after" in one) == (update == "mlp") for one in facts)
        assert all(one["mlp_error_after"] < one["mlp_error_before"] for one in facts if update == "mlp")
    assert len({tuple(record["windows"]) for record in found.values()}) == len(UPDATES)  # each does something
    same = [("none", "obs"), ("none", "mlp"), ("swap", "swap_obs"), ("none", "swap")]
    assert [torch.equal(keep[one], keep[other]) for one, other in same] == [True, True, True, False]
    table = KINDS["repair"](material(*records(tmp_path))).grids[0].frame
    assert list(table.Method) == ["wanda"] and not (table == MISSING).any(axis=None)


def test_the_price_of_compliance_from_runs_to_the_table(setting, hydra, tmp_path):  # noqa: F811
    """On a tiny model: what complies is told so, and the hybrid has Wanda's numbers."""
    names = ("wanda", "dass", "dass_hybrid", "dass_transposable")
    for name in names:
        prune.main(compose("prune", [*setting, f"method={name}", "method.order=matched", "method.update=obs"]))
    report = KINDS["hardware"](Material(runs_of(records(tmp_path)), pd.DataFrame(columns=COLUMNS)))
    (grid,) = report.grids
    rows = grid.frame.set_index("Method")
    status = {name: rows["Status"][name] for name in names}
    assert status == dict.fromkeys(names, "gate, up, down: accelerated") | {
        "dass": "gate, up: not K-aligned; down: accelerated"
    }
    assert rows["Helps"]["dass_transposable"] == "forward and backward (dX = dY W)"
    bounds = ["Prefill, at most", "Decode, at most"]
    assert list(rows.loc["dass"][bounds]) < list(rows.loc["wanda"][bounds])
    assert rows["Perplexity"]["dass_hybrid"] == rows["Perplexity"]["wanda"] != rows["Perplexity"]["dass"]
