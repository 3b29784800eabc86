"""What the README promises, from its own code blocks."""

import linecache
import re
import tempfile
from pathlib import Path

import torch
import yaml
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from dass.data import sources
from dass.manifests import Manifest, PlannedRun, write_manifest
from dass.pruning import criteria, update
from experiments import prune as app
from experiments.app import CONF
from experiments.report import ReportConfig, report
from report import kinds
from tests.experiments.test_prune import records, setting  # noqa: F401  (a fixture)
from tests.models import random_tokens, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example(word):
    """The code block of the README that holds a word."""
    (block,) = [block for block in blocks("python") if word in block]
    return block


def in_file(code, module):
    """Run a block of the README as if it stood at the end of a module's file."""
    scope = dict(vars(module))
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(code)
    exec(compile(code, file.name, "exec"), scope)
    linecache.checkcache(file.name)
    return scope


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("prune", [*overrides, f"hydra.searchpath=[file://{tmp_path / 'conf'}]"])


def test_adding_a_criterion_is_one_function_and_one_file(setting, tmp_path, monkeypatch):  # noqa: F811
    config = blocks("yaml")[0]
    name = yaml.safe_load(config)["name"]
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / f"{name}.yaml").write_text(config)
    monkeypatch.setitem(criteria.CRITERIA, name, None)
    in_file(example("@criterion"), criteria)
    overrides = [o for o in setting if not o.startswith("evaluation.")]
    overrides += [f"method={name}", "method.power=3", "targets=all", "evaluation=none"]
    app.main(composed(tmp_path, *overrides))
    (record,) = records(tmp_path)
    assert record["config"]["method"] | {"power": 3} == record["config"]["method"]
    assert len(record["sparsity"]["projections"]) == 21 and record["sparsity"]["targeted"] == 0.5


def test_adding_an_update_is_one_function(setting, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(update.UPDATES, "rescaled", None)
    in_file(example("@update"), update)
    overrides = [o for o in setting if not o.startswith("evaluation.")]
    saved = tmp_path / "saved"
    app.main(composed(tmp_path, *overrides, "evaluation=none", "method.update=rescaled", f"save_model={saved}"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.layers[1].mlp.up_proj.weight
    pruned = AutoModelForCausalLM.from_pretrained(saved).model.layers[1].mlp.up_proj.weight
    assert (pruned == 0).float().mean() == 0.5
    torch.testing.assert_close(pruned.abs().sum(1), dense.abs().sum(1))


def test_adding_a_calibration_source_is_one_function_and_one_file(setting, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sources.SOURCES, "letters", None)
    in_file(example("@source"), sources)
    (tmp_path / "conf" / "calibration").mkdir(parents=True)
    config = (CONF / "calibration" / "text_file.yaml").read_text().replace("name: text_file", "name: letters")
    (tmp_path / "conf" / "calibration" / "letters.yaml").write_text(config)
    (tmp_path / "pages.txt").write_text("\f".join([(tmp_path / "text.txt").read_text()] * 3))
    overrides = [o for o in setting if not o.startswith(("calibration", "evaluation."))]
    overrides += ["calibration=letters", f"calibration.path={tmp_path / 'pages.txt'}", "evaluation=none"]
    app.main(composed(tmp_path, *overrides, "calibration.n_sequences=3", "calibration.seq_len=16"))
    (record,) = records(tmp_path)
    assert record["config"]["calibration"]["name"] == "letters" and record["sparsity"]["targeted"] == 0.5


def test_adding_a_kind_of_report_is_one_function(setting, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(kinds.KINDS, "counted", None)
    in_file(example("@kind"), kinds)
    overrides = [o for o in setting if not o.startswith("evaluation.")]
    app.main(composed(tmp_path, *overrides, "evaluation=none"))
    (record,) = records(tmp_path)
    runs = [PlannedRun(record["id"], record["config"], True, None)]
    path = write_manifest(tmp_path / "runs", Manifest("mine", None, None, "counted", [], runs))
    report(ReportConfig(manifest=str(path), output=str(tmp_path / "out")))
    assert "dass" in (tmp_path / "out" / "tables" / "mine.md").read_text()


def test_the_library_example_runs():
    model, another = tiny_model(), tiny_model()
    exec(example("prune_model"), {"model": model, "another_model": another, "input_ids": random_tokens()})
    for a, b in zip(model.parameters(), another.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_the_table_is_that_of_the_records():
    """Its numbers are those of results/tables, which `make tables` builds from the committed records."""
    shown = README.split("<!-- from results/tables/reproduce.md -->\n")[1].split("\n<!-- end -->")[0]
    built = (ROOT / "results" / "tables" / "reproduce.md").read_text()
    assert shown.splitlines() == [line for line in built.splitlines() if line.startswith("|")]
    assert len(shown.splitlines()) == 7


def test_every_option_and_target_that_is_named_exists():
    for group in ("model", "method", "update", "sparsity", "calibration", "evaluation"):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{group}=`"))
        for option in (path.stem for path in (CONF / group).glob("*.yaml")):
            assert f"`{option}`" in line, f"{group}={option} is missing in the README"
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z][a-z0-9-]+)`?", README)) <= targets | {"reproduce"}
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
