"""`python -m experiments.plan`: every model composes and prints, and bad input is one sentence."""

import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dass.errors import DassError
from dass.planning.devices import DEVICES
from experiments import plan
from experiments.app import CONF
from tests.models import tiny_model

PLANNED = [path.stem for path in sorted((CONF / "model").glob("*.yaml")) if "architecture" in OmegaConf.load(path)]


def composed(*overrides, name="plan"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def printed(capsys, *overrides):
    plan.main(composed(*overrides))
    return capsys.readouterr().out


def cells(out, method, stage):
    """The cells of one row of the table of stages."""
    (row,) = [r for line in out.splitlines() if (r := [c.strip() for c in line.split("|")])[1:3] == [method, stage]]
    return row[3:-1]


@pytest.mark.parametrize("model", PLANNED)
def test_every_model(capsys, model):
    given = OmegaConf.load(CONF / "model" / f"{model}.yaml").architecture
    many = max(given.get("n_routed_experts", 0), given.get("num_experts", 0), given.get("num_local_experts", 0))
    fewer = [f"model.architecture.num_hidden_layers={given.num_hidden_layers // 12}"] if many else []  # all are alike
    out = printed(capsys, f"model={model}", *fewer)
    for method in plan.METHODS:
        assert cells(out, method, "whole run")
    assert "an estimate" in out and "none is measured" in out and "0.4 x peak" in out
    assert (f" of {many} per token; that experts" in out) == bool(many)
    assert ("of an even share |" in out) == bool(many)


def row_of(line):
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.split("|")][1:-1]


def test_one_and_eight_devices(capsys):
    """405 billion parameters: 812 GB, which one H200 streams and eight hold."""
    out = printed(capsys, "model=llama31_405b", "device=h200", "evaluation=none")
    assert "405,853,388,800" in out
    (row,) = [row_of(line) for line in out.splitlines() if "| dass " in line and "(streamed)" in line]
    assert row[0] == "dass" and float(row[1].split()[0].replace(",", "")) > 812 > 8 * float(row[2].split()[0])
    assert row[3].endswith("(streamed)") and row[4].endswith((" h", " min")) and "8 x h200" in out


def test_what_an_expert_can_expect(capsys):
    """By hand: 128 x 2048 tokens, 8 of 128 experts each; the widest input has 4096 features."""
    out = printed(capsys, "model=qwen3_235b", "model.architecture.num_hidden_layers=2")
    rows = {row[0]: row for row in (row_of(line) for line in out.splitlines() if "even share |" in line)}
    assert list(rows) == ["wanda", "sparsegpt", "dass"]
    assert rows["sparsegpt"][1:4] == ["16,384", "4,096", "25.0% of an even share"]
    assert rows["dass"][1:5] == ["16,384", "32", "0.2% of an even share", "5,120 calibration tokens"]
    assert rows["dass"][5] == f"{2 * 128 * 2048 * 3 * 4096 * 1536 / 1e12:.3g} TFLOP"


def test_what_fits_no_way_has_no_hours(capsys):
    """LLaMA3.1-405B's Hessians: 89 GB, streamed, on cards of 80 and of 24."""
    out = printed(capsys, "model=llama31_405b", "device=h100", "evaluation=none")
    counts = {
        row[0]: row for row in (row_of(line) for line in out.splitlines() if line.startswith("| ")) if len(row) == 5
    }
    assert counts["sparsegpt"][3] == "does not fit" != counts["wanda"][3]
    assert float(counts["sparsegpt"][2].split()[0]) > 80 > float(counts["wanda"][2].split()[0])
    few = printed(capsys, "model=llama31_405b", "device=rtx4090", "evaluation=none")
    assert few.count("does not fit") >= 8


def test_experts_come_one_by_one_where_their_hessians_do_not_fit_beside_the_block(capsys):
    out = printed(capsys, "model=deepseek_v3", "device=h100", "evaluation=none")
    (row,) = [row_of(line) for line in out.splitlines() if line.startswith("| sparsegpt ") and "(streamed)" in line]
    assert float(row[2].split()[0]) < 80 and row[3].endswith("(streamed)")


def test_what_an_expert_needs_is_a_setting(capsys):
    given = ["model=qwen3_235b", "model.architecture.num_hidden_layers=2", "calibration.min_expert_tokens=5000"]
    rows = [row_of(line) for line in printed(capsys, *given).splitlines() if "even share |" in line]
    assert [row[2] for row in rows] == ["5,000"] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_every_device(capsys, device):
    assert f"on {device}" in printed(capsys, f"device={device}", "dtype=float32")


def test_what_fits(capsys):
    assert cells(printed(capsys, "model=llama2_7b"), "dass", "whole run")[-1] == "yes"
    # 138 GB of weights and their activations: neither one nor the other card holds them
    assert cells(printed(capsys, "model=llama2_70b"), "dass", "whole run")[-1] == "no: 2 x h100 or memory=stream"
    assert cells(printed(capsys, "model=llama2_70b", "device=a100_40gb"), "dass", "whole run")[-1].startswith("no: 4 x")


def test_a_model_that_does_not_fit_streams(capsys):
    out = printed(capsys, "model=llama2_70b", "memory=stream", "disk_gb_s=2")
    *_, peak, fits = cells(out, "dass", "whole run")
    # of 80 blocks 0.856e9 weights each two, and the embedding and head; the calibration set's inputs twice, 8.6 GB
    assert fits == "yes" and 12 < float(peak.split()[0]) < 25
    assert "Reading all blocks takes 68.5 s" in out and "memory=stream" not in out
    assert "4.5 GB of weights" in printed(capsys, "model=llama2_70b")


def test_experts_come_one_by_one_where_blocks_do_not_fit(capsys):
    settings = ["model=deepseek_v3", "model.architecture.num_hidden_layers=5", "memory=stream", "batch_size=16"]
    assert "one by one" not in printed(capsys, *settings, "device=h100")  # two blocks of 22.5 GB fit
    out = printed(capsys, *settings, "device=rtx4090")
    found = re.search(r" ([\d.]+) GB of weights: their experts come one by one, ([\d.]+) GB of weights at a time", out)
    one, outside = 3 * 7168 * 2048, 2 * 129280 * 7168 + 7168
    # latent attention and a router 0.19e9, and a shared expert beside the others; the first three have dense MLPs
    attention, dense = 0.19e9, 3 * 7168 * 18432
    expected = [2 * (outside + 2 * (attention + 257 * one)) / 1e9, 2 * (outside + 2 * (attention + dense)) / 1e9]
    assert [float(part) for part in found.groups()] == pytest.approx(expected, rel=0.02)
    assert "in each of 8 forwards" in out
    assert float(cells(out, "wanda", "blocks to disk, zeros counted")[3].split()[0]) < 24  # GB at the peak


def test_evaluation_counts_windows(capsys):
    assert "166 windows of 2048 tokens, if" in printed(capsys)
    assert "7 windows of 512 tokens." in printed(capsys, "evaluation.n_windows=7", "evaluation.seq_len=512")
    assert "| each " in (out := printed(capsys, "evaluation=none")) and "evaluation" not in out.lower()


def test_efficiency_is_a_setting(capsys):
    assert "0.25 x peak" in printed(capsys, "efficiency=0.25")
    assert "(1 x peak)" in printed(capsys, "device=cpu_2cores", "dtype=float32")


def test_a_folder_without_weights(capsys, tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    out = printed(capsys, "model=local", f"model.path={tmp_path}")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["device=gtx"], "The device gtx is unknown: choose one of h100, "),
        (["model=local"], "model=local needs a folder"),
        (["model.architecture.model_type=nope"], "not one that transformers knows"),
        (["sparsity=nm", "sparsity.n=2", "sparsity.m=7"], "M=7 does not divide"),
        (["sparsity=nm"], "set either ratio"),
        (["calibration=tokens_file"], "calibration=tokens_file does not say how much"),
        (["evaluation=text_file"], "evaluation=text_file does not say how much"),
        (["evaluation=zero_shot"], "evaluation=zero_shot is not of windows of text"),
        (["evaluation.seq_len=1"], "windows of 1 tokens"),
        (["efficiency=0"], "efficiency=0.0 must be above 0"),
        (["targets=none"], "targets=none is unknown"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["memory=auto"], "memory=auto is unknown here: choose resident or stream"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(overrides, sentence):
    with pytest.raises(DassError, match=sentence):
        plan.main(composed(*overrides))


def test_the_group_does_not_shadow_a_setting():
    assert composed("device=cpu", name="prune").device == "cpu"


def test_the_command_line():
    command = [sys.executable, "-m", "experiments.plan", "model=llama31_405b", "device=gtx"]
    ran = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and ran.stderr.startswith("error: The device gtx")
