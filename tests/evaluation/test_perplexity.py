"""Perplexity against the model's own loss on the same windows, and the protocol of the pruning papers."""

import copy
import hashlib
import math
import re
from pathlib import Path

import pytest
import torch

from dass.data.sources import SOURCES, wikitext2
from dass.errors import DassError
from dass.evaluation import perplexity as module
from dass.evaluation.perplexity import evaluation_windows, perplexity, window_losses
from tests.models import ARCHITECTURES, LAYOUTS, random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer, words

SHARED = Path(__file__).parents[3] / "shared" / "data" / "wikitext2"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("logits_at_once", [1, 1000, 2**24])
@torch.no_grad()
def test_equals_the_models_own_loss(architecture, logits_at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits_at_once)
    model, windows = tiny_model(architecture), random_tokens(5, 24)
    result = perplexity(model, windows.split(2))
    losses = torch.stack([model(input_ids=window[None], labels=window[None]).loss for window in windows]).double()
    torch.testing.assert_close(torch.tensor(result.losses, dtype=torch.float64), losses, rtol=1e-5, atol=1e-6)
    assert result.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert result.stderr == pytest.approx((losses.mean().exp() * losses.std() / 5**0.5).item(), rel=1e-4)
    assert (result.seq_len, result.tokens) == (24, 120)


@pytest.mark.parametrize("architecture", LAYOUTS)
@torch.no_grad()
def test_every_layout_equals_the_loss_of_its_full_logits(architecture, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 96 * 3 * 5)
    model, windows = tiny_model(architecture), random_tokens(3, 24)
    if model.get_output_embeddings().bias is not None:
        model.get_output_embeddings().bias.normal_(generator=torch.Generator().manual_seed(1))
    log_probs = model(windows).logits[:, :-1].double().log_softmax(-1)
    expected = -log_probs.gather(-1, windows[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(window_losses(model, windows), expected, rtol=1e-5, atol=1e-6)


def test_a_model_whose_forward_goes_around_its_decoder_is_refused():
    """A stand-in for the decoder that is never called would leave chunks without their context."""
    model = tiny_model()
    stranger = copy.deepcopy(model.model)
    stranger.embed_tokens = model.model.embed_tokens
    model.get_decoder = lambda: stranger
    with pytest.raises(DassError, match="LlamaForCausalLM goes another way than its decoder"):
        window_losses(model, random_tokens(1, 8))
    with pytest.raises(DassError, match="LlamaModel does not tell its decoder from its head"):
        window_losses(tiny_model().model, random_tokens(1, 8))


@torch.no_grad()
def test_logits_never_exist_for_a_whole_window(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 96 * 2 * 5)
    model, sizes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda m, a, output: sizes.append(output.numel()))
    perplexity(model, random_tokens(4, 24).split(2))
    assert max(sizes) == 96 * 2 * 5 and sum(sizes) == 4 * 23 * 96


def test_windows_of_a_text(tmp_path):
    path, tokenizer = tmp_path / "text.txt", tiny_tokenizer(adds_bos=True)
    path.write_text(words(range(10, 40)))
    first = evaluation_windows("text_file", tokenizer, path, 10, None, "tokenizer")
    assert first.tolist() == [[1, *range(10, 19)], [*range(19, 29)], [*range(29, 39)]]
    each = evaluation_windows("text_file", tokenizer, path, 10, 2, "per_sequence")
    assert each.tolist() == [[1, *range(10, 19)], [1, *range(19, 28)]]
    with pytest.raises(DassError, match="30 tokens are 3 whole windows of 10, and 4"):
        evaluation_windows("text_file", tokenizer, path, 10, 4, "none")
    with pytest.raises(DassError, match="at least 2"):
        evaluation_windows("text_file", tokenizer, path, 1, None, "none")
    for name, says in [("text_file", "needs a file"), ("nosuch", "unknown")]:
        with pytest.raises(DassError, match=says):
            evaluation_windows(name, tokenizer, None, 10, None, "none")


def test_wikitext_rows_are_joined_as_the_papers_do(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = w10 = \n \n w11 w12 \n")
    assert "\n\n".join(wikitext2("evaluation", path)) == "\n\n = w10 = \n\n\n\n\n w11 w12 \n"


@pytest.mark.skipif(not SHARED.exists(), reason="the official text does not come with the repository")
def test_wikitext2_test_split_is_the_official_text():
    text = "\n\n".join(SOURCES["wikitext2"].documents("evaluation", SHARED / "wiki.test.raw", None))
    assert len(text) == 1_294_336
    sha256 = re.search(r"has 1,294,336 characters.*?SHA-256 `(\w+)`", (SHARED.parent / "README.md").read_text(), re.S)
    assert hashlib.sha256(text.encode()).hexdigest() == sha256[1]


@torch.no_grad()
def test_a_broken_model_gives_no_number():
    model = tiny_model()
    model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(DassError, match="window 0 is not finite"):
        perplexity(model, random_tokens(2, 8).split(1))
    with pytest.raises(DassError, match="no window"):
        perplexity(model, [])


def test_one_window_has_no_standard_error():
    assert perplexity(tiny_model(), [random_tokens(1, 8)]).stderr is None
