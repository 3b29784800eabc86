"""Training under a mask: exact zeros through everything, and the same weights whether or not it was killed."""

import copy
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, softmax

from dass.errors import DassError
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from dass.saving import save_model
from dass.training import masked
from dass.training.masked import Diverged, Recipe, train
from dass.training.zeros import kept_weights
from tests.models import image_model, random_tokens, tiny_model

ROLES = dict.fromkeys(("gate", "up", "down"), "in")
QUICK = {"steps": 5, "batch": 4, "every": 2, "learning_rate": 0.01}


def pruned_model(layout="llama", **changes):
    model = tiny_model(layout, **changes).requires_grad_(False)
    prune_model(model, BlockPruner(Method("magnitude", ROLES, NM(2, 4))))
    return model


def loss_of(model, step=0):
    tokens = random_tokens(3, 24, seed=9)
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return {"loss": cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()}


def trained(folder, model=None, judge=None, teacher=None, dtype=torch.float32, **changes):
    model = pruned_model() if model is None else model
    recipe, keep = Recipe(**QUICK | changes), kept_weights(find_blocks(model))
    judge = judge or (lambda step: loss_of(model))
    history, earlier = train(model, keep, random_tokens(10, 24), recipe, judge, folder, "here", teacher, dtype)
    return model, history, earlier


def zeros(model):
    return [p.weight == 0 for block in find_blocks(model) for unit in block.units for p in unit.projections.values()]


@pytest.mark.parametrize("layout", ["llama", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zeros_and_everything_else_learns(tmp_path, layout, dtype):
    before = pruned_model(layout)
    model, history, _ = trained(tmp_path / "state", copy.deepcopy(before), dtype=dtype)
    assert all(map(torch.equal, zeros(model), zeros(before)))
    assert [one["step"] for one in history] == [0, 2, 4, 5] and history[-1]["loss"] < history[0]["loss"]
    assert model.state_dict().keys() == before.state_dict().keys()
    save_model(model, tmp_path / "saved", "card", "f" * 16, "bfloat16")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, zeros(loaded), zeros(before)))
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)


def test_a_step_is_that_of_adamw_on_the_mean_loss(tmp_path):
    """The first step by hand: without moments, each weight with a gradient moves by the rate against its sign."""
    before = pruned_model()
    model, _, _ = trained(tmp_path, copy.deepcopy(before), steps=1, learning_rate=1e-3, every=1)
    by_hand = copy.deepcopy(before).requires_grad_(True)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:4]
    tokens = random_tokens(10, 24)[order]
    logits = by_hand(tokens, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    name = "model.layers.1.mlp.up_proj.weight"
    moved = model.get_parameter(name) - before.get_parameter(name)
    gradient = by_hand.get_parameter(name).grad
    kept = before.get_parameter(name) != 0
    torch.testing.assert_close(moved[kept], -1e-3 * gradient[kept].sign(), rtol=0.02, atol=1e-6)
    assert (moved[~kept] == 0).all()


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    one, other = (trained(tmp_path / str(n), accumulate=n)[0] for n in (1, 4))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


def test_killed_anywhere_it_goes_on_to_the_same_weights(tmp_path, capsys):
    whole, history, earlier = trained(tmp_path / "whole")
    assert earlier == 0
    for at in (0, 2, 4):
        model = pruned_model()

        def judge(step, model=model, at=at):
            return loss_of(model) if step <= at else sys.exit(1)

        with pytest.raises(SystemExit):
            trained(tmp_path / f"{at}", model, judge)
        spent = [json.loads((tmp_path / f"{at}" / "training.json").read_text())["seconds"]]
        again, found, earlier = trained(tmp_path / f"{at}")
        spent.append(json.loads((tmp_path / f"{at}" / "training.json").read_text())["seconds"])
        assert 0 < earlier == spent[0] < spent[1]  # of both processes
        assert f"goes on behind step {at}" in capsys.readouterr().err and found == history
        assert all(map(torch.equal, whole.parameters(), again.parameters()))
    (tmp_path / "0" / "training.json").write_text("{}")
    assert trained(tmp_path / "0")[1] == history and "left aside" in capsys.readouterr().err
    assert trained(tmp_path / "0", learning_rate=0.02)[1] != history  # another recipe goes on with nothing
    assert len(list((tmp_path / "0").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("kind", ["mistral3", "llama4", "qwen3_vl_moe"])
def test_an_image_tower_has_no_gradients_and_the_rest_goes_on(tmp_path, kind, capsys):
    before = image_model(kind).requires_grad_(False)
    prune_model(before, BlockPruner(Method("magnitude", ROLES, NM(2, 4))))
    whole, history, _ = trained(tmp_path / "whole", copy.deepcopy(before))
    killed = copy.deepcopy(before)
    with pytest.raises(SystemExit):
        trained(tmp_path / "again", killed, lambda step: loss_of(killed) if step < 4 else sys.exit(1))
    again, found, _ = trained(tmp_path / "again", copy.deepcopy(before))
    assert "goes on behind step 2" in capsys.readouterr().err and found == history
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved and not any("visual." in name or "vision_" in name for name in moved)


def test_what_diverges_leaves_its_last_good_weights(tmp_path):
    with pytest.raises(DassError, match=r"loss of step \d is (nan|inf).*lower finetune\.learning_rate.*step 2 is kept"):
        model = pruned_model()
        trained(
            tmp_path, model, lambda step: loss_of(model) if step < 4 else {"loss": float("nan")}, learning_rate=0.01
        )
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["training-2.safetensors"]
    kept = load_file(tmp_path / "training-2.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, kept["weight model.embed_tokens.weight"])
    assert all(map(torch.equal, zeros(model), zeros(pruned_model())))
    assert trained(tmp_path)[1][-1]["step"] == 5

    def broken(step):
        if step:
            raise DassError("The mean loss is 9e9.")
        return {"loss": 1.0}

    with pytest.raises(
        DassError, match=r"step 2 cannot be judged \(The mean.*\): lower finetune\.learning_rate; what .* step 0"
    ):
        trained(tmp_path / "broken", judge=broken)
    with pytest.raises(DassError, match=r"The (training|evaluation) loss of step \d is (nan|inf)"):
        trained(tmp_path / "other", learning_rate=1e30)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["weights", "adapters"])
def test_what_diverged_is_again_what_it_was_at_its_last_evaluation(tmp_path, monkeypatch, changes):
    """Steps are done behind it before the loss is no number any more."""
    if changes:
        pytest.importorskip("peft")
    original, model, steps, said = masked._step, pruned_model(), [], []

    def judge(step):
        said.append(loss_of(model))
        return said[-1]

    def broken(*arguments):
        steps.append(original(*arguments))
        return float("nan") if len(steps) == 5 else steps[-1]

    monkeypatch.setattr(masked, "_step", broken)
    with pytest.raises(Diverged, match=r"training loss of step 5 is nan.*step 3 is kept") as raised:
        trained(tmp_path, model, judge, every=3, **changes)
    assert [one["step"] for one in raised.value.history] == [0, 3] and said[1] != said[0]
    assert loss_of(model)["loss"] == pytest.approx(said[1]["loss"], rel=1e-5)
    assert all(map(torch.equal, zeros(model), zeros(pruned_model())))


def test_distillation_is_the_divergence_from_the_dense_model(tmp_path):
    dense = tiny_model().requires_grad_(False)
    model, history, _ = trained(tmp_path, loss="distill", teacher=dense, steps=1, every=1, batch=10)
    tokens, student = random_tokens(10, 24), pruned_model()
    p, q = (softmax(one(tokens, use_cache=False).logits[:, :-1], -1) for one in (dense, student))
    divergence = (p * (p.log() - q.log())).sum(-1).mean().item()
    assert history[1]["training_loss"] == pytest.approx(divergence, rel=1e-4)
    assert all(map(torch.equal, zeros(model), zeros(student)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": -1}, "steps=-1 must be at least 1"),
        ({"batch": 11}, "10 sequences, shorter than one batch of 11"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch=4"),
        ({"loss": "kl"}, "loss=kl must be one of next, distill"),
        ({"learning_rate": 0}, "learning_rate=0 must be"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(tmp_path, changes, says):
    with pytest.raises(DassError, match=says):
        trained(tmp_path / "state", **changes)
    assert not (tmp_path / "state").exists()


def test_a_model_without_zeros_has_no_mask():
    with pytest.raises(DassError, match="No matrix of the model is pruned"):
        kept_weights(find_blocks(tiny_model()))


def test_the_zeros_of_weights_stored_in_few_bits_are_no_mask(capsys):
    """In 4 or 5 bits up to 20 % of a dense matrix are exact zeros; beside pruned MLPs, too, attention stays dense."""
    dense, pruned = tiny_model().requires_grad_(False), pruned_model()
    for model in (dense, pruned):
        for block in find_blocks(model):
            for p in block.projections:
                p.weight[p.weight.abs() <= p.weight.abs().flatten().quantile(0.21)] = 0
    with pytest.raises(
        DassError, match=r"pruned \(none has 25% of zeros\): give `masks=DIR`, which a milder ratio needs"
    ):
        kept_weights(find_blocks(dense))
    kept = kept_weights(find_blocks(pruned))
    assert "note: 9 of 21 matrices are pruned by their zeros: 3 gate, 3 up, 3 down" in capsys.readouterr().err
    assert set(kept) == {
        (p.module, "weight") for b in find_blocks(pruned) for u in b.units for p in u.projections.values()
    }


def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DassError, match=r"LoRA needs the package peft: install it"):
        trained(tmp_path, lora_rank=2)


def test_adapters_are_where_they_are_named(tmp_path):
    """Of models with experts, too, whose names peft would take for those of older versions."""
    pytest.importorskip("peft")
    before = pruned_model("deepseek_v3")
    model, _, _ = trained(tmp_path, copy.deepcopy(before), lora_rank=2, lora_targets="shared_experts.up_proj$")
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert changed == ["model.layers.1.mlp.shared_experts.up_proj.weight"]


def test_adapters_are_merged_back_under_the_mask(tmp_path):
    pytest.importorskip("peft")
    before, seen = pruned_model(), []
    model = copy.deepcopy(before)

    def judge(step):
        seen.append(loss_of(model)["loss"])
        return {"loss": seen[-1]}

    trained(tmp_path, model, judge, lora_rank=2, lora_targets="(up|down|q)_proj$")
    assert all(map(torch.equal, zeros(model), zeros(before))) and seen[-1] < seen[0]
    assert loss_of(model)["loss"] == pytest.approx(seen[-1], rel=1e-5)  # what was judged is what is left
    assert model.state_dict().keys() == before.state_dict().keys()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {
        n for n, _ in model.named_parameters() if n.endswith(("up_proj.weight", "down_proj.weight", "q_proj.weight"))
    }
    again, _, _ = trained(tmp_path, lora_rank=2, lora_targets="(up|down|q)_proj$")
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(DassError, match=r"lora_targets=nowhere matches no linear layer"):
        trained(tmp_path, lora_rank=2, lora_targets="nowhere")
    assert masked.Recipe().lora_rank == 0


def test_a_head_that_is_the_embedding_takes_no_adapter(tmp_path):
    """Merged, it would change the embedding, too."""
    model = pruned_model(tie_word_embeddings=True)
    with pytest.raises(DassError, match="matches lm_head, whose weight is the embedding's: leave it out"):
        trained(tmp_path, model, lora_rank=2, lora_targets="lm_head")


def test_one_pruned_expert_of_many_keeps_its_zeros():
    """It is less than a hundredth of the parameter that holds it."""
    model = tiny_model("mixtral", num_local_experts=128)
    (chosen,) = [p for p in find_blocks(model)[0].projections if p.name.endswith("down_proj.5")]
    others = rf"^(?!{re.escape(chosen.name)}$)"
    masks = prune_model(model, BlockPruner(Method("magnitude", ROLES, NM(2, 4)), exclude=others))
    (keep,) = kept_weights(find_blocks(model)).values()
    assert list(masks) == [chosen.name] and keep.shape[0] == 128
    assert torch.equal(keep[5], masks[chosen.name].keep) and keep.float().mean() > 0.99
