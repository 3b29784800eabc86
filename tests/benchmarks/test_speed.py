"""The benchmark of speed on the CPU, as far as torch goes there: packing, products, comparing, table and figure."""

import pytest
import torch

from benchmarks import speed
from dass.audit import KERNELS
from dass.errors import DassError

CPU = torch.device("cpu")


def test_its_whole_path_on_the_cpu():
    timings = speed.measure({"tiny": (64, 128)}, (1, 8), CPU, seconds=0.001)
    assert {one.product for one in timings} == set(speed.PRODUCTS) and {one.tokens for one in timings} == {1, 8}
    assert {one.engine for one in timings} == {"dense", "CUTLASS"} and all(one.median > 0 for one in timings)
    grid = speed.grid(timings, {})
    assert len(grid.frame) == 4 * 2 and list(grid.frame)[-2:] == ["1 tokens", "8 tokens"]
    assert "x)" in grid.frame["8 tokens"][1] and "x)" not in grid.frame["8 tokens"][0]
    assert len(speed.figure(timings).axes) == 4


@pytest.mark.parametrize("engine", KERNELS)
def test_a_mask_that_a_kernel_would_break_is_refused(engine):
    with pytest.raises(DassError, match=r"would drop 1[789]"):
        speed.layer(speed.pruned((128, 256), "out", CPU), engine)
    with pytest.raises(DassError, match="fits no kernel"):
        speed.layer(speed.pruned((96, 100), "in", CPU), engine)


def test_the_backward_product_is_that_of_the_matrix():
    weight = speed.pruned((128, 64), "out", CPU)
    y = torch.randn(3, 128).bfloat16()
    torch.testing.assert_close(speed.layer(weight.T.contiguous(), "CUTLASS")(y), y @ weight)


def test_a_wrong_product_is_told():
    with pytest.raises(DassError, match=r"by CUTLASS differs from the dense one by 100\.00%"):
        speed.verified(lambda engine: lambda x: x if engine == "dense" else 2 * x, "CUTLASS", torch.ones(2, 4))


@pytest.mark.parametrize("error", [RuntimeError("not on this GPU\nnor here"), DassError("It differs by 2%: stop.")])
def test_a_kernel_that_fails_is_a_gap_in_the_table(capsys, monkeypatch, error):
    """One that gives another product, too; what else was timed stays, and the reason stands below."""

    def fail(build, engine, x):
        if engine != "dense":
            raise error
        return build(engine)

    monkeypatch.setattr(speed, "verified", fail)
    timings = speed.measure({"tiny": (64, 128)}, (4,), CPU, seconds=0.001)
    grid = speed.grid(timings, {})
    assert set(grid.frame["4 tokens"][1::2]) == {"—"} and "±" in grid.frame["4 tokens"][0]
    said = str(error).splitlines()[0].rstrip(".")
    assert said in capsys.readouterr().out and grid.legend.endswith(f"- CUTLASS: {said} (4 of the cells)")


def test_without_a_gpu_the_table_says_so(tmp_path, capsys):
    for _ in range(2):
        speed.main(tmp_path, "cpu")
        text = (tmp_path / "benchmark_speed.md").read_text()
        assert text.count(speed.NOT_MEASURED) == 1 + 4 * 4 * 3 * 6 and "LLaMA2-70B" in text
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark_speed.md"]


def test_measurements_are_not_replaced_by_none(tmp_path, capsys):
    timings = speed.measure({"tiny": (64, 128)}, (4,), CPU, seconds=0.001)
    text = speed.to_markdown([speed.grid(timings, {"machine": "NVIDIA H100"})])
    (tmp_path / "benchmark_speed.md").write_text(text)
    speed.main(tmp_path, "cpu")
    assert (tmp_path / "benchmark_speed.md").read_text() == text
    assert "benchmark_speed.md holds measurements: it stays as it is." in capsys.readouterr().out
