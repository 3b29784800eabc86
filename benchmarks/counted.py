"""What a GPU would do for one block, counted on one that is not there: launches, waits, memory, and seconds from them.

torch's fake tensors have a device and a shape, but no values, so all of the code runs in seconds and none of its work
is done. Each operation then takes the longest of its launch, its arithmetic and its traffic, see `Device`.
"""

import ctypes
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dass.planning.architecture import read_architecture
from dass.planning.costs import SORT_PASSES, Workload, plan_pruning
from dass.planning.devices import Device
from dass.pruning import parked
from dass.pruning.blocks import Block, Hold, resident
from dass.pruning.layout import find_blocks
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import walk
from dass.streaming import Shelf

aten = torch.ops.aten
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA2_70B = LLAMA2_7B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
LLAMA2_70B |= {"num_key_value_heads": 8}
CALIBRATION, BATCH = (128, 2048), 16
FREE = (aten.detach, aten.unbind, aten.split, aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty)
CUDA, META = 1, 14  # of torch's enumeration of devices


@dataclass(frozen=True)
class Counts:
    """What was counted up to some moment, or between two."""

    launches: int = 0
    """Operations that are no views."""
    waits: int = 0
    """Values that the host waited for."""
    launching: float = 0
    """Seconds that the launches alone take."""
    arithmetic: float = 0
    """Seconds of the products, one after the other."""
    traffic: float = 0
    """Seconds in which all operands are read and all results written."""
    seconds: float = 0
    """The sum of the longest of the three of each operation."""

    def since(self, before: "Counts") -> "Counts":
        """What came after another moment."""
        return Counts(**{name: value - vars(before)[name] for name, value in vars(self).items()})


class Counter(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that are alive."""

    def __init__(self, device: Device) -> None:
        """`device`: the one that the seconds are those of."""
        super().__init__()
        self.device, self.counts = device, Counts()
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation; a value that the host asks for is 1."""
        if func is aten._local_scalar_dense.default:
            self.counts = replace(self.counts, waits=self.counts.waits + (args[0].device.type != "cpu"))
            return 1 if not args[0].is_floating_point() else 1.0
        if func is aten.equal.default:
            self.counts = replace(self.counts, waits=self.counts.waits + 1)
            return True
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # what a fake tensor is asked for
            return result
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        on_device = any(one.fake_device.type == "cuda" for one in made if hasattr(one, "fake_device"))
        if on_device and not func.is_view and func.overloadpacket not in FREE:
            self._add(func, args, kwargs or {}, given, made)
        if on_device:
            for one in made:
                self._note(one)
        return result

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]) -> None:
        device, packet = self.device, func.overloadpacket
        flops = flops_of(packet, args, kwargs, made)
        in_16bit = bool(given) and given[-1].element_size() == 2
        rate = (device.tflops_16bit if in_16bit else device.tflops_fp32) * 1e12 * device.efficiency
        moved = sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in [*given, *made])
        if packet is aten.sort and made[0].shape[-1] > 1024:  # shorter ones are sorted inside a multiprocessor
            moved *= SORT_PASSES
        launch, arithmetic = device.launch_us / 1e6, flops / rate
        traffic, old = moved / (device.bandwidth_gb_s * 1e9 * device.efficiency), self.counts
        self.counts = Counts(
            old.launches + 1,
            old.waits,
            old.launching + launch,
            old.arithmetic + arithmetic,
            old.traffic + traffic,
            old.seconds + max(launch, arithmetic, traffic),
        )

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


def flops_of(packet: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> float:
    """The floating-point operations of products, factorisations and solves; 0 of all else."""
    if packet is aten.addr_:
        return 2 * args[0].numel()
    if packet is aten.addmm_:
        return 2 * prod(args[1].shape) * args[2].shape[1]
    if packet is aten.linalg_cholesky_ex:
        return len(args[0]) ** 3 / 3
    if packet is aten.linalg_solve_triangular:
        return prod(args[0].shape) * args[1].shape[1]
    return flop_registry[packet](*args, **kwargs, out_val=made[0]) if packet in flop_registry else 0.0


class Flash(TorchFunctionMode):
    """Attention in one operation, as GPUs have it; a pretended one is given the products one by one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the one function."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_device() -> Iterator[None]:
    """Let fake tensors be on `cuda` also where torch is built without it.

    Such a build lacks the hook that changes devices: it is lent that of `meta`, which does nothing. It also answers for
    the current device, so the pretended one goes by its index.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]
    try:
        yield
    finally:
        guards[CUDA] = None


def llama(n_blocks: int, sizes: dict[str, int]) -> LlamaConfig:
    """The config of a LLaMA-like model."""
    return LlamaConfig(num_hidden_layers=n_blocks, attn_implementation="sdpa", **sizes)


class PretendedShelf(Shelf):
    """A shelf whose weights are made up when they are read, in the thread that asks for them."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Give up the memory of all blocks."""
        super().__init__(model, find_blocks(model), {}, {}, Path())
        self._disk = AtOnce()
        for block in self.blocks:
            self.drop(block)

    def _read(self, block: Block) -> dict[str, Tensor]:
        named = block.module.named_parameters()
        return {f"{block.name}.{name}": torch.empty_like(p, device="cuda:0") for name, p in named}


class AtOnce(Executor):
    """Does what it is given before it returns: pretended devices are known to one thread only."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do it."""
        done = Future[Any]()
        done.set_result(function(*args, **kwargs))
        return done


@torch.no_grad()
def counted_block(
    pruner: BlockPruner, device: Device, sizes: dict[str, int] = LLAMA2_7B, n_blocks: int = 2, streams: bool = False
) -> tuple[Counts, int]:
    """One block of the walk, in bf16: pruned, run, and the next one observed; and the most bytes beyond the weights.

    Args:
        sizes: of the LLaMA-like model.
        n_blocks: of the model.
        streams: the blocks come from disk, as `memory=stream` has it, and all weights on the device count, too.
    """
    counter = Counter(device)

    def free_memory(place: torch.device) -> int:
        return int(device.memory_gb * 1e9) - (counter.live if place.type == "cuda" else 0)

    with pretended_device(), patch.object(parked, "free_memory", free_memory), FakeTensorMode(), Flash(), counter:
        with torch.device("cuda:0"):
            config = llama(n_blocks, sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        weights = counter.live
        hold: Hold = resident
        if streams:
            hold, weights = PretendedShelf(model).hold, 0
        steps = walk(model, torch.zeros(CALIBRATION, dtype=torch.int64), pruner.needs, BATCH, hold=hold)
        step = next(steps)
        counter.peak, before = counter.live, counter.counts
        pruner.prune(step.block, step.streams)
        del step
        next(steps)
        return counter.counts.since(before), counter.peak - weights


def planned_block(pruner: BlockPruner, device: Device, sizes: dict[str, int] = LLAMA2_7B) -> float:
    """The seconds that `dass.planning` expects of such a block."""
    work = Workload("bfloat16", *CALIBRATION, BATCH)

    def planned(n_blocks: int) -> float:
        stages = plan_pruning(read_architecture(llama(n_blocks, sizes)), pruner, work)
        return sum(stage.seconds(device, work.dtype) for stage in stages)

    return planned(3) - planned(2)
