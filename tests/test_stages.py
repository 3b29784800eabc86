"""Seconds and peak memory of stages."""

import time

import pytest
import torch

from dass.stages import Stages, peak_resident_memory, resident_memory


def test_peak_memory_is_seen_though_it_is_freed():
    before = resident_memory()
    with peak_resident_memory() as peak:
        block = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.1)
        del block
    assert peak[0] - before > 150e6


def test_stages():
    stages = Stages(torch.device("cpu"))
    with stages.measure("pruning"):
        time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), stages.measure("evaluation"):
        1 / 0  # noqa: B018
    assert list(stages.as_dict()) == ["pruning"]
    pruning = stages.as_dict()["pruning"]
    assert pruning["seconds"] >= 0.05 and pruning["peak_memory_gb"] > 0.1 and pruning["peak_gpu_memory_gb"] is None
