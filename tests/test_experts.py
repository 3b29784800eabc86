"""Experts that come one by one: the run is that of a model in memory, which never holds more than two of them."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import Transpose

from dass import experts
from dass.checkpoint import stored_tensors
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.pruning import parked
from dass.pruning.layout import find_blocks
from dass.pruning.observe import open_streams
from dass.pruning.stacks import Stack
from dass.pruning.walk import walk
from dass.saving import rounding, save_model
from dass.sizes import Needed, memory_needed
from dass.streaming import load_streamed
from experiments import resolve, walked
from tests.experiments.test_prune import run, setting  # noqa: F401  (a fixture)
from tests.models import VOCABULARY, random_tokens, tiny_model
from tests.test_resume import always, ended, killed_at, overrides, same  # noqa: F401  (a fixture)
from tests.test_streaming import CPU, METHODS, loaded, pruned
from tests.tokenizers import tiny_tokenizer

GB = 1_000_000_000
MATCHED = ("method=dass", "method.order=matched", r"exclude='layers\.1\.mlp\.experts\.down_proj\.1$'")


def needs(monkeypatch, streamed, by_expert, free, statistics=0):
    """Pretend that a model needs so many bytes, by blocks or experts, of those that are free."""
    monkeypatch.setattr(resolve, "memory_needed", lambda *_: Needed(9 * GB, streamed, by_expert, statistics))
    monkeypatch.setattr(resolve, "free_memory", lambda device: free)


@pytest.fixture
def expert_setting(request, setting, tmp_path):  # noqa: F811
    """The setting of a run on a model with experts."""
    model = tiny_model(request.param, vocab_size=VOCABULARY, n_shared_experts=1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return setting


@pytest.mark.parametrize("expert_setting", ["mixtral", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize(
    "method", [MATCHED, ("method=wanda", "targets=mlp"), ("method=sparsegpt",)], ids=lambda method: method[0]
)
def test_a_run_that_is_killed_on_the_way_ends_as_one_in_memory(
    expert_setting,
    tmp_path,
    monkeypatch,
    capsys,
    always,  # noqa: F811
    method,
):
    one, other = tmp_path / "one", tmp_path / "other"
    common = [*expert_setting, *method, "calibration.min_expert_tokens=20"]
    run(*common, *overrides(one))
    needs(monkeypatch, 4 * GB, 2 * GB, 3 * GB)
    back = killed_at(monkeypatch, walked, "note", 5)  # among the experts of the second block
    with pytest.raises(SystemExit):
        run(*common, *overrides(other))
    back()
    said = capsys.readouterr().err
    told = "the blocks, with what is known of them, need 4.0 GB of 3.0 GB that are free: their experts are brought"
    assert told in said
    run(*common, *overrides(other))
    assert "goes on behind block 1 of 2" in capsys.readouterr().err
    assert same(ended(tmp_path, one), ended(tmp_path, other))
    assert not [path for path in (other / "runs").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("expert_setting", ["mixtral"], indirect=True)
def test_experts_come_one_by_one_where_what_is_known_of_them_does_not_fit(expert_setting, monkeypatch, capsys):
    needs(monkeypatch, 5 * GB // 2, GB, 3 * GB, statistics=3 * GB // 2)
    run(*expert_setting, "method=wanda", "calibration.min_expert_tokens=20")
    assert "the blocks, with what is known of them, need 4.0 GB of 3.0 GB that are free" in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """Sees how many numbers the largest memory holds that a tensor is given."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        old = func.is_view or func._schema.is_mutable  # such as a view of a mapped file
        for tensor in [] if old else found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_more_than_two_experts_are_in_memory(tmp_path, monkeypatch, method):
    sizes = {"num_experts": 8, "n_routed_experts": 8, "moe_intermediate_size": 48}
    model = tiny_model("deepseek_v3", **sizes)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    (one,) = {tuple(p.shape[1:]) for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj")}
    expert, whole = 4 * 3 * 48 * 16, 8 * 2 * 48 * 16
    assert one == (2 * 48, 16)
    live, most, brought = [], [0], Stack._brought

    def seen(stack, index):
        tensor = brought(stack, index)
        live.append(tensor.nbytes)
        weakref.finalize(tensor, live.remove, tensor.nbytes)
        most[0] = max(most[0], sum(live))
        return tensor

    monkeypatch.setattr(Stack, "_brought", seen)
    monkeypatch.setattr(parked, "SLAB", 64)
    with Largest() as largest:
        model, shelf = load_streamed(
            str(tmp_path / "model"), None, "float32", CPU, tmp_path / "scratch", by_expert=True
        )
        pruned(
            model, METHODS[method], random_tokens(4, 24), lambda block: shelf.change(block, rounding(model, "float32"))
        )
        perplexity(model, random_tokens(3, 16).split(2), shelf)
        save_model(model, tmp_path / "new", "# a card", "abc123", "float32", shelf=shelf)
    assert expert <= most[0] <= 2 * expert and not live
    assert largest.numbers < whole
    assert stored_tensors(tmp_path / "new").keys() == stored_tensors(tmp_path / "model").keys()


@pytest.mark.parametrize("layout", ["mixtral", "llama4_text", "gpt_oss"])
def test_experts_that_see_too_few_tokens_see_all_of_the_block(tmp_path, layout):
    tiny_model(layout).save_pretrained(tmp_path / "model")
    whole, streamed, shelf = loaded(tmp_path / "model", tmp_path / "scratch", by_expert=True)
    found = []
    for model, hold in ((whole, {}), (streamed, {"hold": shelf.hold})):
        needs = lambda block: {p.reads: False for p in block.projections if p.role in ("up", "down")}  # noqa: E731
        steps = walk(model, random_tokens(4, 24), needs, 2, min_expert_tokens=10**6, **hold)
        found.append([(step.rare, {name: one.norm() for name, one in step.streams.items()}) for step in steps])
    for (rare, norms), (theirs, other) in zip(*found, strict=True):
        assert rare == theirs and norms.keys() == other.keys() and all(torch.equal(norms[n], other[n]) for n in norms)
    assert any(rare for rare, _ in found[0])


@pytest.mark.parametrize("layout", ["mixtral", "deepseek_v3", "gpt_oss", "llama"])
def test_what_is_needed_expert_by_expert_is_known_from_the_configuration(tmp_path, layout):
    model = tiny_model(layout)
    model.config.save_pretrained(tmp_path)
    experts = [[p for p in layer.parameters() if p.ndim == 3] for layer in model.model.layers]
    rest = [sum(p.numel() for p in layer.parameters() if p.ndim < 3) for layer in model.model.layers]
    blocks = sum(rest) + sum(p.numel() for own in experts for p in own)
    two = [2 * sum(p[0].numel() for p in own) for own in experts]
    outside = sum(p.numel() for p in model.parameters()) - blocks
    hessians = lambda block: {p.reads: True for p in block.projections}  # noqa: E731
    found = memory_needed(str(tmp_path), None, "float32", None, hessians)
    assert found.by_expert == 4 * (outside + max(map(sum, zip(rest, [*rest[1:], 0], two, strict=True))))
    streams = [open_streams(block, hessians(block)) for block in find_blocks(model)]
    assert found.statistics == max(sum(one._products.nbytes for one in own.values()) for own in streams)
    assert (found.by_expert < found.streamed) == (layout != "llama")


@pytest.mark.parametrize(
    ("overrides", "statistics", "sentence"),
    [
        (
            ["method=sparsegpt"],
            2,
            r"fits expert by expert alone, in 2\.0 GB, and the calibration statistics .* 2\.0 GB",
        ),
        (["method=wanda", "method.update=mlp"], 0, r"works on a block at once, which takes 4\.0 GB of 3\.0 GB"),
        (["method=adaptive"], 0, r"method=adaptive works on a block at once"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_expert_by_expert_is_refused(setting, monkeypatch, overrides, statistics, sentence):  # noqa: F811
    needs(monkeypatch, 4 * GB, 2 * GB, 3 * GB, statistics * GB)
    with pytest.raises(DassError, match=sentence):
        run(*setting, *overrides)


@pytest.mark.parametrize(("free", "expected"), [(14, "whole"), (5, "blocks"), (3, "experts")])
def test_the_first_way_that_fits_is_taken(setting, monkeypatch, free, expected):  # noqa: F811
    from tests.experiments.test_prune import check, composed

    needs(monkeypatch, 4 * GB, 2 * GB, free * GB)
    assert resolve.brought(check(composed(*setting, "method=wanda"))) == expected


def test_experts_that_are_put_together_otherwise_are_refused(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    original = experts.get_model_conversion_mapping

    def turned(model):
        transforms = original(model)
        next(one for one in transforms[::-1] if hasattr(one, "operations")).operations.append(Transpose(1, 2))
        return transforms

    monkeypatch.setattr(experts, "get_model_conversion_mapping", turned)
    with pytest.raises(DassError, match=r"experts\.down_proj is put together from its file in a way of its own"):
        load_streamed(str(tmp_path / "model"), None, "float32", CPU, tmp_path / "scratch", by_expert=True)
    # block by block transformers puts them together, and writes them
    whole, streamed, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    written = {path.stem for path in (tmp_path / "scratch").iterdir()}
    assert written == {f"{block.name}.mlp.experts.down_proj" for block in shelf.blocks}
    windows = random_tokens(3, 16).split(2)
    assert perplexity(whole, windows).losses == perplexity(streamed, windows, shelf).losses


@pytest.mark.parametrize("layout", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_are_not_written_to_be_loaded(tmp_path, layout):
    tiny_model(layout).save_pretrained(tmp_path / "model")
    _, streamed, shelf = loaded(tmp_path / "model", tmp_path / "scratch")
    perplexity(streamed, random_tokens(3, 16).split(2), shelf)
    assert not list(tmp_path.glob("scratch/*"))


def test_a_model_that_takes_several_experts_at_once_is_told(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    _, model, shelf = loaded(tmp_path / "model", tmp_path / "scratch", by_expert=True)
    model.set_experts_implementation("batched_mm")
    with pytest.raises(DassError, match="several experts of a block at once"):
        perplexity(model, random_tokens(3, 16).split(2), shelf)
    assert all(isinstance(p, nn.Parameter) and p.is_meta for block in shelf.blocks for p in block.module.parameters())
