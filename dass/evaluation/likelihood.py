"""Log-likelihoods of the choices of multiple-choice items, with what the choices of an item share computed once."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dass.errors import DassError
from dass.memory import Halved, attempted, half, note_halved
from dass.progress import progress
from dass.pruning.calls import Forward, block_by_block
from dass.streaming import Shelf


class Choice(NamedTuple):
    """One answer to an item."""

    context: list[int]  # token ids
    continuation: list[int]

    @property
    def read(self) -> list[int]:
        """The tokens that the model reads: nothing is predicted from the last."""
        return (self.context + self.continuation)[:-1]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tasks: list[list[list[Choice]]],
    batch_size: int,
    shelf: Shelf | None = None,
    halved: Halved = note_halved,
) -> Iterator[list[list[float]]]:
    """Of each item the log-likelihood of each choice's continuation behind its context [nats], summed over its tokens.

    Items of like length run together, `batch_size` choices at a time, but never less than an item.

    Args:
        tasks: items, of which only those of one list run together.
        shelf: of a model whose blocks lie on disk; the items of all tasks go through one after the other.
        halved: is told of a smaller batch size, from where on the memory of the device does not suffice for it.

    Yields:
        What one list has, as soon as it is known.

    Raises:
        DassError: a choice is empty, or the memory does not suffice for an item.
    """
    if any(not choice.continuation for items in tasks for item in items for choice in item):
        raise DassError("A choice of the zero-shot items has no text: mend the items.", "evaluation.path")
    streamed = None if shelf is None else _streamed(model, tasks, batch_size, shelf)
    bar = progress(None, "evaluation", "item", sum(map(len, tasks)))
    for items in tasks:
        found: dict[int, list[float]] = {}
        waiting = _batches(items, range(len(items)), batch_size)
        while waiting:
            numbers = waiting[0]
            score = partial(_scored, model, [items[index] for index in numbers])
            values = attempted(score if streamed is None else partial(next, streamed))
            if values is None:  # of streamed ones only the head is left, or all would have to begin again
                size = sum(len(items[index]) for index in numbers) if streamed is None and len(numbers) > 1 else 1
                batch_size = half(size, halved)
                waiting = _batches(items, chain(*waiting), batch_size)
                continue
            left = iter(values)
            found |= {index: [next(left) for _ in items[index]] for index in waiting.pop(0)}
            bar.update(len(numbers))
        yield [found[index] for index in range(len(items))]
    bar.close()


def _batches(items: list[list[Choice]], chosen: Iterable[int], batch_size: int) -> list[list[int]]:
    """The numbers of the chosen items of each batch, the longest first, where memory shows whether it suffices."""

    def lengths(index: int) -> tuple[int, int]:
        return max(len(choice.read) for choice in items[index]), _shared(items[index])

    batches: list[list[int]] = []
    for index in sorted(chosen, key=lengths, reverse=True):
        if not batches or sum(len(items[other]) for other in [*batches[-1], index]) > batch_size:
            batches.append([])
        batches[-1].append(index)
    return batches


def _shared(item: list[Choice]) -> int:
    """So many tokens all choices begin with, but for the last of a context: a continuation is predicted from it."""
    *contexts, _ = zip(*(choice.context for choice in item), strict=False)  # token by token, to the shortest
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, contexts))


class _Batch:
    """Some items that run together: what their choices share first, once, then the rest of every choice.

    What is shared is cut to the shortest of the items, so that it needs no padding; the rest is padded on the right,
    which no token in front of it sees.
    """

    def __init__(self, model: PreTrainedModel, items: list[list[Choice]]) -> None:
        self.model, self.choices = model, list(chain(*items))
        self.shared = min(map(_shared, items))
        self.cache = _cache_of(model) if self.shared else None
        if self.cache is None:
            self.shared = 0
        self.begin = torch.tensor([item[0].context[: self.shared] for item in items])  # (n_items, shared)
        rest = [torch.tensor(choice.read[self.shared :]) for choice in self.choices]
        self.rest = pad_sequence(rest, batch_first=True)  # (n_choices, longest)
        self.owners = torch.tensor([index for index, item in enumerate(items) for _ in item])

    def read_shared(self) -> None:
        """Have the keys and values of what is shared, those of its item for each choice."""
        if self.cache is not None:
            self.run_shared()
            self.select()

    def run_shared(self) -> None:
        self.model.base_model(self.begin.to(self.model.device), past_key_values=self.cache, use_cache=True)

    def select(self) -> None:
        """Let each choice have the keys and values of its item."""
        assert self.cache is not None
        self.cache.batch_select_indices(self.owners.to(self.model.device))

    def run_rest(self) -> None:
        """Run the rest as if what is shared had been run: of its keys and values only the length counts, for now."""
        if self.cache is not None:
            self.cache.reset()
            blank = torch.zeros(1, 1, self.shared, 1, device=self.model.device)
            for index in range(len(self.cache.layers)):
                self.cache.update(blank, blank, index)
        rest = self.rest.to(self.model.device)
        self.model.base_model(rest, past_key_values=self.cache, use_cache=self.cache is not None)
        if self.cache is not None:
            self.cache.reset()

    def score(self) -> list[float]:
        """The log-likelihoods of all choices."""
        starts = [len(choice.context) - 1 - self.shared for choice in self.choices]  # what predicts a continuation
        first = min(starts)
        logits = self.model(
            self.rest.to(self.model.device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=self.rest.shape[1] - first,
        ).logits  # (n_choices, longest rest - first, vocabulary)
        values = []
        for row, start, choice in zip(logits, starts, self.choices, strict=True):
            own = row[start - first :][: len(choice.continuation)].float()
            target = torch.tensor(choice.continuation, device=own.device)
            values.append(-cross_entropy(own, target, reduction="sum").item())
        return values


def _scored(model: PreTrainedModel, items: list[list[Choice]]) -> list[float]:
    """The log-likelihoods of all choices of some items."""
    batch = _Batch(model, items)
    batch.read_shared()
    return batch.score()


def _streamed(
    model: PreTrainedModel, tasks: list[list[list[Choice]]], batch_size: int, shelf: Shelf
) -> Iterator[list[float]]:
    """The same of each batch of each task, all of them run through one block after the other.

    The keys and values of a block are there only while it runs the rest of the same batch.
    """
    forwards: list[Forward] = []
    then: list[Forward] = []  # done behind each block
    batches = []
    for items in tasks:
        for numbers in _batches(items, range(len(items)), batch_size):
            batches.append(batch := _Batch(model, [items[index] for index in numbers]))
            if batch.cache is not None:
                forwards.append(batch.run_shared)
                then.append(batch.select)
            forwards.append(batch.run_rest)
            then.append(batch.cache.reset if batch.cache is not None else lambda: None)
    ready = block_by_block(
        shelf.model, shelf.blocks, forwards, shelf.hold, shelf.folder, done=lambda index: then[index]()
    )
    left = iter(batches)
    for forward, prepared in zip(forwards, ready, strict=True):
        if forward.__name__ == "run_rest":
            with prepared:
                yield next(left).score()


def _cache_of(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache; None where a model keeps another state than keys and values of each block."""
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    whole = len(cache.layers) == model.config.get_text_config().num_hidden_layers
    return cache if whole and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None
