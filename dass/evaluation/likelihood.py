"""Log-likelihoods of the choices of multiple-choice items, with what the choices of an item share computed once."""

from collections.abc import Iterable
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dass.errors import DassError
from dass.memory import Halved, attempted, half, note_halved
from dass.progress import progress


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
    model: PreTrainedModel, items: list[list[Choice]], batch_size: int, halved: Halved = note_halved
) -> list[list[float]]:
    """Of each item the log-likelihood of each choice's continuation behind its context [nats], summed over its tokens.

    Items of like length run together, `batch_size` choices at a time, but never less than an item. Where the memory of
    the device does not suffice, it is halved, which `halved` is told. DassError where a choice is empty, or where the
    memory does not suffice for an item.
    """
    if any(not choice.continuation for item in items for choice in item):
        raise DassError("A choice of the zero-shot items has no text: mend the items.", "evaluation.path")
    found: dict[int, list[float]] = {}
    waiting, bar = _batches(items, range(len(items)), batch_size), progress(None, "evaluation", "item", len(items))
    while waiting:
        batch = waiting[0]
        values = attempted(partial(_of_batch, model, [items[index] for index in batch]))
        if values is None:
            size = half(sum(len(items[index]) for index in batch) if len(batch) > 1 else 1, halved)
            waiting = _batches(items, [index for one in waiting for index in one], size)
            continue
        left = iter(values)
        found |= {index: [next(left) for _ in items[index]] for index in waiting.pop(0)}
        bar.update(len(batch))
    bar.close()
    return [found[index] for index in range(len(items))]


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


def _of_batch(model: PreTrainedModel, items: list[list[Choice]]) -> list[float]:
    """The log-likelihoods of all choices of some items.

    What is shared is cut to the shortest of the items, so that it needs no padding; the rest is padded on the right,
    which no token in front of it sees.
    """
    shared = min(map(_shared, items))
    cache = _cached(model, torch.tensor([item[0].context[:shared] for item in items])) if shared else None
    if cache is None:
        shared = 0
    else:
        owners = [index for index, item in enumerate(items) for _ in item]
        cache.batch_select_indices(torch.tensor(owners, device=model.device))
    choices = [choice for item in items for choice in item]
    rest = pad_sequence([torch.tensor(choice.read[shared:]) for choice in choices], batch_first=True)
    starts = [len(choice.context) - 1 - shared for choice in choices]  # the token that predicts a continuation's first
    first = min(starts)
    logits = model(
        rest.to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=rest.shape[1] - first,
    ).logits  # (n_choices, longest rest - first, vocabulary)
    values = []
    for row, start, choice in zip(logits, starts, choices, strict=True):
        own = row[start - first :][: len(choice.continuation)].float()
        target = torch.tensor(choice.continuation, device=own.device)
        values.append(-cross_entropy(own, target, reduction="sum").item())
    return values


def _cached(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """The keys and values of `(n_items, shared)` tokens; None where a model keeps another state than those."""
    cache = getattr(model.base_model(input_ids.to(model.device), use_cache=True), "past_key_values", None)
    is_plain = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", [None])
    )
    return cache if is_plain else None
