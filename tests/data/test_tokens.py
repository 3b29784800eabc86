"""What tokenizers add, where models want a BOS, draws that fail or repeat, and windows beyond a model's positions."""

import pytest
import torch
from tokenizers import processors
from transformers import Gemma3Config

from dass.data.calibration import facts_of
from dass.data.tokens import default_bos, draw_documents, draw_joined, encode, require_positions
from dass.errors import DassError
from tests.data.test_calibration import documents, draws_of_the_reference
from tests.models import random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer, words


def tokenizer_with(template):
    tokenizer, special = tiny_tokenizer(), [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "<s> $A </s> <s>"])
def test_what_a_tokenizer_adds_behind_a_text_is_in_no_window(template):
    tokenizer, text = tokenizer_with(template), "w5 w6 </s> w7"
    begin = [1] if template.startswith("<s>") else []
    assert encode(tokenizer, text, "tokenizer").tolist() == [*begin, 5, 6, 2, 7]
    assert encode(tokenizer, "w5 </s>", "tokenizer").tolist() == [*begin, 5, 2]  # one that the text itself holds stays
    assert encode(tokenizer, text, "none").tolist() == [5, 6, 2, 7]
    assert encode(tokenizer, "", "tokenizer").tolist() == []
    windows = draw_joined([text] * 4, tokenizer, 2, 4 + len(begin), 0, "tokenizer")
    assert windows.tolist() == [[*begin, 5, 6, 2, 7]] * 2


@pytest.mark.parametrize(
    ("architecture", "bos_token", "expected"),
    [
        *[(name, "<s>", "per_sequence") for name in ("gemma", "gemma2", "gemma3", "gemma4_text")],
        *[(name, "<s>", "tokenizer") for name in ("llama", "qwen3", "gpt2")],
        ("gemma3", None, "tokenizer"),
    ],
)
def test_where_a_model_wants_a_bos(architecture, bos_token, expected):
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.bos_token = bos_token
    assert default_bos(tiny_model(architecture).config, lambda: tokenizer) == expected


def test_a_gemma_inside_of_another_config():
    assert default_bos(Gemma3Config(), tiny_tokenizer) == "per_sequence"


def test_documents_that_are_too_short_are_read_once(monkeypatch):
    tokenizer, texts, read = tiny_tokenizer(), documents([9] * 200), []

    def counted(*arguments):
        read.append(arguments[1])
        return encode(*arguments)

    monkeypatch.setattr("dass.data.tokens.encode", counted)
    with pytest.raises(DassError, match=r"none of the 200 documents is longer than 50 tokens \(the longest has 9\)"):
        draw_documents(texts, tokenizer, 2, 50, 0, "none")
    assert sorted(read) == sorted(texts)
    read.clear()
    texts += documents([60])  # now one is long enough, and the draws are the reference's
    drawn = draw_documents(texts, tokenizer, 3, 50, 0, "none")
    assert torch.equal(drawn, draws_of_the_reference(texts, tokenizer, 3, 50, 0)) and len(read) <= 203


def test_sequences_drawn_twice_are_counted_and_said(capsys):
    drawn = draw_documents([words(range(3, 15))], tiny_tokenizer(), 9, 10, 0, "none")  # one of two places each
    assert facts_of(drawn) == {"n_sequences": 9, "seq_len": 10, "repeated": 7}
    assert "note: 7 of the 9 calibration sequences were drawn before" in capsys.readouterr().err
    assert facts_of(drawn[:1])["repeated"] == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_bigcode", "gptj"])
@torch.no_grad()
def test_windows_longer_than_a_table_of_positions_are_refused(architecture, capsys):
    model = tiny_model(architecture)
    assert not require_positions(model, 128, "The windows")
    model(random_tokens(1, 128))
    with pytest.raises(DassError, match="The windows are sequences of 129 tokens, and the model has 128 positions"):
        require_positions(model, 129, "The windows")
    with pytest.raises((IndexError, RuntimeError)):
        model(random_tokens(1, 129))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "phi3", "mixtral", "falcon_serial"])
def test_windows_longer_than_rotary_positions_are_noted(architecture, capsys):
    # as many positions as there are tokens in the vocabulary: a matrix of that size is no table
    model = tiny_model(architecture, max_position_embeddings=96)
    assert not require_positions(model, 96, "The windows") and capsys.readouterr().err == ""
    assert require_positions(model, 97, "The windows")
    assert capsys.readouterr().err == "note: The windows are sequences of 97 tokens; the model was made for 96\n"
