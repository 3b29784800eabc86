"""The Hydra app from end to end, on tiny models, on the command line, and once on the real SmolLM2."""

import importlib
import importlib.util
import json
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dass.errors import DassError
from dass.evaluation import door
from dass.folders import is_saved
from dass.pruning.criteria import CRITERIA, criterion
from dass.records import RECORD_KEYS
from dass.sparsity import apply_masks, read_masks
from experiments import fingerprint as identities
from experiments import loading, outputs, plan, train_tiny  # noqa: F401  (their typed configs)
from experiments import prune as app
from experiments.app import CONF
from experiments.methods import name_by_file
from experiments.resolve import check
from tests.models import VOCABULARY, image_model, random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer, words

ROOT = Path(__file__).parents[2]


def composed(*overrides, name="prune"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture
def setting(tmp_path):
    """A tiny model with its tokenizer, calibration tokens, a text to evaluate on, and the overrides that use them."""
    model, tokens, text = tmp_path / "model", tmp_path / "tokens.safetensors", tmp_path / "text.txt"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    save_file({"input_ids": random_tokens(6, 24)}, tokens)
    text.write_text(words(torch.randint(3, VOCABULARY, (200,), generator=torch.Generator().manual_seed(1))))
    return [
        "model=local",
        f"model.path={model}",
        "calibration=tokens_file",
        f"calibration.path={tokens}",
        "evaluation=text_file",
        f"evaluation.path={text}",
        "evaluation.seq_len=20",
        "tracking=none",
        f"results_dir={tmp_path / 'runs'}",
    ]


def run(*overrides):
    app.main(composed(*overrides))


def records(tmp_path):
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*.json"))]


@pytest.mark.parametrize("method", ["dense", "magnitude", "magnitude_released", "wanda", "sparsegpt", "dass"])
@pytest.mark.parametrize("sparsity", ["2of4", "4of8", "unstructured"])
def test_every_method_and_pattern(setting, tmp_path, method, sparsity):
    run(*setting, f"method={method}", f"sparsity={sparsity}")
    (record,) = records(tmp_path)
    assert (
        tuple(key for key in record if key not in ("calibration", "audit")) == RECORD_KEYS
        and record["failed"] == record["files"] == {}
    )
    assert record["sparsity"]["targeted"] == pytest.approx(0 if method == "dense" else 0.5)
    assert len(record["sparsity"]["projections"]) == {"dense": 0, "magnitude_released": 3}.get(method, 9)
    for facts in record["sparsity"]["projections"].values():
        assert facts["sparsity"] == pytest.approx(0.5)
        assert ("damping" in facts) == (method == "sparsegpt")
    (metric,) = record["metrics"]
    assert set(metric) >= {"dataset", "metric", "value", "stderr", "n", "seq_len"}
    assert (metric["metric"], metric["n"], metric["seq_len"], metric["tokens"]) == ("perplexity", 10, 20, 200)
    assert len(record["windows"]) == 10
    assert all(stage["seconds"] >= 0 and stage["peak_memory_gb"] > 0.1 for stage in record["stages"].values())
    assert ("pruning" in record["stages"]) == (method != "dense")
    assert ("calibration" in record["stages"]) == (method in ("wanda", "sparsegpt", "dass"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=dass", "method.axis.gate=in", "method.axis.up=in"],
        ["method=dass", "method.update=obs"],
        ["method=dass", "method.alpha=0"],
        ["method=wanda", "method.axis=out", "targets=all"],
        ["method=magnitude", "method.update=obs", "sparsity=unstructured", "sparsity.ratio=0.7"],
        ["method=sparsegpt", "method.update=none", "sparsity=nm", "sparsity.n=3", "sparsity.m=8"],
        ["method=sparsegpt", "method.axis=out", "sparsity=nm", "sparsity.n=1", "sparsity.m=2"],
        ["method=dass", "sparsity=nm", "sparsity.n=16", "sparsity.m=32"],
        ["method=dass", "targets=all", r"exclude='layers\.0\.|k_proj'"],
    ],
    ids=" ".join,
)
def test_values_are_set_freely(setting, tmp_path, overrides):
    run(*setting, *overrides, f"masks={tmp_path / 'masks'}")
    masks, provenance = read_masks(tmp_path / "masks")  # verifies each against its pattern and axis
    (record,) = records(tmp_path)
    assert provenance["id"] == record["id"]
    assert set(masks) == set(record["sparsity"]["projections"])


def test_magnitude_released_stays_down_only(setting, tmp_path):
    run(*setting, "method=magnitude_released", r"exclude='layers\.0\.'")
    (record,) = records(tmp_path)
    assert list(record["sparsity"]["projections"]) == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]


def test_what_experts_write_is_seen_for_the_same_sequences_whatever_the_batches(setting, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    for size in (1, 4, 6):  # of 6 sequences, two are looked at
        compare = ["method=compare", "method.methods=[wanda,dass]", "evaluation=none"]
        run(*setting, *compare, f"batch_size={size}", f"results_dir={tmp_path / str(size)}/runs")
    one, *others = [records(tmp_path / str(size))[0]["diagnostics"]["experts"] for size in (1, 4, 6)]
    assert len(one) == 6 and min(expert["tokens"] for expert in one) > 0
    for other in others:
        for mine, theirs in zip(one, other, strict=True):
            assert mine["errors"] == pytest.approx(theirs["errors"], rel=1e-4) and mine["tokens"] == theirs["tokens"]


def test_evaluation_none_needs_no_tokenizer(setting, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    saved = tmp_path / "saved"
    run(*[s for s in setting if not s.startswith("evaluation")], "evaluation=none", f"save_model={saved}")
    assert (AutoModelForCausalLM.from_pretrained(saved).model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    (record,) = records(tmp_path)
    assert record["metrics"] == record["windows"] == []


def test_a_saved_model_is_the_pruned_model(setting, tmp_path, capsys):
    target, masks = tmp_path / "saved", tmp_path / "masks"
    run(*setting, f"save_model={target}", f"masks={masks}")
    (record,) = records(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(target)
    weight = saved.model.layers[1].mlp.up_proj.weight
    kept = (weight.view(16, 4, 32) != 0).sum(1)
    assert (kept == 2).all()
    assert AutoTokenizer.from_pretrained(target)("w7").input_ids == [7]
    card = (target / "README.md").read_text()
    assert record["id"] in card and "dass, alpha=0.5" in card and "python -m experiments.prune" in card
    assert "perplexity" in card  # written once more after the evaluation
    assert is_saved(target, record["id"])
    assert set(record["files"]) == {"masks.safetensors", "model.safetensors"}
    dense = tiny_model()
    apply_masks(dense, read_masks(masks)[0])
    for a, b in zip(dense.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b)

    text = [s for s in setting if s.startswith(("evaluation", "tracking", "results_dir"))]
    run(*text, "model=local", f"model.path={target}", "method=dense")
    again = next(r for r in records(tmp_path) if r["id"] != record["id"])
    assert again["windows"] == pytest.approx(record["windows"], rel=1e-6)

    capsys.readouterr()
    run(*setting, f"save_model={target}", f"masks={masks}")
    assert "already done" in capsys.readouterr().out
    run(*setting, f"save_model={tmp_path / 'another'}")
    assert "already done" not in capsys.readouterr().out and (tmp_path / "another" / "model.safetensors").exists()


def test_skip_if_done_and_rerun(setting, tmp_path, capsys):
    run(*setting)
    first = records(tmp_path)
    run(*setting)
    assert "already done" in capsys.readouterr().out and records(tmp_path) == first
    run(*setting, "rerun=true")
    (second,) = records(tmp_path)
    assert second["stages"] != first[0]["stages"]
    assert second["windows"] == first[0]["windows"]  # the same seed, the same bits
    path = tmp_path / "runs" / f"{second['id']}.json"
    path.write_text("{")
    run(*setting)
    assert json.loads(path.read_text())["windows"] == second["windows"]


def test_the_dense_model_of_a_sweep_has_no_masks_and_is_done_all_the_same(setting, tmp_path, capsys):
    for _ in range(2):
        run(*setting, "method=dense", f"masks={tmp_path / 'masks'}")
    assert "already done" in capsys.readouterr().out
    assert records(tmp_path)[0]["files"] == {} and not (tmp_path / "masks").exists()


@pytest.mark.parametrize("what", ["model", "masks"])
def test_what_was_written_and_changed_since_is_not_done(setting, tmp_path, capsys, what):
    folder = tmp_path / "saved"
    asked = f"save_model={folder}" if what == "model" else f"masks={folder}"
    run(*setting, asked)
    run(*setting, asked)
    assert "already done" in capsys.readouterr().out
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    changed = path.read_bytes()
    with pytest.raises(DassError, match="was changed since"):  # it may be somebody's work
        run(*setting, asked)
    assert "already done" not in capsys.readouterr().out and path.read_bytes() == changed


@pytest.mark.parametrize("when", ["load", "walk", "evaluation"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_model_that_changes_during_a_run_bears_no_identity(setting, tmp_path, monkeypatch, when, how):
    """It is hashed first, read later, and mapped into memory until the end."""
    module, name = {"load": (loading, "load_model"), "walk": (app, "prune"), "evaluation": (app, "score")}[when]
    work, path = getattr(module, name), tmp_path / "model" / "model.safetensors"

    def meanwhile(*arguments, **named):
        stamp, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 1
        if how == "replaced":
            path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        return work(*arguments, **named)

    monkeypatch.setattr(module, name, meanwhile)
    with pytest.raises(DassError, match="was changed while it was in use"):
        run(*setting)
    assert records(tmp_path) == []
    monkeypatch.undo()
    run(*setting)  # with an identity of its own
    assert len(records(tmp_path)) == 1


def test_a_failing_save_still_leaves_the_record(setting, tmp_path, monkeypatch):
    def full(*_, **__):
        raise DassError("Cannot write the model: free space.")

    monkeypatch.setattr(outputs, "save_model", full)
    with pytest.raises(DassError, match="free space"):
        run(*setting, f"save_model={tmp_path / 'saved'}")
    (record,) = records(tmp_path)
    assert record["failed"] == {"save": "Cannot write the model: free space."} and len(record["windows"]) == 10
    monkeypatch.undo()
    run(*setting, f"save_model={tmp_path / 'saved'}")  # a record of a failure is not done
    assert records(tmp_path)[0]["failed"] == {} and records(tmp_path)[0]["windows"] == record["windows"]


def test_a_failing_evaluation_still_leaves_the_model_and_a_record(setting, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(door, "perplexity", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(*setting, f"save_model={tmp_path / 'saved'}", f"masks={tmp_path / 'masks'}")
    (record,) = records(tmp_path)
    assert record["failed"] == {"evaluation": "RuntimeError: out of luck"} and record["metrics"] == []
    assert record["sparsity"]["mlp"] == 0.5 and read_masks(tmp_path / "masks")
    assert is_saved(tmp_path / "saved", record["id"])


def test_a_failing_evaluation_takes_nothing_from_an_earlier_record(setting, tmp_path, monkeypatch):
    run(*setting)
    (before,) = records(tmp_path)
    monkeypatch.setattr(door, "perplexity", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*setting, "rerun=true")
    assert records(tmp_path) == [before]


@pytest.mark.parametrize("kind", ["llama4", "mistral3", "qwen3_vl_moe"])
def test_a_model_that_reads_images_too(setting, tmp_path, kind):
    """transformers has none of them as a causal language model, or the text alone; what is beside it stays."""
    model = image_model(kind)
    model.save_pretrained(tmp_path / "model")
    run(*setting, f"save_model={tmp_path / 'saved'}")
    (whole,) = records(tmp_path)
    assert whole["sparsity"]["mlp"] == 0.5 and not whole["failed"]
    run(*setting, "memory=stream", "rerun=true")
    assert records(tmp_path)[0]["windows"] == pytest.approx(whole["windows"], rel=1e-6)
    text = [s for s in setting if s.startswith(("evaluation", "tracking", "results_dir"))]
    run(*text, "model=local", f"model.path={tmp_path / 'saved'}", "method=dense")
    again = next(r for r in records(tmp_path) if r["id"] != whole["id"])
    assert again["windows"] == pytest.approx(whole["windows"], rel=1e-6)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and changed
    assert all("language_model" in name and ".layers." in name for name in changed)


def test_the_dtype_of_the_weights_where_the_configuration_has_none(setting, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run(*setting, f"save_model={tmp_path / 'saved'}")
    assert {weight.dtype for weight in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_renamed_copy_of_a_method_is_another_method():
    config, named = composed("method=wanda"), composed("method=wanda", "method.name=mine")
    name_by_file(config, ["model=local", "method=wanda_copy"])
    name_by_file(named, ["method=wanda_copy", "method.name=mine"])
    assert (config.method.name, named.method.name) == ("wanda_copy", "mine")


def test_what_is_scored_is_what_is_saved(setting, tmp_path):
    """A bf16 source on the CPU: computed in fp32, the repaired weights rounded to bf16 before the evaluation."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    run(*setting, "method=sparsegpt", f"save_model={tmp_path / 'saved'}")
    (pruned,) = records(tmp_path)
    assert pruned["config"]["resolved"]["dtype"] == "float32"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.dtype == torch.bfloat16
    text = [s for s in setting if s.startswith(("evaluation", "tracking", "results_dir"))]
    run(*text, "model=local", f"model.path={tmp_path / 'saved'}", "method=dense")
    again = next(r for r in records(tmp_path) if r["id"] != pruned["id"])
    assert again["windows"] == pruned["windows"]


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "mixtral"])
def test_other_layouts_end_to_end(setting, tmp_path, architecture):
    """Fused, transposed and expert layouts: pruned, saved, reloaded, scored alike, masks applied to the released one.

    Of 288 routed tokens one of four experts sees fewer than 73.
    """
    dense = tiny_model(architecture)
    dense.save_pretrained(tmp_path / "model")
    saved, masks = tmp_path / "saved", tmp_path / "masks"
    run(*setting, f"save_model={saved}", f"masks={masks}", "calibration.min_expert_tokens=73")
    (record,) = records(tmp_path)
    assert record["sparsity"]["targeted"] == record["sparsity"]["mlp"] == 0.5
    assert ("experts" in record) == (architecture == "mixtral")
    reloaded = AutoModelForCausalLM.from_pretrained(saved)
    apply_masks(dense, read_masks(masks)[0])
    for (name, weight), again in zip(dense.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(weight, again), name
    text = [s for s in setting if s.startswith(("evaluation", "tracking", "results_dir"))]
    run(*text, "model=local", f"model.path={saved}", "method=dense")
    again = next(r for r in records(tmp_path) if r["id"] != record["id"])
    assert again["windows"] == pytest.approx(record["windows"], rel=1e-6)


def test_a_layout_can_be_given_in_words(setting, tmp_path):
    words = r"{gate: gate_proj, up: up_proj, down: 'mlp\.down_proj$'}"
    run(*setting, f"model.projections={words}")
    run(*setting)
    given, found = sorted(records(tmp_path), key=lambda r: r["config"]["model"]["projections"] is None)
    assert given["windows"] == found["windows"] and given["id"] != found["id"]


def identity(setting, *overrides):
    return check(composed(*setting, *overrides)).run_id


def test_identity_is_of_what_determines_the_result(setting, tmp_path):
    same = [
        [],
        ["device=cpu"],
        ["batch_size=2"],
        ["results_dir=elsewhere"],
        ["tracking=wandb"],
        ["masks=m"],
        ["seed=3"],
        ["method.damping=0.5"],
    ]
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    shutil.copy(tmp_path / "tokens.safetensors", tmp_path / "copy.safetensors")
    same += [[f"model.path={tmp_path / 'copy'}"], [f"calibration.path={tmp_path / 'copy.safetensors'}"]]
    assert len({identity(setting, *overrides) for overrides in same}) == 1
    others = [
        [],
        ["method=wanda"],
        ["method.name=another"],
        ["method.alpha=1"],
        ["method.axis.gate=in"],
        ["method.update=obs"],
        ["method.update=obs", "method.damping=0.5"],
        ["sparsity=4of8"],
        ["targets=all"],
        ["exclude=up_proj"],
        ["model.dtype=bfloat16"],
        ["calibration.n_sequences=3"],
        ["calibration.min_expert_tokens=3"],
        ["evaluation.n_windows=3"],
        ["evaluation.seq_len=10"],
        ["evaluation.bos=none"],
        ["method=dense"],
    ]
    save_file({"input_ids": random_tokens(6, 24, seed=1)}, tmp_path / "other.safetensors")
    others += [[f"calibration.path={tmp_path / 'other.safetensors'}"]]
    shutil.copy(tmp_path / "text.txt", tmp_path / "text.text")
    others += [[f"evaluation.path={tmp_path / 'text.text'}"]]  # another suffix may be read otherwise
    assert len({identity(setting, *overrides) for overrides in others}) == len(others)


def test_identity_leaves_out_what_a_run_does_not_use(setting):
    dense = [[], ["sparsity=4of8"], ["targets=all"], ["calibration.n_sequences=3"], ["seed=1"]]
    assert len({identity(setting, "method=dense", *overrides) for overrides in dense}) == 1
    magnitude = [[], ["calibration.n_sequences=3"], ["seed=1"], ["method.damping=0.1"]]
    assert len({identity(setting, "method=magnitude", *overrides) for overrides in magnitude}) == 1
    repaired = [[], ["calibration.n_sequences=3"], ["method.damping=0.1"], ["model.dtype=float32"]]
    assert len({identity(setting, "method=magnitude", "method.update=obs", *o) for o in repaired}) == 4
    as_it_is = [[], ["model.dtype=float32"]]  # only what an update changes is rounded to the dtype of the source
    assert len({identity(setting, "method=magnitude", *overrides) for overrides in as_it_is}) == 1
    text = [s for s in setting if not s.startswith("calibration")]
    assert identity(text, "calibration=packaged_c4") != identity(text, "calibration=packaged_c4", "seed=1")


def test_who_edits_an_equation_gets_another_run(setting, tmp_path, monkeypatch):
    """Another equation, or another number in a helper that it calls, is another run; another comment is not."""
    seen = {}
    for name, body in {
        "first": "weight.abs() * factor()",
        "comment": "weight.abs() * factor()  # as it was",
        "equation": "weight.square() * factor()",
        "helper": "weight.abs() * factor()",
    }.items():
        file = tmp_path / f"{name}.py"
        value = 3 if name == "helper" else 2
        text = f'"""An equation."""\n\n\ndef factor():\n    return {value}\n\n\n'
        text += f'def mine(weight, role, statistics):\n    """Words: {name}."""\n    return {body}\n'
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(CRITERIA, "mine", None)
        criterion()(module.mine)
        seen[name] = identity(setting, "method=magnitude", "method.criterion=mine")
    assert seen["first"] == seen["comment"]
    assert len(set(seen.values())) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("SHARE = {'gate': 0.5}", "SHARE = {'gate': 0.9}"),
        ("    power = 2.0", "    power = 3.0"),
        ("TABLE = torch.tensor([1.0, 2.0])", "TABLE = torch.tensor([1.0, 2.5])"),
        ("    return x**2", "    return x**3"),
        ("FACTOR = (1, 2)", "FACTOR = (1, 3)"),
    ],
    ids=["dictionary", "class", "tensor", "helper of another module", "constant of another module"],
)
def test_all_that_a_strangers_equation_uses_is_in_its_identity(setting, tmp_path, monkeypatch, before, after):
    """No version of the numerics stands for a module that is not ours."""
    other = "def bent(x):\n    return x**2\n\n\nFACTOR = (1, 2)\n"
    own = (
        "import torch\nimport stranger_other\nfrom stranger_other import bent\n\nSHARE = {'gate': 0.5}\n"
        "TABLE = torch.tensor([1.0, 2.0])\n\n\nclass Helper:\n    power = 2.0\n\n\n"
        "def stranger(weight, role, statistics):\n    'Words.'\n"
        "    part = SHARE.get(role, 1) * TABLE[1] * stranger_other.FACTOR[1]\n"
        "    return bent(weight.abs() ** Helper.power) * part\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for texts in ((own, other), (own, other), (own.replace(before, after), other.replace(before, after))):
        for name, text in zip(("stranger_own", "stranger_other"), texts, strict=True):
            monkeypatch.delitem(sys.modules, name, raising=False)
            (tmp_path / f"{name}.py").write_text(text)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        linecache.clearcache()
        importlib.invalidate_caches()
        module = importlib.import_module("stranger_own")
        monkeypatch.setitem(CRITERIA, "stranger", None)
        criterion()(module.stranger)
        seen.append(identity(setting, "method=magnitude", "method.criterion=stranger"))
    assert seen[0] == seen[1] != seen[2]


def test_the_revision_of_hub_texts_is_pinned_and_part_of_the_identity(setting):
    rest = [s for s in setting if not s.startswith(("calibration", "evaluation"))]
    for chosen in (["calibration=c4", "evaluation=none"], ["method=dense", "evaluation=wikitext2"]):
        group = next(word.split("=")[0] for word in chosen if "c4" in word or "wikitext2" in word)
        pinned = composed(*rest, *chosen)[group].revision
        assert re.fullmatch("[0-9a-f]{40}", pinned)
        assert identity(rest, *chosen) != identity(rest, *chosen, f"{group}.revision={'0' * 40}")


def test_the_parts_of_an_identity_tell_which_runs_read_the_same(setting, tmp_path):
    run(*setting)
    run(*setting, "method=wanda")
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text() + " w5")
    run(*setting, "method=magnitude")
    by_method = {record["config"]["method"]["name"]: record["identity"] for record in records(tmp_path)}
    assert by_method["dass"]["evaluation"] == by_method["wanda"]["evaluation"] != by_method["magnitude"]["evaluation"]
    assert len({identity["model"] for identity in by_method.values()}) == 1
    for record in records(tmp_path):
        assert record["id"] == identities.Fingerprint(record["determinants"]).id  # can be reckoned from the record


def every_option():
    """All files below conf/, as the override that selects them."""
    for path in sorted(CONF.rglob("*.yaml")):
        name = path.relative_to(CONF).with_suffix("")
        yield (str(name), None) if len(name.parts) == 1 else (f"{name.parent}={name.name}", "prune")


@pytest.mark.parametrize(("option", "primary"), list(every_option()), ids=[option for option, _ in every_option()])
def test_every_shipped_config_composes(option, primary):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if primary is None:
            importlib.import_module(f"experiments.{option}")  # which tells Hydra what its settings are
            compose(option)
        else:
            compose(primary, [option], return_hydra_config=True)
    text = next(CONF.glob(f"{option.replace('=', '/')}.yaml")).read_text()
    assert "# python -m experiments." in "\n".join(text.splitlines()[:2])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sparsity=nm", "sparsity.n=5", "sparsity.m=4"], "sparsity.n=5"),
        (["sparsity=nm"], "both n and m"),
        (["sparsity=unstructured", "sparsity.ratio=1.0"], "sparsity.ratio=1.0"),
        (["sparsity=2of4", "sparsity.ratio=0.5"], "set either ratio"),
        (["sparsity=nm", "sparsity.n=2", "sparsity.m=5"], "M=5"),
        (["model.path=/nowhere"], "/nowhere"),
        (["calibration.path=/nowhere"], "/nowhere"),
        (["evaluation.path=/nowhere"], "/nowhere"),
        (["evaluation.n_windows=11"], "200 tokens are 10 whole windows"),
        (["batch_size=0"], "batch_size"),
        (["method.alpha=inf"], "alpha=inf is not a finite number"),
        (["+method.beta=1"], "beta"),
        (["method.alpha=x"], "alpha=x must be a finite number"),
        (["method.update=obs", "method.damping=0"], "damping=0 must be above 0"),
        (["method.update=abs"], "did you mean obs"),
        (["calibration.min_expert_tokens=0"], "min_expert_tokens=0"),
        (["model.projections={gat: x}"], "role gat is unknown"),
        (["model.projections=x"], "must be {gate: REGEX"),
        (["method=dense", "method.criterion=nosuch"], "nosuch"),
        (["targets=attention"], "targets=attention"),
        (["exclude=."], "leaves nothing"),
        (["tracking.name=mlflow"], "mlflow"),
        (["seed=-1"], "seed=-1"),
        (["+results_dirr=x"], "results_dirr"),
        (["+sparsity.foo=1"], "sparsity.foo"),
        (["save_model=m", "masks=m/masks"], "would replace masks"),
        (["save_model=m", "results_dir=m"], "would replace results_dir"),
        (["results_dir=/proc/cpuinfo/runs"], "/proc/cpuinfo"),
        (["masks=/proc/cpuinfo"], "/proc/cpuinfo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(setting, tmp_path, overrides, says):
    with pytest.raises(DassError) as caught:
        run(*setting, *overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert records(tmp_path) == []


@pytest.mark.parametrize("how", ["vocabulary", "nan", "layout", "weights"])
def test_models_that_cannot_be_pruned(setting, tmp_path, how):
    if how == "vocabulary":
        save_file({"input_ids": torch.full((2, 8), VOCABULARY)}, tmp_path / "tokens.safetensors")
    elif how == "nan":
        model = tiny_model()
        model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
        model.save_pretrained(tmp_path / "model")
    elif how == "weights":
        (tmp_path / "model" / "model.safetensors").unlink()
        (tmp_path / "model" / "tokenizer.json").unlink()
    else:
        from transformers import MambaConfig, MambaForCausalLM

        MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)).save_pretrained(
            tmp_path / "model"
        )
        next((tmp_path / "model").glob("*.safetensors")).write_bytes(b"no weight is read")
    says = {
        "vocabulary": "vocabulary has 96",
        "nan": r"layers\.2\.mlp\.down_proj",
        "layout": "mamba has no attention",
        "weights": "holds no weights",
    }[how]
    with pytest.raises(DassError, match=says):
        run(*setting, f"save_model={tmp_path / 'saved'}", f"masks={tmp_path / 'masks'}")
    assert sorted(os.listdir(tmp_path)) == ["model", "text.txt", "tokens.safetensors"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["exclude=no_such"], "exclude=no_such matches none"),
        (["sparsity=nm", "sparsity.n=3", "sparsity.m=5"], "M=5 does not divide"),
        (["model.projections={up: up_proj, down: nothing}"], "unknown layout"),
    ],
    ids=["exclude", "width", "layout"],
)
def test_what_the_shapes_tell_is_told_before_a_weight_is_read(setting, tmp_path, overrides, says):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weight is read")
    with pytest.raises(DassError, match=says):
        run(*setting, "method=wanda", *overrides)


def command(*overrides, **environment):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prune", *overrides],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_command_line_tells_errors_in_one_line(setting):
    result = command(*setting, "sparsity.ration=1")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "ration" in result.stderr, result.stderr
    result = command(*setting, "model.path=/nowhere", "debug=true")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failing_run(setting, tmp_path):
    result = command("--multirun", *setting, "method=dense,wanda", "evaluation.n_windows=11,3")
    assert result.returncode == 1
    assert result.stderr.count("error: Too little text") == 2
    assert sorted(record["metrics"][0]["n"] for record in records(tmp_path)) == [3, 3]
    assert not (ROOT / "multirun.yaml").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_no_record(setting, tmp_path):
    save_file({"input_ids": random_tokens(20000, 24)}, tmp_path / "tokens.safetensors")
    outputs = [f"save_model={tmp_path / 'saved'}", f"masks={tmp_path / 'masks'}"]
    process = subprocess.Popen([sys.executable, "-m", "experiments.prune", *setting, *outputs], cwd=ROOT)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        with open(f"/proc/{process.pid}/statm") as statm:
            if int(statm.read().split()[1]) * 4096 > 0.5e9:  # the imports are done, the calibration tokens are in
                break
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(os.listdir(tmp_path)) - {"runs"} == {"model", "text.txt", "tokens.safetensors"}
    assert not list(tmp_path.glob("runs/[!.]*"))  # a claim is left there, which the next one takes over


def test_a_crash_closes_the_run_of_wandb(setting, tmp_path, monkeypatch):
    setting = [s for s in setting if not s.startswith("tracking")] + [f"tracking.folder={tmp_path}"]
    monkeypatch.setenv("WANDB_SILENT", "true")

    import wandb

    def crash(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(door, "perplexity", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(*setting, "method=wanda")
    assert wandb.run is None
    (record,) = records(tmp_path)
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert record["id"].encode() in next(offline.glob("*.wandb")).read_bytes() and record["failed"]


@pytest.mark.slow
def test_smollm2_end_to_end(tmp_path):
    """The real model: dense is far better than pruned, and DaSS and Wanda far better than magnitude."""
    common = [
        "calibration.n_sequences=4",
        "calibration.seq_len=256",
        "evaluation.seq_len=256",
        "evaluation.n_windows=2",
    ]
    values = {}
    for method in ("dense", "magnitude", "wanda", "dass"):
        run(*common, f"method={method}", f"results_dir={tmp_path / 'runs'}", "tracking=none")
    for record in records(tmp_path):
        values[record["config"]["method"]["name"]] = record["metrics"][0]["value"]
        if record["config"]["method"]["name"] != "dense":
            assert record["sparsity"]["targeted"] == pytest.approx(0.5, abs=1e-4)
            assert record["sparsity"]["linear"] == pytest.approx(0.375, abs=1e-3)
    assert values["dense"] < 40
    assert 2 * values["dense"] < values["wanda"] < values["magnitude"] / 2
    assert 2 * values["dense"] < values["dass"] < values["magnitude"] / 2
