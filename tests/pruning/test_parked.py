"""Activations with little room in memory lie in files, and nothing else changes."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dass import NM, BlockPruner, Method
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.pruning import parked
from dass.pruning.calls import enter_first_block
from dass.pruning.layout import find_blocks
from dass.pruning.parked import Parked
from dass.pruning.walk import walk
from dass.streaming import load_streamed
from tests.models import random_tokens, tiny_model

CPU = torch.device("cpu")
METHOD = Method("obs", {"gate": "in", "up": "in", "down": "in"}, NM(2, 4), "obs")


def mapped_files() -> int:
    """How many files of activations this process has mapped, all of which have lost their names."""
    return sum(
        "activations-" in line and "(deleted)" in line for line in Path("/proc/self/maps").read_text().split("\n")
    )


def pruned(scratch=None, architecture="llama"):
    """The weights of a tiny model after a walk, and the most files that were mapped meanwhile."""
    model, pruner, most = tiny_model(architecture), BlockPruner(METHOD), 0
    for step in walk(model, random_tokens(5, 24), pruner.needs, 2, min_expert_tokens=1, scratch=scratch):
        most = max(most, mapped_files())
        pruner.prune(step.block, step.streams, step.outputs)
    return model.state_dict(), most


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_walk_without_room_in_memory_gives_the_same_bits(tmp_path, monkeypatch, architecture):
    expected, most = pruned(tmp_path / "scratch", architecture)
    assert most == 0 and not (tmp_path / "scratch").exists()
    monkeypatch.setattr(parked, "free_memory", lambda device: 0)
    found, most = pruned(tmp_path / "scratch", architecture)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert most == 3  # of each batch the sum of what enters a block and what its attention gives
    assert mapped_files() == 0 and not list((tmp_path / "scratch").iterdir())


def test_a_streamed_evaluation_without_room_in_memory_gives_the_same_bits(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    windows = random_tokens(5, 16).split(2)
    model, shelf = load_streamed(str(tmp_path / "model"), None, "float32", CPU, tmp_path / "scratch")
    expected = perplexity(model, windows, shelf).losses
    made, mapped = [], Parked._mapped
    monkeypatch.setattr(parked, "free_memory", lambda device: 0)
    monkeypatch.setattr(Parked, "_mapped", lambda self, tensor: (made.append(1), mapped(self, tensor))[1])
    assert perplexity(model, windows, shelf).losses == expected
    assert len(made) == 3 and mapped_files() == 0  # one file for each batch, whatever the number of blocks


def test_what_blocks_are_given_besides_is_not_written_over():
    model, tokens = tiny_model(), random_tokens(2, 8)
    expected = model.model.embed_tokens(tokens).detach()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given, more: (given, more | {"first": given[0]}), with_kwargs=True)
    activations = enter_first_block(model, find_blocks(model), [tokens])
    activations.batches[0] = torch.zeros_like(expected)
    assert torch.equal(activations.calls[0][2].keywords["first"], expected)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parked, "free_memory", lambda device: 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DassError, match=r"Cannot keep activations in .*No space left"):
        pruned(tmp_path)
    assert not list(tmp_path.iterdir())


VALUES = st.integers(1, 40).map(lambda n: torch.arange(n, dtype=torch.float32))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    free=st.integers(0, 600),
    values=st.lists(VALUES, min_size=1, max_size=5),
    changes=st.lists(st.tuples(st.integers(0, 4), st.none() | VALUES | st.tuples(VALUES, st.none())), max_size=12),
)
def test_it_is_a_list_that_never_takes_more_than_its_room(tmp_path, monkeypatch, free, values, changes):
    monkeypatch.setattr(parked, "free_memory", lambda device: parked.SHARE * free)
    found, expected = Parked(CPU, tmp_path, values), list(values)
    for i, value in changes:
        found[i % len(values)] = expected[i % len(values)] = value
        in_memory = sum(
            parked._bytes_of(kept) for kept, place in zip(expected, found._places, strict=True) if place is not None
        )
        assert found.room[CPU] == free - in_memory >= 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
