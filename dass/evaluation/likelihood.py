"""Log-likelihoods of the choices of multiple-choice items, with what the choices of an item share computed once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat, takewhile
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dass.errors import DassError
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
    model: PreTrainedModel, tasks: list[list[list[Choice]]], batch_size: int, shelf: Shelf | None = None
) -> Iterator[list[list[float]]]:
    """Of each item the log-likelihood of each choice's continuation behind its context [nats], summed over its tokens.

    Items of like length run together, `batch_size` choices at a time, but never less than an item.

    Args:
        tasks: items, of which only those of one list run together.
        shelf: of a model whose blocks lie on disk; the items of all tasks go through one after the other.

    Yields:
        What one list has, as soon as it is known.

    Raises:
        DassError: a choice is empty.
    """
    if any(not choice.continuation for items in tasks for item in items for choice in item):
        raise DassError("A choice of the zero-shot items has no text: mend the items.", "evaluation.path")
    by_task = [_batches(items, batch_size) for items in tasks]
    batches: Iterator[_Batch] = (
        _Batch(model, [items[index] for index in numbers])
        for items, own in zip(tasks, by_task, strict=True)
        for numbers in own
    )
    ready: Iterator[AbstractContextManager[object]] = repeat(nullcontext())
    if shelf is not None:
        whole = list(batches)
        batches, ready = iter(whole), _block_by_block(whole, shelf)
    bar = progress(None, "evaluation", "batch", sum(map(len, by_task)))
    for items, own in zip(tasks, by_task, strict=True):
        found: dict[int, list[float]] = {}
        for numbers, batch, prepared in zip(own, batches, ready, strict=False):
            if shelf is None:
                batch.read_shared()
            with prepared:
                values = iter(batch.score())
            found |= {index: [next(values) for _ in items[index]] for index in numbers}
            bar.update()
        yield [found[index] for index in range(len(items))]
    bar.close()


def _batches(items: list[list[Choice]], batch_size: int) -> list[list[int]]:
    """The numbers of the items of each batch, the longest first, where memory shows whether it suffices."""

    def lengths(index: int) -> tuple[int, int]:
        return max(len(choice.read) for choice in items[index]), _shared(items[index])

    batches: list[list[int]] = []
    for index in sorted(range(len(items)), key=lengths, reverse=True):
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


def _block_by_block(batches: list[_Batch], shelf: Shelf) -> Iterator[AbstractContextManager[object]]:
    """Run all batches through one block after the other; yields for each the context to score it in.

    The keys and values of a block are there only while it runs the rest of the same batch.
    """
    forwards: list[Forward] = []
    then: list[Forward] = []  # done behind each block
    for batch in batches:
        if batch.cache is not None:
            forwards.append(batch.run_shared)
            then.append(batch.select)
        forwards.append(batch.run_rest)
        then.append(batch.cache.reset if batch.cache is not None else lambda: None)
    ready = block_by_block(shelf.model, shelf.blocks, forwards, shelf.hold, shelf.folder, lambda i: then[i]())
    for forward, prepared in zip(forwards, ready, strict=True):
        if forward.__name__ == "run_rest":
            yield prepared


def _cache_of(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache; None where a model keeps another state than keys and values of each block."""
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    whole = len(cache.layers) == model.config.get_text_config().num_hidden_layers
    return cache if whole and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None
