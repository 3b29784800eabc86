"""A device whose memory does not suffice for a batch: at the n-th allocation, or for good."""

from functools import partial
from itertools import chain

import pytest
import torch
from transformers.activations import ACT2FN

from dass import NM, BlockPruner, Method
from dass.errors import DassError
from dass.evaluation.likelihood import log_likelihoods
from dass.evaluation.perplexity import perplexity
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.comparison import compare_block, comparison_needs
from dass.pruning.walk import prune_model, walk
from dass.soundness import require_sound
from dass.streaming import load_streamed
from experiments import walked
from tests.evaluation.test_likelihood import made_items
from tests.experiments.test_prune import records, run, setting  # noqa: F401  (a fixture)
from tests.models import random_tokens, tiny_model
from tests.test_resume import always, killed_at  # noqa: F401  (a fixture)

ROLES = ("gate", "up", "down", "q", "k", "v", "o")
DASS = BlockPruner(Method("dass", {**dict.fromkeys(ROLES, "in"), "gate": "out", "up": "out"}, NM(2, 4)))
WANDA = BlockPruner(Method("wanda", dict.fromkeys(ROLES, "in"), NM(2, 4)))
PRUNERS = {
    "dass": DASS,
    "sparsegpt": BlockPruner(Method("obs", dict.fromkeys(ROLES, "in"), NM(2, 4), "obs"), "all"),
    "adaptive": AdaptivePruner({"dass": DASS, "wanda": WANDA}, share=0.7),
}
TOKENS = random_tokens(7, 12)


class Fault:
    """Activation functions that raise at one call, or wherever they are given more than so many rows."""

    def __init__(self, monkeypatch, at=None, rows=None, name="silu"):
        self.calls = 0
        kind = type(ACT2FN[name])
        original = kind.forward

        def forward(module, x):
            self.calls += 1
            if self.calls == at or (rows is not None and len(x) > rows):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return original(module, x)

        monkeypatch.setattr(kind, "forward", forward)


def pruned(pruner, sizes, architecture="llama", batch_size=4):
    model = tiny_model(architecture, torch.float64)
    steps = walk(model, TOKENS, pruner.needs, batch_size, halved=sizes.append)
    found = [one for step in steps for one in pruner.prune(step.block, step.streams, step.outputs)]
    return {one.projection.name: one.mask.keep for one in found}, model.state_dict()


def same(one, other):
    assert all(torch.equal(mask, other[0][name]) for name, mask in one[0].items())
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", PRUNERS)
def test_a_fault_at_any_allocation_changes_nothing(method, monkeypatch):
    """Nothing is counted twice, whatever of the batch had been seen by then; the next batches are smaller."""
    with monkeypatch.context() as patch:
        counter, sizes = Fault(patch), []
        expected = pruned(PRUNERS[method], sizes)
    assert not sizes and counter.calls >= 11
    for at in range(1, counter.calls + 1, 1 if method == "dass" else 5):
        with monkeypatch.context() as patch:
            Fault(patch, at)
            sizes = []
            same(expected, pruned(PRUNERS[method], sizes))
        assert len(sizes) in (1, 2) and set(sizes) <= {1, 2}, at  # 2: once more where the last batches were the smaller


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom", "gptj", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_device_that_is_too_small_gets_batches_that_fit(architecture, rows, monkeypatch):
    expected = pruned(DASS, [], architecture)
    for name in ("scaled_dot_product_attention", "softmax"):
        original = getattr(torch.nn.functional, name)

        def attend(scores, *rest, original=original, **more):
            if scores.ndim == 4 and len(scores) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(scores, *rest, **more)

        monkeypatch.setattr(torch.nn.functional, name, attend)
    sizes = []
    same(expected, pruned(DASS, sizes, architecture))
    assert sizes == ([2] if rows == 3 else [2, 1])


def test_what_would_help_is_told_where_one_sequence_is_too_much(monkeypatch, capsys):
    model, items = tiny_model(), made_items()
    Fault(monkeypatch, rows=0)
    for work in (
        lambda: prune_model(model, DASS, TOKENS, 4),
        lambda: perplexity(model, TOKENS.split(4)),
        lambda: list(log_likelihoods(model, [items], 4)),
    ):
        with pytest.raises(DassError, match=r"even for one sequence .*memory=stream.*shorten the sequences"):
            work()
    assert "goes on with batches of 2\n" in capsys.readouterr().err


def test_blocks_that_hand_state_to_each_other_ask_for_a_smaller_batch(monkeypatch):
    model = tiny_model("gemma4_text")
    Fault(monkeypatch, at=8, name=model.config.hidden_activation)
    with pytest.raises(DassError, match="set a smaller batch_size"):
        prune_model(model, DASS, TOKENS, 4)


def test_methods_are_compared_alike(monkeypatch):
    pruners = {"dass": DASS, "wanda": WANDA}

    def compared():
        model = tiny_model(dtype=torch.float64)
        steps = walk(model, TOKENS, partial(comparison_needs, pruners), 4, halved=lambda _: None)
        return [compare_block(pruners, step.block, step.streams, step.outputs).errors for step in steps]

    expected = compared()
    for at in (4, 5, 6, 7):  # in the dense outputs, without an MLP, and of each method
        with monkeypatch.context() as patch:
            Fault(patch, at)
            for one, other in zip(compared(), expected, strict=True):
                assert all(one[name] == pytest.approx(other[name]) for name in pruners)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_perplexity_goes_on_with_smaller_batches(memory, tmp_path, monkeypatch):
    model, shelf, sizes, told = tiny_model(), None, [], []
    expected = perplexity(model, TOKENS.split(4)).losses
    if memory == "stream":
        model.save_pretrained(tmp_path / "model")
        model, shelf = load_streamed(str(tmp_path / "model"), None, "float32", torch.device("cpu"), tmp_path / "own")
    Fault(monkeypatch, rows=1)
    found = perplexity(model, TOKENS.split(4), shelf, done=lambda losses: told.append(len(losses)), halved=sizes.append)
    assert found.losses == pytest.approx(expected, rel=1e-5) and sizes == [2, 1] and told == [4, 7]


def test_zero_shot_goes_on_with_smaller_batches(monkeypatch):
    model, items, sizes = tiny_model(), made_items(), []
    (expected,) = log_likelihoods(model, [items], 100)
    Fault(monkeypatch, rows=9)
    (found,) = log_likelihoods(model, [items], 100, halved=sizes.append)
    assert sizes == [14, 7]
    assert [*chain(*found)] == pytest.approx([*chain(*expected)], abs=1e-4)


def test_the_record_says_so_and_a_killed_run_goes_on_with_the_smaller_batches(setting, tmp_path, monkeypatch, always):  # noqa: F811
    given = [*setting, "method=sparsegpt", "batch_size=4"]
    run(*given, f"results_dir={tmp_path / 'whole' / 'runs'}")
    (whole,) = records(tmp_path / "whole")
    assert whole["config"]["resolved"] == {
        "dtype": "float32",
        "batch_size": 4,
        "hessians": "float32",
        "evaluation_batch_size": 4,
    }
    Fault(monkeypatch, rows=2)
    back = killed_at(monkeypatch, walked, "note", 3)
    with pytest.raises(SystemExit):
        run(*given)
    back()
    run(*given)
    (record,) = records(tmp_path)
    require_sound(record)
    assert record["config"]["resolved"] == {
        "dtype": "float32",
        "batch_size": 2,
        "hessians": "float32",
        "halved_from": {"pruning": 4, "evaluation": 4},
        "evaluation_batch_size": 2,
    }
    assert record["id"] == whole["id"] and record["windows"] == pytest.approx(whole["windows"], rel=1e-3)
