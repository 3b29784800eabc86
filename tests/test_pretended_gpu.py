"""Everything between loading and writing on a GPU that is not there.

torch's fake tensors have a device, a dtype and a shape, but no values, and raise where devices are mixed. Where the
host asks for a value it would wait for the device: `Host` answers with a constant, and counts. It also raises where a
product mixes dtypes, which a GPU refuses.

Not covered: the values; the kernels; what safetensors writes of such tensors; loading.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counted import pretended_device
from dass.evaluation.perplexity import perplexity, window_losses
from dass.pruning import pruner as pruning
from dass.pruning import statistics
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.call import Call
from dass.pruning.comparison import compare_block, comparison_needs
from dass.pruning.masks import NM, Mask, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import InputStream
from dass.pruning.walk import prune_model, walk
from dass.saving import round_to, save_model
from dass.sparsity import PackedMasks, apply_masks
from tests.models import random_tokens, tiny_model

aten = torch.ops.aten
IN = dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in")
LAYER = dict.fromkeys(IN, "layer")
DASS = {**IN, "gate": "out", "up": "out"}
METHODS = {
    "magnitude": ("magnitude", LAYER, "none"),
    "wanda": ("wanda", IN, "none"),
    "dass": ("dass", DASS, "none"),
    "sparsegpt": ("obs", LAYER, "obs"),
    "dass with obs": ("dass", DASS, "obs"),
}
PATTERNS = (NM(2, 4), Unstructured(0.5))
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.addr_, aten.baddbmm}
BLOCKS, BATCHES = 2, 2
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 8, "intermediate_size": 16, "layer_types": None}
EXPERTS = {"num_hidden_layers": 1, "num_local_experts": 2}


class Host(TorchDispatchMode):
    """Answers what only values could tell, and counts what the host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS and len({a.dtype for a in args if isinstance(a, torch.Tensor)}) > 1:
            raise RuntimeError(f"{func} of more than one dtype")
        if func is aten._local_scalar_dense.default:
            self.waits["value"] += args[0].device.type != "cpu"
            return self.value(args[0])
        if func is aten.equal.default:
            self.waits["equal"] += 1
            return True
        if func is aten.nonzero.default:  # all of them, in any order
            self.waits["nonzero"] += 1
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for index in args[1] for part in self.places(index)], *args[2:])
        if func is aten._to_copy.default:
            self.waits["copy"] += torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        if func is aten.copy_.default:
            self.waits["copy"] += args[0].device != args[1].device
        result = func(*args, **kwargs)
        if func is aten.unbind.int and result[0].dtype == torch.int64:  # a loop over the experts that were hit
            for i, one in enumerate(result):
                one.known = i
        elif func is aten.select.int and hasattr(args[0], "known"):
            result.known = args[0].known
        elif func is aten.eq.Scalar and hasattr(args[0], "known"):  # whether it is the one that stands for none
            result.known = args[0].known == args[1]
        return result

    def value(self, tensor):
        """True, 1 or 1.0, unless we know better."""
        kind = bool if tensor.dtype == torch.bool else float if tensor.is_floating_point() else int
        return kind(getattr(tensor, "known", 1))

    def places(self, index):
        """A boolean index as indices, all of them."""
        if index is None or index.dtype != torch.bool:
            return [index]
        self.waits["boolean index"] += 1
        return [index.new_zeros(index.numel(), dtype=torch.int64)] * index.ndim


@pytest.fixture(autouse=True)
def device_guard():
    with pretended_device():
        yield


@contextmanager
def pretended(architecture):
    """A tiny model in bf16 on the pretended GPU, and the host."""
    host, sizes = Host(), SIZES | (EXPERTS if architecture == "mixtral" else {})
    with FakeTensorMode(), host:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda:0"):
                model = tiny_model(architecture, torch.bfloat16, **sizes)
        finally:
            torch.set_default_dtype(torch.float32)
        host.waits.clear()
        yield model, host


def prune(model, method="dass", pattern=PATTERNS[0], targets="mlp"):
    criterion, axis, update = METHODS[method]
    pruner = BlockPruner(Method(criterion, axis, pattern, update), targets)
    return prune_model(model, pruner, random_tokens(2 * BATCHES, 8), batch_size=2)


@pytest.mark.parametrize("targets", ["mlp", "all"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_the_walk_stays_on_the_device(architecture, method, pattern, targets):
    with pretended(architecture) as (model, host):
        masks = prune(model, method, pattern, targets)
        assert {(mask.keep.device.type, mask.keep.dtype) for mask in masks.values()} == {("cuda", torch.bool)}
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    if architecture == "mixtral":
        assert len(masks) == 2 * 3 + 4 * (targets == "all")
        return
    # before a block is changed, and when it is done; with a Hessian, once for each input of a projection
    per_block = 2 + (METHODS[method][2] == "obs") * (2 if targets == "mlp" else 4)
    # once: the tokens go to the device; the calls of each batch are compared with those of the one before
    once = {"copy": 1, "value": BATCHES - 1} if method != "magnitude" else {}
    # once for each block whose attention stays: whether what it gives may take the place of what entered
    tried = Counter(equal=BLOCKS * (method != "magnitude" and targets == "mlp"))
    assert host.waits == Counter(once) + Counter(value=BLOCKS * per_block) + tried
    assert METHODS[method][2] == "obs" or per_block <= 4


def test_comparing_methods():
    pruners = {n: BlockPruner(Method(c, a, PATTERNS[0], u)) for n, (c, a, u) in METHODS.items()}
    with pretended("llama") as (model, _):
        for step in walk(model, random_tokens(4, 8), partial(comparison_needs, pruners), 2):
            assert compare_block(pruners, step.block, step.streams, step.outputs).errors.keys() == pruners.keys()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_evaluation(architecture):
    with pretended(architecture) as (model, _):
        if architecture == "mixtral":  # other implementations ask what the GPU can do
            model.set_experts_implementation("eager")
        assert window_losses(model, random_tokens(2, 8).to("cuda:0")).device.type == "cuda"
        assert perplexity(model, random_tokens(4, 8).split(2)).seq_len == 8


def test_masks(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "numpy", on_the_host)
    with pretended("llama") as (model, host):
        masks, packed = prune(model), PackedMasks()
        host.waits.clear()
        for name, mask in masks.items():
            packed.add(name, mask)
        # one for what its groups keep, one for its bytes
        assert host.waits == {"value": len(masks), "copy": len(masks)}
        apply_masks(model, {name: Mask(mask.keep.cpu(), mask.pattern, mask.axis) for name, mask in masks.items()})
    assert packed.about.keys() == masks.keys()


@contextmanager
def on_two_devices(architecture, behind=()):
    """A model whose second block, and these parts behind it, are on a second device."""
    with pretended(architecture) as (model, _):
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda:1"):
                other = tiny_model(architecture, torch.bfloat16, **SIZES)
        finally:
            torch.set_default_dtype(torch.float32)
        for path in ("model.layers.1", *behind):
            model.set_submodule(path, other.get_submodule(path))
        yield model


@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", method) for method in METHODS] + [("gemma3", "wanda"), ("llama", "adaptive")]
)
def test_the_walk_follows_the_blocks_from_device_to_device(architecture, method):
    with on_two_devices(architecture) as model:
        if method == "adaptive":
            candidates = {n: BlockPruner(Method(n, METHODS[n][1], PATTERNS[0])) for n in ("wanda", "dass")}
            masks = prune_model(model, AdaptivePruner(candidates), random_tokens(4, 8), 2)
        else:
            masks = prune(model, method, PATTERNS[0], "all")
        assert {(str(mask.keep.device), "layers.1" in name) for name, mask in masks.items()} == {
            ("cuda:0", False),
            ("cuda:1", True),
        }


def test_a_model_that_accelerate_spreads():
    behind = ("model.norm", "lm_head")
    with on_two_devices("llama", behind) as model:
        before = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cuda:0")
        dispatch_model(model, before | dict.fromkeys(("model.layers.1", *behind), "cuda:1"), main_device="cuda:0")
        assert len(prune(model)) == 2 * 3
        assert perplexity(model, random_tokens(4, 8).split(2)).seq_len == 8


def on_the_host(tensor):
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, bool)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_saving(dtype, tmp_path, monkeypatch):
    """Up to what safetensors writes."""
    seen = set()

    def save_pretrained(folder, max_shard_size):
        seen.update((str(p.dtype), p.device.type) for p in model.parameters())
        (folder / "config.json").write_text("{}")

    with pretended("llama") as (model, _):
        monkeypatch.setattr(model, "save_pretrained", save_pretrained)
        round_to(model, dtype)
        save_model(model, tmp_path / "saved", "", "fingerprint", dtype)
        assert seen == {(f"torch.{dtype}", "cuda")}
        assert model.lm_head.weight.dtype == torch.bfloat16


def on_the_cpu(original, *arguments, **keywords):
    return original(*arguments, **keywords).cpu()


def in_fp64(original, *arguments, **keywords):
    return original(*arguments, **keywords).double()


def streams_on_the_cpu(original, self, features, dtype, device, with_hessian):
    original(self, features, dtype, torch.device("cpu"), with_hessian)


def mask_on_the_cpu(original, *arguments):
    mask = original(*arguments)
    return Mask(mask.keep.cpu(), mask.pattern, mask.axis)


def factor_in_fp64(original, *arguments):
    inverse = original(*arguments)
    return statistics.DampedInverse(inverse.factor.double(), inverse.dead, inverse.damping, inverse.attempts)


@pytest.mark.parametrize(
    ("owner", "name", "planted", "method"),
    [
        (InputStream, "__init__", streams_on_the_cpu, "wanda"),
        (InputStream, "norm", on_the_cpu, "dass"),
        (InputStream, "hessian", on_the_cpu, "sparsegpt"),
        (pruning, "select_mask", mask_on_the_cpu, "magnitude"),
        (statistics, "damped_inverse", factor_in_fp64, "sparsegpt"),
        (Call, "__call__", in_fp64, "wanda"),
    ],
)
def test_a_planted_fault_is_found(owner, name, planted, method, monkeypatch):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **keywords: planted(original, *arguments, **keywords))
    with pretended("llama") as (model, _), pytest.raises(RuntimeError, match=r"device|dtype"):
        prune(model, method)
