"""The walk over the decoder blocks: statistics with dense weights, prune, run the pruned block for the next one.

It knows the blocks in order, the activations that enter the current one, and the function that prunes a block.
Every block is run by its own forward, with the keyword arguments that the model's own forward gave it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.blocks import INPUT_OF_ROLE, Block, Projection, find_blocks
from dass.pruning.method import Pruned, Streams


class Pruner(Protocol):
    """What the walk asks of a method, or of several that are compared."""

    def check(self, blocks: list[Block]) -> None:
        """Refuse what does not fit these blocks."""

    def projections(self, block: Block) -> list[Projection]:
        """The projections of a block that may change."""

    def open_streams(self, block: Block) -> Streams:
        """Empty statistics for every input that must be seen in this block."""

    def prune(self, block: Block, streams: Streams) -> list[Pruned]:
        """Set the weights of a block, and say what was done to which projection."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block on hidden states `(batch, seq_len, d)`."""
        output = block.module(hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Activations:
    """What enters the current block."""

    batches: list[Tensor] = field(default_factory=list)
    """Hidden states, `(batch, seq_len, d)` each, in the model's dtype."""
    calls: list[list[Call]] = field(default_factory=list)
    """For each batch, the call of every block; batches that the model calls alike share them."""


@dataclass(frozen=True)
class FinishedBlock:
    """What a callback sees after each block."""

    index: int
    block: Block
    pruned: list[Pruned]
    seconds: float


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    pruner: Pruner,
    input_ids: Tensor | None,
    batch_size: int = 1,
    on_block: Callable[[FinishedBlock], None] = lambda finished: None,
) -> None:
    """Prune a causal language model in place, block by block.

    Args:
        model: any decoder that `find_blocks` understands, on one device.
        pruner: the method and its targets.
        input_ids: calibration tokens, `(n_sequences, seq_len)` int64; None is enough for a method without statistics.
        batch_size: sequences per forward.
        on_block: called after each block, with its masks.

    Raises:
        DassError: unknown layout, unfit pattern, missing calibration, non-finite numbers.
    """
    blocks = find_blocks(model)
    pruner.check(blocks)
    if not any(pruner.open_streams(block) for block in blocks):
        activations = None
    elif input_ids is None:
        raise DassError("This method needs calibration tokens: choose a `calibration`.")
    else:
        activations = enter_first_block(model, blocks, input_ids, batch_size)
    for index, block in enumerate(blocks):
        started = time.perf_counter()
        streams = pruner.open_streams(block)
        targets = pruner.projections(block)
        mixer = block.mixer
        if mixer is not None and any(p.linear is module for p in targets for module in mixer.modules()):
            mixer = None
        mixed = None
        if activations is not None and streams:
            mixed = [observe(block, mixer, streams, hidden, call) for hidden, call in _each(activations, index)]
            _require_all_tokens(block, streams, activations)
        pruned = pruner.prune(block, streams)
        if activations is not None and index + 1 < len(blocks):
            _advance(activations, index, block, mixer, mixed)
        on_block(FinishedBlock(index, block, pruned, time.perf_counter() - started))


def _each(activations: Activations, index: int) -> Iterator[tuple[Tensor, Call]]:
    """Every batch with the call of block `index`."""
    for hidden, calls in zip(activations.batches, activations.calls, strict=True):
        yield hidden, calls[index]


def _advance(activations: Activations, index: int, block: Block, mixer: nn.Module | None, mixed: list | None) -> None:
    """Run the pruned block, so that its outputs take the place of its inputs; replay the mixer where it was kept."""
    for i, (hidden, call) in enumerate(_each(activations, index)):
        if mixer is None or mixed is None or mixed[i] is None:
            activations.batches[i] = call(block, hidden)
        else:
            with replaced_forward(mixer, lambda *_, output=mixed[i], **__: output):
                activations.batches[i] = call(block, hidden)
            mixed[i] = None


def _require_all_tokens(block: Block, streams: Streams, activations: Activations) -> None:
    """Statistics of a part of the tokens, or of none, would give a mask without a warning."""
    expected = sum(hidden.shape[:-1].numel() for hidden in activations.batches)
    for source, stream in streams.items():
        if stream.n_tokens != expected:
            raise DassError(
                f"{block.name} has an unknown layout: its {source} passed {stream.n_tokens} of {expected} tokens to "
                f"the layers that should read it; extend dass/pruning/blocks.py."
            )


class _Stop(Exception):
    """Ends a forward at the input of the down projection; nothing behind it is needed yet."""


def observe(block: Block, mixer: nn.Module | None, streams: Streams, hidden: Tensor, call: Call) -> Any:
    """Run a dense block up to its down projection and add what its projections read to the statistics.

    Returns:
        What `mixer` returned, to be replayed once the MLP is pruned, or None: without a mixer, or where it had not run
        by then, so that its output might depend on the MLP.
    """
    mixed = None

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal mixed
        mixed = (output[0], *(None for _ in output[1:])) if isinstance(output, tuple) else output

    def add(source: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, arguments: streams[source].add(arguments[0])

    def stop(module: nn.Module, arguments: tuple[Tensor]) -> None:
        if "intermediate" in streams:
            streams["intermediate"].add(arguments[0])
        raise _Stop

    reader = {INPUT_OF_ROLE[role]: p.linear for role, p in reversed(block.projections.items())}
    hooks = [reader[source].register_forward_pre_hook(add(source)) for source in streams if source != "intermediate"]
    hooks.append(reader["intermediate"].register_forward_pre_hook(stop))
    if mixer is not None:
        hooks.append(mixer.register_forward_hook(keep))
    try:
        call(block, hidden)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return mixed


def enter_first_block(model: PreTrainedModel, blocks: list[Block], input_ids: Tensor, batch_size: int) -> Activations:
    """Embed all sequences and record how the model calls each block; only the first block runs, once.

    In place of the others stands a stub that hands its input on, so this costs next to nothing.

    Args:
        input_ids: `(n_sequences, seq_len)` int64.
    """
    activations = Activations()
    tail: tuple[Any, ...] | None = None
    wraps = False

    def stub(index: int, calls: list[Call]) -> Callable[..., Any]:
        original = blocks[index].module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            nonlocal tail, wraps
            hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
            calls.append(Call(rest, keywords))
            if index == 0:
                activations.batches.append(hidden)
            if tail is None:  # whether blocks return tuples, and what else is in them, only a real run can tell
                output = original(hidden, *rest, **keywords)
                wraps = isinstance(output, tuple)
                tail = output[1:] if wraps else ()
            return (hidden, *tail) if wraps else hidden

        return forward

    for batch in input_ids.split(batch_size):
        calls: list[Call] = []
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(replaced_forward(block.module, stub(index, calls)))
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
        if len(calls) != len(blocks):
            raise DassError(
                f"The model runs {len(calls)} of the {len(blocks)} blocks that were found: check its config."
            )
        alike = (earlier for earlier in reversed(activations.calls) if _alike(earlier, calls))
        activations.calls.append(next(alike, calls))
    return activations


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls (or arguments of calls) hold the same values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Call):
        return _alike(one.arguments, other.arguments) and _alike(one.keywords, other.keywords)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
