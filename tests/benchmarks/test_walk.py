"""The benchmark's baseline computes the same thing as our walk, so that its time is a fair one."""

from functools import partial

import pytest
import torch

from benchmarks.reference import reference_walk
from benchmarks.table import CPU, fastest, row, timed_parts
from benchmarks.walk import METHODS, forward_rows, needed_forward, pruning, solver_row, time_walks
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from tests.models import random_tokens, tiny_model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_reference_walk_prunes_the_same(method, monkeypatch):
    ours, theirs, input_ids = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64), random_tokens()
    prune_model(ours, BlockPruner(METHODS[method]), input_ids)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the baseline computes in fp32; here without
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))  # its rounding
    assert len(list(reference_walk(theirs, input_ids, method, 2, 4))) == len(theirs.model.layers)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_needed_forward_work_is_what_it_says():
    model, counts = tiny_model(), {"q_proj": 0, "gate_proj": 0, "down_proj": 0}
    for name, module in model.named_modules():
        if (last := name.rpartition(".")[2]) in counts:
            module.register_forward_hook(lambda *_, last=last: counts.update({last: counts[last] + 1}))
    list(needed_forward(model, random_tokens(4), 2)())
    # the first block also runs once, on the first batch, while its inputs are recorded
    assert counts == {"q_proj": 3 * 2 + 1, "gate_proj": 3 * 2 + 2 * 2 + 1, "down_proj": 2 * 2 + 1}


def test_every_walk_is_timed():
    best, memory = time_walks(tiny_model, random_tokens(), with_reference=True)
    assert set(best) == {"forward", *METHODS, *(f"reference {name}" for name in METHODS)}
    assert set(memory) == set(METHODS)
    assert min(best.values()) > 0 and max(best.values()) < 10
    wanda = forward_rows(best, 1.1, memory)[0]
    assert f"| {best['wanda'] / best['forward']:.4g} | at most 1.1 |" in wanda and "batches of" in wanda


@pytest.mark.parametrize("method", METHODS)
def test_what_is_timed_is_our_walk(method):
    timed, ours, input_ids = tiny_model(), tiny_model(), random_tokens()
    assert len(list(pruning(timed, method, input_ids, 2))) == len(timed.model.layers)
    prune_model(ours, BlockPruner(METHODS[method]), input_ids, 2)
    assert all(map(torch.equal, timed.parameters(), ours.parameters()))


def test_work_is_timed_part_by_part(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 6.0, 6.0, 6.5, 7.0])
    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.table.time.perf_counter", lambda: next(clock))
        found = list(timed_parts(lambda: iter("ab"), CPU))
    assert found == [1.0, 5.0, 0.5]
    assert len(list(timed_parts(lambda: "ab", CPU))) == 1


def test_the_fastest_of_each_part_counts(monkeypatch):
    runs = iter([[3.0, 2.0, 0.5], [1.0, 5.0, 0.5]])
    monkeypatch.setattr("benchmarks.table.timed_parts", lambda work, device: next(runs))
    assert fastest(["x"], lambda name: lambda: None, CPU, repeats=2)["x"]["seconds"] == 1.0 + 2.0 + 0.5


def test_walks_go_on_block_by_block_in_turn():
    begun = []

    def walked(name):
        for part in "12":
            begun.append(name + part)
            yield

    best = fastest(["a", "b"], lambda name: partial(walked, name), CPU, repeats=2)
    assert begun == ["a1", "b1", "a2", "b2"] * 2 and set(best) == {"a", "b"}
    with pytest.raises(ValueError, match="zip"):  # of which one has a part that the others lack
        fastest(["a", "bc"], lambda name: lambda: iter(name), CPU)


def test_the_solver_is_within_its_limit():
    _, measured, limit, met, _ = solver_row().split(" | ")
    assert 0 < float(measured) <= 1e-4 and limit == "at most 0.0001" and met == "yes"


def test_rows_say_whether_a_limit_is_met():
    assert row("x", 1.2, "at most", 1.1, "") == "| x | 1.2 | at most 1.1 | **no** |  |"
    assert row("x", 1.5, "at least", 1.4, "") == "| x | 1.5 | at least 1.4 | yes |  |"
