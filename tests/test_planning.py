"""The plan against models that really exist and run: counts of parameters, operations, bytes and zeros."""

import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, MambaConfig, MixtralConfig

from benchmarks.counted import Counter as Counted
from benchmarks.counted import pretended_device
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.planning.architecture import config_from, read_architecture
from dass.planning.costs import Workload, plan_evaluation, plan_load, plan_pruning, share_removed, targeted_weights
from dass.planning.devices import DEVICES, Device, Stage
from dass.pruning.blocks import mlp_names
from dass.pruning.criteria import obs
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Unstructured, keep_most_important
from dass.pruning.method import Method
from dass.pruning.observe import eager_experts
from dass.pruning.pruner import BlockPruner
from dass.pruning.statistics import Statistics
from dass.pruning.update import obs_sweep
from dass.pruning.walk import prune_model
from dass.sparsity import sparsity_report
from tests.models import ARCHITECTURES, LAYOUTS, SIZES, random_tokens, tiny_model

CONF_MODEL = Path(__file__).parents[1] / "conf" / "model"
KNOWN_TOTALS = {  # parameters as the models' pages and papers give them, exactly
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama31_8b": 8_030_261_248,
    "llama31_405b": 405_853_388_800,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "relullama_7b": 6_738_415_616,
    "pythia_7b": 6_857_302_016,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_235b": 235_093_634_560,
    "deepseek_v3": 671_026_419_200 - 58 * 256,  # without the routers' biases, which are no parameters in transformers
}
SHARES_OF_LINEAR = {"llama2_7b": 0.334, "llama2_70b": 0.412, "mistral_7b": 0.404, "gemma_7b": 0.409}  # the paper's
EXACT_LAYOUTS = ("phi3", "gpt2", "falcon", "mixtral", "qwen2_moe")
MIXTRAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA4 = {"model_type": "gemma4_text", **SIZES, **LAYOUTS["gemma4_text"][1], "num_hidden_layers": 2}
WANDA = Method("wanda", dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in"), NM(2, 4))
DASS = Method("dass", {"gate": "out", "up": "out", "down": "in"}, NM(2, 4))


def sparsegpt(pattern=NM(2, 4)):  # noqa: B008  # frozen
    return Method("obs", dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "layer"), pattern, "obs")


def conf_architecture(name):
    return read_architecture(
        config_from(OmegaConf.to_container(OmegaConf.load(CONF_MODEL / f"{name}.yaml").architecture))
    )


def stages_of(model, method, work, targets="mlp"):
    architecture = read_architecture(model.config)
    return {stage.name: stage for stage in plan_pruning(architecture, BlockPruner(method, targets), work)}


def work_on(input_ids, batch_size=1):
    return Workload("float32", *input_ids.shape, batch_size)


def accumulating(self_shape, a, b, *args, out_shape=None, **kwargs):
    """Of addmm_ and addr_, which torch's counter does not know."""
    return 2 * a[0] * (a[1] if len(a) > 1 else 1) * b[-1]


def counted(function):
    """The floating-point operations that really happen."""
    aten = torch.ops.aten
    with FlopCounterMode(
        display=False, custom_mapping={aten.addmm_: accumulating, aten.addr_: accumulating}
    ) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral", "qwen2_moe"])
def test_parameters_by_role(name):
    model = tiny_model(name)
    planned = read_architecture(model.config)
    words = {"experts": ".experts.", "router": "mlp.gate.", "router ": "shared_expert_gate"}
    words |= {role: f"{role}_proj.weight" for role in ("gate", "up", "down", *"qkvo")}
    words |= {"embedding": "embed_tokens", "head": "lm_head", "norm": "norm"}
    found = Counter()
    for parameter_name, parameter in model.named_parameters():
        role = next((role for role, word in words.items() if word in parameter_name), "other")  # experts first
        found[role.strip()] += parameter.numel()
    assert planned.parameters == found
    assert (planned.active_experts is None) == (name in ARCHITECTURES)
    assert len(planned.blocks) == len(find_blocks(model))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_counted_whole(name):
    model = tiny_model(name)
    planned = read_architecture(model.config)
    blocks = find_blocks(model)
    mlp = sum(model.get_parameter(name).numel() for name in mlp_names(blocks))
    assert planned.total == sum(p.numel() for p in model.parameters())
    assert sum(planned.parameters.get(role, 0) for role in ("gate", "up", "gate_up", "down", "experts")) == mlp
    assert targeted_weights(planned, BlockPruner(WANDA)) == mlp
    units = [unit for block in blocks for unit in block.units]
    assert sum(b.inputs[unit.intermediate].copies for b in planned.blocks for unit in b.block.units) == len(units)


@pytest.mark.parametrize("name", KNOWN_TOTALS)
def test_known_totals(name):
    assert conf_architecture(name).total == KNOWN_TOTALS[name]


def test_every_hub_model_has_a_known_total():
    hub = {path.stem for path in CONF_MODEL.glob("*.yaml") if OmegaConf.load(path).get("hub_id")}
    assert hub == set(KNOWN_TOTALS)


@pytest.mark.parametrize("name", SHARES_OF_LINEAR)
def test_shares_of_the_paper(name):
    model = conf_architecture(name)
    share = 0.5 * targeted_weights(model, BlockPruner(WANDA)) / model.linear
    assert share == pytest.approx(SHARES_OF_LINEAR[name], abs=0.0005)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma3"])
@pytest.mark.parametrize("targets", ["mlp", "all"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), Unstructured(0.5)], ids=str)
def test_share_removed(architecture, targets, pattern):
    model = tiny_model(architecture)
    pruner = BlockPruner(Method("wanda", WANDA.axis, pattern), targets)
    planned = read_architecture(model.config)
    prune_model(model, pruner, random_tokens())
    blocks = find_blocks(model)
    report = sparsity_report(model, blocks, [p for block in blocks for p in pruner.projections(block)])
    removed = share_removed(pattern) * targeted_weights(planned, pruner)
    assert report["targeted"] == share_removed(pattern)
    assert report["linear"] == pytest.approx(removed / planned.linear)
    assert report["total"] == pytest.approx(removed / planned.total)


@pytest.mark.parametrize(
    ("architecture", "method", "targets", "batch_size"),
    [
        *product(["llama", "gemma2"], [WANDA, DASS], ["mlp", "all"], [1, 2]),
        *((name, WANDA, "all", 2) for name in EXACT_LAYOUTS),
        *((name, DASS, "mlp", 1) for name in EXACT_LAYOUTS),
    ],
    ids=lambda value: getattr(value, "criterion", None),
)
def test_operations_of_the_walk(architecture, method, targets, batch_size):
    model, input_ids = tiny_model(architecture, attn_implementation="eager"), random_tokens(5, 24)
    with eager_experts(model):  # the counter knows no grouped products
        flops = counted(lambda: prune_model(model, BlockPruner(method, targets), input_ids, batch_size))
    walk = stages_of(model, method, work_on(input_ids, batch_size), targets)["calibration walk"]
    assert walk.flops == pytest.approx(flops, rel=0.001)  # the model multiplies positions and frequencies too


@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_operations_of_statistics_and_sweep(targets):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}  # 320: a whole and a part of a block
    model, input_ids = tiny_model(attn_implementation="eager", **sizes), random_tokens(3, 24)
    stages = stages_of(model, sparsegpt(), work_on(input_ids), targets)
    flops = counted(lambda: prune_model(model, BlockPruner(sparsegpt(), targets), input_ids))
    planned = {name: stage.flops for name, stage in stages.items() if name != "factorisation"}
    assert sum(planned.values()) == pytest.approx(flops, rel=0.01)
    assert all(flop > 0.1 * flops for flop in planned.values())  # none can be wrong unseen


def test_operations_of_the_factorisation():
    model = tiny_model(num_hidden_layers=1)
    stage = stages_of(model, sparsegpt(), work_on(random_tokens()))["factorisation"]
    # H = L L^T costs n^3 / 3; each of n columns of the inverse costs n^2 operations, where one block holds them
    assert stage.flops == pytest.approx(sum(n**3 / 3 + n * n**2 for n in (32, 64)))
    wide = stages_of(tiny_model(num_hidden_layers=1, intermediate_size=2048), sparsegpt(), work_on(random_tokens()))
    # two triangles of 1024 columns; what is between them is multiplied by both of their inverses
    assert wide["factorisation"].flops == pytest.approx(32**3 * 4 / 3 + 2048**3 / 3 + 2 * 1024**3 + 2 * 2 * 1024**3)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
def test_launches_of_the_sweep(pattern):
    n = 256
    with pretended_device(), FakeTensorMode(), Counted(DEVICES["h100"]) as counter:
        statistics = Statistics(hessian=lambda: torch.rand(n, n, device="cuda"))
        statistics.inverse(0.01)
        before = counter.counts

        def choose(columns, weight):
            return keep_most_important(obs(weight, "down", statistics.columns(columns)), pattern, "in")

        every = pattern.m if isinstance(pattern, NM) else 128
        obs_sweep(torch.rand(64, n, device="cuda"), statistics.inverse(0.01).factor, choose, every)
    model = tiny_model(hidden_size=n, intermediate_size=n, num_hidden_layers=1)
    planned = stages_of(model, sparsegpt(pattern), work_on(random_tokens()))["OBS sweep"].launches / 2  # two inputs
    assert planned == pytest.approx(counter.counts.since(before).launches, rel=0.1)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXACT_LAYOUTS])
def test_operations_of_the_evaluation(architecture):
    model, windows = tiny_model(architecture, attn_implementation="eager"), random_tokens(6, 30)
    stage = plan_evaluation(read_architecture(model.config), work_on(windows, 2), *windows.shape)
    with eager_experts(model):
        assert stage.flops == pytest.approx(counted(lambda: perplexity(model, windows.split(2))), rel=0.001)


@pytest.mark.parametrize(
    ("method", "statistics"),
    [
        (Method("magnitude", {"gate": "layer", "up": "layer", "down": "layer"}, NM(2, 4)), None),
        (WANDA, 4 * (4096 + 11008)),
        (DASS, 4 * 11008),
        (sparsegpt(), 4 * (4096**2 + 11008**2)),
    ],
    ids=lambda value: getattr(value, "criterion", None),
)
def test_memory_of_llama2_7b(method, statistics):
    model, work = conf_architecture("llama2_7b"), Workload("bfloat16", 128, 2048, 1)
    stages = {stage.name: stage for stage in plan_pruning(model, BlockPruner(method), work)}
    weights = 2 * 6_738_415_616
    assert plan_load(model, work).peak_bytes == weights
    if statistics is None:
        assert list(stages) == ["mask selection"]
        assert weights < stages["mask selection"].peak_bytes < 1.15 * weights
        return
    activations = 2 * (128 * 2048 * 4096 * 2)  # block inputs, and outputs of attention until they are replayed
    held = weights + activations + statistics
    inside = 2048 * (3 * 11008 + 12 * 4096) * 4
    assert stages["calibration walk"].peak_bytes == stages["statistics"].peak_bytes == held + inside
    assert all(held < stage.peak_bytes < 1.3 * held for stage in stages.values())


def test_a_mixture_of_experts():
    architecture, dense = read_architecture(MixtralConfig(**MIXTRAL)), read_architecture(tiny_model("mistral").config)
    work = Workload("float32", 4, 24, 1)
    mlp, attention = 3 * (3 * 32 * 64), 3 * (2 * 32 * 32 + 2 * 16 * 32)
    assert targeted_weights(architecture, BlockPruner(WANDA)) == 4 * mlp
    assert targeted_weights(architecture, BlockPruner(WANDA, "all")) == 4 * mlp + attention
    assert architecture.linear == 4 * mlp + attention + 3 * (4 * 32)  # the routers too
    ours, theirs = (
        {stage.name: stage for stage in plan_pruning(model, BlockPruner(sparsegpt()), work)}
        for model in (architecture, dense)
    )
    # each token visits two experts, but each of the four has its own Hessians and weights
    assert ours["statistics"].flops == 2 * theirs["statistics"].flops
    assert ours["factorisation"].flops == 4 * theirs["factorisation"].flops
    assert ours["OBS sweep"].flops == 4 * theirs["OBS sweep"].flops


def test_hundreds_of_experts_take_seconds():
    started = time.perf_counter()
    model = read_architecture(AutoConfig.for_model("deepseek_v3"))  # 671 billion parameters, 37 of them active
    stages = plan_pruning(model, BlockPruner(DASS), Workload("bfloat16", 128, 2048, 1))
    assert time.perf_counter() - started < 10
    # the released total counts the routers' corrections, which are buffers
    assert model.total == 671_026_419_200 - 58 * 256 and model.active_experts == "8 of 256"
    assert targeted_weights(model, BlockPruner(DASS)) == 3 * 7168 * (3 * 18432 + 58 * 257 * 2048)
    statistics = next(stage for stage in stages if stage.name == "statistics")
    assert statistics.flops == 2 * 128 * 2048 * (3 * 18432 + 58 * 9 * 2048)  # norms of 8 experts and the shared one


def test_seconds():
    device = Device("d", 10, 8, 2, bandwidth_gb_s=100, efficiency=0.5, launch_us=10, disk_gb_s=2)
    work = Stage("s", 0, flops=16e12)
    assert work.seconds(device, "bfloat16") == 4
    assert work.seconds(device, "float32") == 16
    assert replace(work, in_fp32=True).seconds(device, "bfloat16") == 16
    assert replace(work, moved_bytes=250e9).seconds(device, "bfloat16") == 5
    assert replace(work, launches=7e5).seconds(device, "bfloat16") == pytest.approx(7)
    assert replace(work, alone_bytes=100e9).seconds(device, "bfloat16") == pytest.approx(4 + 2)
    assert replace(work, disk_bytes=20e9).seconds(device, "bfloat16") == 10


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: config_from({"model_type": "nope"}), "not one that transformers knows"),
        (lambda: config_from({"hidden_size": 8}), "not one that transformers knows"),
        (lambda: read_architecture(MambaConfig(num_hidden_layers=1)), "unknown layout"),
        (lambda: read_architecture(config_from(GEMMA4 | {"top_k_experts": None})), "how many experts"),
        (lambda: read_architecture(config_from({"model_type": "t5"})), "does not make a causal language model"),
        (
            lambda: plan_pruning(
                read_architecture(tiny_model().config),
                BlockPruner(Method("wanda", WANDA.axis, NM(2, 5))),
                Workload("float32", 1, 8, 1),
            ),
            "M=5 does not divide",
        ),
        (lambda: Workload("float64", 1, 8, 1), "dtype=float64"),
        (lambda: Workload("float32", 0, 8, 1), "n_sequences=0"),
        (lambda: Device("d", 1, 1, 1, 1, efficiency=1.5), "efficiency=1.5"),
        (lambda: Device("d", 1, 1, 1, 1, launch_us=-1), "launch_us=-1"),
    ],
)
def test_bad_input_is_one_sentence(make, sentence):
    with pytest.raises(DassError, match=sentence):
        make()
