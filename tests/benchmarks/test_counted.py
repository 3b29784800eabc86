"""What a pretended GPU is counted to do, and the plan beside it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, MixtralConfig

from benchmarks.counted import LLAMA2_7B, LLAMA2_70B, Counter, counted_block, planned_block, pretended_device
from dass.planning.devices import DEVICES
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured, keep_most_important
from dass.pruning.method import Method
from dass.pruning.observe import open_streams
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import InputStream, Statistics

H100 = DEVICES["h100"]
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "vocab_size": 128}
LAYER = dict.fromkeys(("gate", "up", "down"), "layer")
IN = dict.fromkeys(LAYER, "in")
METHODS = {
    "magnitude": ("magnitude", LAYER, "none", LLAMA2_7B),
    "wanda": ("wanda", IN, "none", LLAMA2_7B),
    "dass": ("dass", {**IN, "gate": "out", "up": "out"}, "none", LLAMA2_7B),
    "sparsegpt": ("obs", LAYER, "obs", SMALL),
}
PATTERNS = (NM(2, 4), NM(4, 8), NM(16, 32), Unstructured(0.5))


@pytest.fixture
def counter():
    with pretended_device(), FakeTensorMode(), Counter(H100) as counter:
        yield counter


def counted(counter, function):
    """The operations of a piece of work."""
    before = counter.counts
    function()
    return counter.counts.since(before)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_agrees_with_the_counts(method, pattern):
    criterion, axis, update, sizes = METHODS[method]
    pruner = BlockPruner(Method(criterion, axis, pattern, update))
    counts, _ = counted_block(pruner, H100, sizes)
    assert 1 / 1.5 < planned_block(pruner, H100, sizes) / counts.seconds < 1.5
    assert counts.seconds >= max(counts.launching, counts.arithmetic, counts.traffic)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dass", "sparsegpt"])
def test_pruning_holds_one_group_of_projections_in_fp32(counter, method):
    criterion, axis, update, _ = METHODS[method]
    pruner, n_experts, width, f = BlockPruner(Method(criterion, axis, NM(2, 4), update)), 32, 64, 128
    with torch.device("cuda:0"):
        sizes = {"hidden_size": width, "intermediate_size": f, "num_local_experts": n_experts}
        config = MixtralConfig(num_hidden_layers=1, num_attention_heads=4, vocab_size=64, **sizes)
        block = find_blocks(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))[0]
    streams = open_streams(block, pruner.needs(block))
    before = counter.peak = counter.live
    pruned = pruner.prune(block, streams)
    weights = width * f
    assert len(pruned) == 3 * n_experts
    masks, group = 3 * n_experts * weights, 2 * weights * 4
    assert counter.peak - before < masks + 6 * group + 6 * 4 * f**2 < 3 * n_experts * weights * 4


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "n_blocks"),
    [("wanda", 4), pytest.param("dass", 80, marks=SLOW), pytest.param("sparsegpt", 80, marks=SLOW)],
)
def test_llama2_70b_streams_on_one_card(method, n_blocks):
    criterion, axis, update, _ = METHODS[method]
    pruner = BlockPruner(Method(criterion, axis, NM(2, 4), update))
    _, peak = counted_block(pruner, H100, LLAMA2_70B, n_blocks, streams=True)
    block, ends = 2 * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672), 2 * 2 * 32000 * 8192
    entering = 2 * 128 * 2048 * 8192
    assert 2 * block + ends + entering < peak < 80e9  # two blocks, and what enters one with what its attention gives


def test_a_streamed_model_holds_the_same_however_deep_it_is():
    pruner = BlockPruner(Method("wanda", IN, NM(2, 4)))
    peaks = {counted_block(pruner, H100, SMALL, n_blocks=n, streams=True)[1] for n in (3, 4, 9)}
    assert len(peaks) == 1


@pytest.mark.slow
def test_a_sweep_of_llama2_7b_takes_few_launches():
    counts, _ = counted_block(BlockPruner(Method("obs", LAYER, NM(2, 4), "obs")), H100)
    assert counts.launches <= 60_000 and counts.waits == 5


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("pattern", [NM(1, 2), NM(8, 16), NM(20, 40), Unstructured(0.5)], ids=str)
def test_masks_take_a_handful_of_launches(counter, pattern, axis):
    scores = torch.rand(80, 160, device="cuda")
    assert counted(counter, lambda: keep_most_important(scores, pattern, axis)).launches <= 5


def test_a_factorisation_holds_four_squares(counter):
    n, waits = 2048, counter.counts.waits
    stream = InputStream(n, torch.bfloat16, torch.device("cuda"), True)
    statistics = Statistics(hessian=stream.hessian)
    statistics.inverse(0.01)
    assert counter.peak <= 4.01 * 4 * n**2 and counter.live < 2.01 * 4 * n**2  # in the end what was summed, and U
    assert counter.counts.waits == waits + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_read_their_input_once(counter, dtype):
    stream = InputStream(4096, dtype, torch.device("cuda"), False)
    x = torch.rand(8, 512, 4096, device="cuda", dtype=dtype)
    size, before = x.numel() * x.element_size(), counter.live
    traffic = counted(counter, lambda: stream.add(x)).traffic * H100.bandwidth_gb_s * 1e9 * H100.efficiency
    assert size < traffic < 1.01 * size and counter.peak < before + 0.01 * size


@pytest.mark.parametrize(("dtype", "tflops"), [(torch.bfloat16, H100.tflops_16bit), (torch.float32, H100.tflops_fp32)])
def test_hessians_are_made_of_products_of_the_activations_own_dtype(counter, dtype, tflops):
    stream = InputStream(512, dtype, torch.device("cuda"), True)
    counts = counted(counter, lambda: stream.add(torch.rand(4, 100, 512, device="cuda", dtype=dtype)))
    flops = 2 * 400 * (256 * 512 + 256 * 256)
    assert counts.arithmetic == pytest.approx(flops / (tflops * 1e12 * H100.efficiency))
    assert stream.hessian().dtype == torch.float32


def test_products_are_counted_as_on_the_host(counter):
    a, b, c = (torch.rand(8, 8, device="cuda") for _ in range(3))
    rate = H100.tflops_fp32 * 1e12 * H100.efficiency
    for work, flops in [
        (lambda: a @ b, 1024),
        (lambda: c.addmm_(a, b), 1024),
        (lambda: c.addr_(a[0], b[0]), 128),
        (lambda: torch.linalg.cholesky_ex(a), 512 / 3),
        (lambda: torch.linalg.solve_triangular(a, b, upper=True), 512),
    ]:
        assert counted(counter, work).arithmetic == pytest.approx(flops / rate)
