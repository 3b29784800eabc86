"""Models whose blocks lie on disk: the same masks, weights, losses and saved files as of models in memory."""

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dass import NM, BlockPruner, Method, streaming
from dass.checkpoint import stored_tensors
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.models import load_model
from dass.pruning.layout import find_blocks
from dass.pruning.walk import walk
from dass.saving import round_to, rounding, save_model
from dass.sizes import Needed, memory_needed
from dass.sparsity import sparsity_report
from dass.streaming import Shelf, load_streamed
from experiments import prune, resolve
from experiments.resolve import MEMORY
from tests.experiments.test_prune import command, records, run, setting  # noqa: F401  (a fixture)
from tests.models import LAYOUTS, random_tokens, tiny_model

CPU = torch.device("cpu")
METHODS = {
    "wanda": Method("wanda", {"gate": "in", "up": "in", "down": "in"}, NM(2, 4)),
    "dass": Method("dass", {"gate": "out", "up": "out", "down": "in"}, NM(2, 4)),
    "sparsegpt": Method("obs", {"gate": "in", "up": "in", "down": "in"}, NM(2, 4), "obs"),
}


EXPERTS = [name for name in LAYOUTS if {"num_experts", "num_local_experts"} & set(LAYOUTS[name][1])]


def loaded(folder, scratch, dtype="float32", by_expert=False):
    """A model in memory, and the same on disk."""
    whole = load_model(str(folder), None, dtype, CPU)
    return whole, *load_streamed(str(folder), None, dtype, CPU, scratch, by_expert=by_expert)


def pruned(model, method, tokens, hold=None):
    """Masks and sparsity by a walk."""
    pruner, masks = BlockPruner(method), {}
    more = {} if hold is None else {"hold": hold}
    for step in walk(model, tokens, pruner.needs, 2, min_expert_tokens=1, **more):
        masks |= {one.projection.name: one.mask.keep for one in pruner.prune(step.block, step.streams, step.outputs)}
    return masks


@pytest.mark.parametrize(
    ("layout", "method", "by_expert"),
    [
        *((layout, "dass", False) for layout in ("gemma3", *LAYOUTS)),
        *((layout, "sparsegpt", False) for layout in ("llama", "mixtral")),
        *((layout, "dass", True) for layout in EXPERTS),
        *((layout, method, True) for layout in ("mixtral", "deepseek_v3") for method in ("wanda", "sparsegpt")),
        *((f"{layout} tie_word_embeddings", "dass", True) for layout in ("mixtral", "qwen3_moe")),
    ],
)
def test_a_streamed_model_is_the_one_in_memory(tmp_path, layout, method, by_expert):
    torch.manual_seed(0)
    layout, *tied = layout.split(" ")
    tiny_model(layout, **dict.fromkeys(tied, True)).to(torch.bfloat16).save_pretrained(
        tmp_path / "model", max_shard_size="20KB"
    )
    whole, streamed, shelf = loaded(tmp_path / "model", tmp_path / "scratch", by_expert=by_expert)
    shared = [one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (whole, streamed)]
    assert shared[0] == shared[1] and (shared[0] or not tied)
    tokens, windows = random_tokens(4, 24), random_tokens(3, 16, seed=1).split(2)
    assert perplexity(whole, windows).losses == perplexity(streamed, windows, shelf).losses
    expected = pruned(whole, METHODS[method], tokens)
    stored = rounding(streamed, "bfloat16")
    found = pruned(streamed, METHODS[method], tokens, lambda block: shelf.change(block, stored))
    assert expected.keys() == found.keys() and all(torch.equal(mask, found[name]) for name, mask in expected.items())
    for model in (whole, streamed):
        round_to(model, "bfloat16")
    assert all(p.is_meta for block in shelf.blocks for p in block.module.parameters())
    assert perplexity(whole, windows).losses == perplexity(streamed, windows, shelf).losses
    targeted = [[p for block in find_blocks(model) for p in block.projections] for model in (whole, streamed)]
    assert sparsity_report(whole, find_blocks(whole), targeted[0]) == sparsity_report(
        streamed, find_blocks(streamed), targeted[1], shelf.hold
    )
    save_model(whole, tmp_path / "whole", "# a card", "abc123", "bfloat16")
    save_model(streamed, tmp_path / "streamed", "# a card", "abc123", "bfloat16", shelf=shelf)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("streamed", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert stored_tensors(tmp_path / "streamed").keys() == stored_tensors(tmp_path / "whole").keys()
    assert all(torch.equal(ours[name], weight) and ours[name].dtype == weight.dtype for name, weight in theirs.items())
    assert perplexity(whole, windows).losses == perplexity(streamed, windows, shelf).losses  # after saving, too


LOADS = """
import re, sys, torch
from pathlib import Path
from dass.streaming import load_streamed

def memory(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

for folder in sys.argv[1:]:
    before = memory("VmRSS")
    load_streamed(folder, None, "float32", torch.device("cpu"), Path(folder) / "scratch")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory that way")
def test_blocks_are_not_read_to_load_a_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=2**15, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    blocks = sum(p.nbytes for block in find_blocks(model) for p in block.module.parameters())
    command = [sys.executable, "-c", LOADS, str(tmp_path / "tiny"), str(tmp_path / "model")]
    grown = int(subprocess.check_output(command))
    assert 0 <= grown < blocks / 3


def test_a_block_that_an_error_interrupts_stays_as_it_was(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    _, _, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    with pytest.raises(ZeroDivisionError), shelf.change(shelf.blocks[0], lambda name, tensor: tensor):
        next(shelf.blocks[0].module.parameters()).zero_()
        raise ZeroDivisionError
    assert not list((tmp_path / "scratch").glob("*.safetensors"))
    with shelf.hold(shelf.blocks[0]):
        assert next(shelf.blocks[0].module.parameters()).any()


def test_the_source_is_never_written(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before = file.read_bytes()
    _, _, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    with shelf.hold(shelf.blocks[0]):
        next(shelf.blocks[0].module.parameters()).zero_()
    assert file.read_bytes() == before


def test_weights_that_are_no_numbers_are_told_when_they_are_read(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    _, shelf = load_streamed(str(tmp_path / "model"), None, "float32", CPU, tmp_path / "scratch")
    with shelf.hold(shelf.blocks[0]):
        pass
    with pytest.raises(DassError, match=r"layers\.1\.mlp\.up_proj\.weight"), shelf.hold(shelf.blocks[1]):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    _, _, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    (tmp_path / "scratch").mkdir(mode=0o500)
    with shelf.change(shelf.blocks[0], lambda name, tensor: tensor):
        pass
    with pytest.raises(DassError, match="Cannot write"):
        shelf.settle()


def test_what_goes_wrong_while_a_block_is_written_is_told_by_the_next(tmp_path, monkeypatch):
    def fails(*_):
        raise DassError("Cannot write: free space.")

    tiny_model().save_pretrained(tmp_path / "model")
    _, _, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    as_it_is = lambda name, tensor: tensor  # noqa: E731
    monkeypatch.setattr(streaming, "write_in_turn", fails)
    with shelf.change(shelf.blocks[0], as_it_is):
        pass
    with pytest.raises(DassError, match="free space"), shelf.change(shelf.blocks[1], as_it_is):
        pass
    with shelf.change(shelf.blocks[0], as_it_is):
        pass
    with pytest.raises(ZeroDivisionError), shelf.change(shelf.blocks[1], as_it_is):
        raise ZeroDivisionError
    shelf.settle()  # there is nothing more to tell


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_is_still_being_written_is_waited_for(tmp_path, monkeypatch, index):
    tiny_model().save_pretrained(tmp_path / "model")
    _, _, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    written, reading = streaming.write_in_turn, threading.Event()

    def slowly(*given):
        reading.wait(0.3)
        written(*given)

    monkeypatch.setattr(streaming, "write_in_turn", slowly)
    with shelf.change(shelf.blocks[index], lambda name, tensor: torch.zeros_like(tensor)):
        pass
    for block in shelf.blocks:
        with shelf.hold(block):
            zeros = [not parameter.any() for parameter in block.module.parameters()]
            assert all(zeros) if block is shelf.blocks[index] else not all(zeros)


def test_a_run_is_the_same_however_the_model_lies(setting, tmp_path):  # noqa: F811
    found = {}
    for memory in ("resident", "stream"):
        more = [f"memory={memory}", f"save_model={tmp_path / memory}", f"results_dir={tmp_path / 'runs'}", "rerun=true"]
        done = command(*setting, "method=sparsegpt", *more)
        assert done.returncode == 0, done.stderr
        (record,) = records(tmp_path)
        found[memory] = {key: record[key] for key in ("id", "windows", "metrics", "sparsity")}
        assert [path.suffix for path in (tmp_path / "runs").iterdir() if path.is_file()] == [".json"]
        assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]
    assert found["resident"] == found["stream"]
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / memory).state_dict() for memory in found)
    assert all(torch.equal(one[name], other[name]) for name in one)


def needs(monkeypatch, whole, streamed, free):
    """Pretend that a model needs so many bytes, whole or streamed, of those that are free."""
    monkeypatch.setattr(resolve, "memory_needed", lambda *_: Needed(whole, streamed, streamed))
    monkeypatch.setattr(resolve, "free_memory", lambda device: free)


def test_a_model_that_does_not_fit_is_streamed_and_this_is_said(setting, tmp_path, monkeypatch, capsys):  # noqa: F811
    needs(monkeypatch, 2_000_000_000, 1_000_000_000, 2_500_000_000)
    run(*setting, "method=wanda")
    assert "needs 3.0 GB of 2.5 GB" in capsys.readouterr().err
    assert records(tmp_path)[0]["sparsity"]["targeted"] == 0.5


@pytest.mark.parametrize(
    ("memory", "free", "advice"),
    [("resident", 3, "set memory=stream"), *((memory, 1, "use a machine with more memory") for memory in MEMORY)],
)
def test_a_model_that_fits_no_way_is_refused_before_it_is_downloaded(
    setting,  # noqa: F811
    tmp_path,
    monkeypatch,
    memory,
    free,
    advice,
):
    needs(monkeypatch, 4_000_000_000, 2_000_000_000, free * 1_000_000_000)
    monkeypatch.setattr(prune, "downloads", lambda plan: pytest.fail("it began to download"))
    with pytest.raises(
        DassError, match=rf"4\.0 GB, with memory=stream 2\.0 GB at a time, and {free}\.0 GB .*: {advice}"
    ):
        run(*setting, "method=wanda", f"memory={memory}")
    assert not list((tmp_path / "runs").glob("*.json"))


@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_what_a_model_needs_is_known_from_its_configuration(tmp_path, layout):
    model = tiny_model(layout)
    model.config.save_pretrained(tmp_path)
    blocks = [sum(p.numel() for p in block.module.parameters()) for block in find_blocks(model)]
    whole = sum(p.numel() for p in model.parameters())
    two = max(one + other for one, other in pairwise(blocks))
    found = memory_needed(str(tmp_path), None, "bfloat16")
    assert (found.whole, found.streamed) == (2 * whole, 2 * (whole - sum(blocks) + two))


def test_a_model_that_computes_between_its_blocks_is_refused():
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda module, given, output: output * 0.5)
    with pytest.raises(DassError, match="between its blocks"):
        pruned(model, METHODS["dass"], random_tokens(2, 8))


def test_a_layout_that_is_given_in_words_is_evaluated_too(tmp_path):
    model, windows, file = tiny_model(), random_tokens(2, 16).split(1), tmp_path / "weights.safetensors"
    for layer in model.model.layers:
        layer.extra = torch.nn.Linear(32, 32, bias=False)
    expected = perplexity(model, windows).losses
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(weights, file)
    index = {name: {"safetensors_file": str(file), "weight_name": name, "dtype": "float32"} for name in weights}
    blocks = find_blocks(model, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "dense": "extra"})
    assert perplexity(model, windows, Shelf(model, blocks, index, {}, tmp_path)).losses == expected
