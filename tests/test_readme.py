"""What the README promises, from its own code blocks."""

import re
from pathlib import Path

import torch
import yaml
from hydra import compose, initialize_config_dir

from dass.pruning import criteria
from experiments import prune as app
from experiments.app import CONF
from tests.experiments.test_prune import records, setting  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_adding_a_method_is_one_function_and_one_file(setting, tmp_path, monkeypatch):  # noqa: F811
    """The function goes to the end of criteria.py, here run in its namespace; the file into a folder beside conf."""
    function = next(block for block in blocks("python") if "@criterion" in block)
    config = blocks("yaml")[0]
    name = yaml.safe_load(config)["name"]
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / f"{name}.yaml").write_text(config)
    monkeypatch.setattr(criteria, "CRITERIA", criteria.CRITERIA | {})
    exec(function, vars(criteria) | {})
    overrides = [*setting, f"method={name}", "method.power=3", "targets=all", "evaluation=none"]
    overrides = [o for o in overrides if not o.startswith("evaluation.")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        app.main(compose("prune", [*overrides, f"hydra.searchpath=[file://{tmp_path / 'conf'}]"]))
    (record,) = records(tmp_path)
    assert record["config"]["method"] | {"power": 3} == record["config"]["method"]
    assert len(record["sparsity"]["projections"]) == 21 and record["sparsity"]["targeted"] == 0.5


def test_the_library_example_runs(tmp_path):
    from dass.sparsity import PackedMasks
    from tests.models import random_tokens, tiny_model

    example = next(block for block in blocks("python") if "prune_model" in block)
    model, another = tiny_model(), tiny_model()
    packed = PackedMasks()
    script = example.replace("prune_model(model, BlockPruner(dass), input_ids)", "{PRUNE}")
    assert "{PRUNE}" in script
    prune = (
        "prune_model(model, BlockPruner(dass), input_ids, on_block=lambda finished:"
        "[packed.add(p.projection.name, p.mask) for p in finished.pruned]); packed.write(folder, {'id': 'x'})"
    )
    script = script.replace("{PRUNE}", prune)
    exec(
        script,
        {"model": model, "another_model": another, "input_ids": random_tokens(), "folder": tmp_path, "packed": packed},
    )
    for a, b in zip(model.parameters(), another.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_table_is_that_of_the_records():
    """Its numbers are those of results/tables, which `make tables` builds from the committed records."""
    shown = README.split("<!-- from results/tables/reproduce.md -->\n")[1].split("\n<!-- end -->")[0]
    built = (ROOT / "results" / "tables" / "reproduce.md").read_text()
    assert shown.splitlines() == [line for line in built.splitlines() if line.startswith("|")]
    assert len(shown.splitlines()) == 7


def test_every_option_and_target_that_is_named_exists():
    for group in ("model", "method", "sparsity", "calibration", "evaluation"):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{group}=`"))
        for option in (path.stem for path in (CONF / group).glob("*.yaml")):
            assert f"`{option}`" in line, f"{group}={option} is missing in the README"
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z][a-z0-9-]+)`?", README)) <= targets | {"reproduce"}
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
