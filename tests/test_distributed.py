"""One run in several processes: the same as in one, and nobody waits for one that failed."""

import contextlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from dass import resume
from dass.distributed import Elsewhere, everyone, first, gathered, joined, rank, share_of, together, world
from dass.errors import DassError
from dass.evaluation.perplexity import perplexity
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.comparison import compare_block, comparison_needs
from dass.pruning.masks import NM, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model, walk
from experiments import walked
from experiments.prune import main
from experiments.resolve import check
from tests.experiments.test_prune import composed, records, setting  # noqa: F401  (a fixture)
from tests.models import random_tokens, tiny_model
from tests.test_memory import Fault
from tests.test_resume import ended, killed_at, overrides, same

ROOT = Path(__file__).parents[1]
ALONG_INPUTS = dict.fromkeys(("gate", "up", "down", "q", "k", "v", "o"), "in")
DASS = {**ALONG_INPUTS, "gate": "out", "up": "out"}
MLP = {role: DASS[role] for role in ("gate", "up", "down")}
WANDA = BlockPruner(Method("wanda", ALONG_INPUTS, NM(2, 4)), "all")
SPARSEGPT = BlockPruner(Method("obs", ALONG_INPUTS, NM(2, 4), "obs"), "all")
WANDA_MLP = BlockPruner(Method("wanda", ALONG_INPUTS, NM(2, 4)))
CANDIDATES = {"wanda": WANDA_MLP, "dass": BlockPruner(Method("dass", MLP, NM(2, 4)))}
PRUNERS = {
    "magnitude": BlockPruner(Method("magnitude", ALONG_INPUTS, NM(2, 4))),
    "wanda": WANDA,
    "dass in a matched order": BlockPruner(Method("dass", MLP, NM(4, 8), order="matched")),
    "ria": BlockPruner(Method("ria", ALONG_INPUTS, Unstructured(0.5))),
    "sparsegpt": SPARSEGPT,
    "adaptive": AdaptivePruner(CANDIDATES),
}


def process(number, count, place, work, connection):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=number, world_size=count)
    try:
        result = work()
    except BaseException as error:
        result = error
    connection.send(result)


def in_processes(count, work, place):
    """What a function returns or raises in each of so many processes, which know all that this one does."""
    place.unlink(missing_ok=True)
    context, found = multiprocessing.get_context("fork"), []
    for number in range(count):
        here, there = context.Pipe(duplex=False)
        one = context.Process(target=process, args=(number, count, place, work, there), daemon=True)
        one.start()
        there.close()
        found.append((one, here))
    try:
        assert all(here.poll(120) for _, here in found), "a process waits for what never comes"
        return [received(here) for _, here in found]
    finally:
        for one, _ in found:
            one.join(10)
            one.kill()


def received(connection):
    """What a process sent, or that it ended without."""
    try:
        return connection.recv()
    except EOFError as error:
        return error


def pruned(architecture, pruner, n_sequences=5, min_expert_tokens=None):
    """Statistics, rare experts and choices of every block, and the weights, as plain values."""
    model, seen = tiny_model(architecture, torch.float64), []
    for step in walk(model, random_tokens(n_sequences), pruner.needs, 2, min_expert_tokens):
        norms = {reads: stream.norm().tolist() for reads, stream in step.streams.items()}
        counts = {reads: (stream.n_tokens, stream.n_sequences) for reads, stream in step.streams.items()}
        done = pruner.prune(step.block, step.streams, step.outputs)
        seen.append((norms, counts, step.rare, [one.chosen for one in done]))
    return seen, {name: weight.tolist() for name, weight in model.named_parameters()}


def assert_alike(found, expected, tolerance=1e-12):
    """Statistics up to the order of summation, all else exactly."""
    for (norms, *facts), (wanted, *others) in zip(found[0], expected[0], strict=True):
        assert facts == others and norms.keys() == wanted.keys()
        for reads, norm in norms.items():
            assert norm == pytest.approx(wanted[reads], rel=1e-6)
    for name, weight in found[1].items():
        weight, wanted = torch.tensor(weight), torch.tensor(expected[1][name])
        assert torch.equal(weight == 0, wanted == 0), name
        torch.testing.assert_close(weight, wanted, rtol=tolerance, atol=tolerance)


def all_pruned():
    """Every method, and experts: of 80 tokens that are routed, each sees few, and in no process enough."""
    cases = {name: partial(pruned, "llama", pruner) for name, pruner in PRUNERS.items()}
    cases |= {f"experts, {n} tokens": partial(pruned, "mixtral", WANDA_MLP, 4, n) for n in (1, 60, 70, 200)}
    return {name: case() for name, case in cases.items()}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@torch.no_grad()
def test_several_processes_prune_as_one(count, tmp_path):
    expected, found = all_pruned(), in_processes(count, all_pruned, tmp_path / "meeting")
    for name, wanted in expected.items():
        assert all(one[name][1] == found[0][name][1] for one in found), name  # the same bits in all
        for one in found:
            assert_alike(one[name], wanted, 1e-8 if name == "sparsegpt" else 1e-12)
    rare = [sum(len(block[2]) for block in expected[f"experts, {n} tokens"][0]) for n in (1, 60, 70, 200)]
    assert rare[0] == 0 and 0 < rare[2] < rare[3] == 6


def measured():
    """In fp32 the errors of compared methods, losses, masks, what resumed ones are told, and what `gathered` brings."""
    model, tokens = tiny_model(), random_tokens(7)
    compared = {"wanda": WANDA_MLP, "sparsegpt": SPARSEGPT}
    errors = []
    for one, size in ((model, 2), (tiny_model("mixtral"), 1)):  # what experts write is seen in whole batches
        for step in walk(one, tokens, partial(comparison_needs, compared), size, min_expert_tokens=1):
            found = compare_block(compared, step.block, step.streams, step.outputs)
            errors.append(found.errors | {"zeros": {"": found.zeros}})
            errors[-1] |= {f"expert {e.index}, {e.tokens} tokens": e.errors for e in found.experts}
    known = perplexity(model, tokens.split(2)).losses[:4]
    losses, told = [perplexity(model, tokens.split(size)).losses for size in (2, 7)], []
    perplexity(model, tokens.split(2), known=known, done=lambda so_far: told.append(len(so_far)))
    masks = prune_model(model, SPARSEGPT, tokens)
    batches = [torch.full((i % 3, 2), i, dtype=torch.bfloat16) for i in range(7)]
    whole = [[one.tolist() for one in own] for own in gathered(share_of(batches))]
    return errors, losses, {name: mask.keep.tolist() for name, mask in masks.items()}, told, whole


def test_errors_and_losses_are_those_of_all(tmp_path):
    errors, losses, masks, told, whole = measured()
    one, other = in_processes(2, measured, tmp_path / "meeting")
    assert any("expert 2" in name for name in errors[-1])
    for block, wanted in zip(one[0], errors, strict=True):
        assert block.keys() == wanted.keys()
        for method, roles in wanted.items():
            assert block[method] == pytest.approx(roles, rel=1e-4)
    assert one[1] == losses  # to the bit: the batches are the same
    assert one[:3] == other[:3] and one[2].keys() == masks.keys()
    agree = torch.cat([(torch.tensor(one[2][name]) == torch.tensor(mask)).flatten() for name, mask in masks.items()])
    assert agree.float().mean() > 0.99  # fp32: SparseGPT amplifies what the order of summation changes
    assert told == [6, 7] and one[3] == [7]
    assert one[4] == [whole[0][::2], whole[0][1::2]] and other[4] == []


def outcomes():
    """What becomes of runs of which some fail, one after the other."""

    def fails(in_process, how, at_first=lambda: None):
        at_first()
        if rank() == in_process:
            raise how
        return everyone(rank())

    works = [
        partial(fails, None, None),
        partial(fails, 1, DassError("too much: take less.", "seed")),
        partial(fails, 0, ValueError("a bug")),
        partial(first, partial(fails, 0, DassError("full: free space."))),
        partial(fails, 1, KeyError("late"), partial(everyone, 1)),
        partial(prune_model, tiny_model(), WANDA, random_tokens(1)),
        partial(prune_model, tiny_model(), BlockPruner(Method("wanda", MLP, NM(2, 4), "mlp")), random_tokens(4)),
        partial(fails, None, None),
    ]
    found = []
    for work in works:
        try:
            with together():
                with contextlib.suppress(OSError), together():  # one in another
                    result = work()
                found.append(result)
        except Exception as error:
            found.append(f"{type(error).__name__} {error} {getattr(error, 'field', None)}")
    return found


def test_where_one_fails_all_do_and_go_on_together(tmp_path):
    one, other = in_processes(2, outcomes, tmp_path / "meeting")
    assert one[0] == other[0] == one[-1] == other[-1] == [0, 1]
    told = "Process {} of 2: "
    assert one[1:5] == [
        f"Elsewhere {told.format(2)}too much: take less. seed",
        "ValueError a bug None",
        "DassError full: free space. None",
        f"Elsewhere {told.format(2)}KeyError: 'late' None",
    ]
    assert other[1:5] == [
        "DassError too much: take less. seed",
        f"Elsewhere {told.format(1)}ValueError: a bug None",
        f"Elsewhere {told.format(1)}full: free space. None",
        "KeyError 'late' None",
    ]
    assert one[5] == other[5] and "2 processes cannot share 1 calibration sequences" in one[5]
    assert one[6] == other[6] and "The update mlp is for one process, not 2" in one[6]


def gone():
    """The second process dies; what the first one is told."""
    if rank() == 1:
        os._exit(9)
    with together():
        everyone(1)


def test_a_process_that_dies_is_missed(tmp_path):
    found, died = in_processes(2, gone, tmp_path / "meeting")
    assert isinstance(found, Elsewhere) and "is gone" in str(found) and isinstance(died, EOFError)


def test_where_a_model_is_spread_is_not_part_of_a_run(setting):  # noqa: F811
    assert len({check(composed(*setting, given)).run_id for given in ("seed=0", "model.device_map=auto")}) == 1


def test_alone_nothing_is_different():
    assert (world(), rank(), everyone(3), first(lambda: 4), share_of([1, 2])) == (1, 0, [3], 4, [1, 2])
    with joined(), together():
        pass
    with pytest.raises(ValueError), joined(), together():
        raise ValueError


def runs(*given):
    """The app in this process, several times; what it raised."""

    def one(overrides):
        try:
            return main(composed(*overrides))
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__} {error}"

    return [one(overrides) for overrides in given]


def started(*given):
    """As `runs`, the first of which is stopped while it is at its third block, and keeps how far it has come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "EVERY", 0.0)
        patch.setattr(resume, "SHARE", math.inf)
        killed_at(patch, walked, "note", 3)
        stopped = runs(*given[:1])
    return stopped + runs(*given[1:])


def test_a_run_of_several_processes_is_one_run(setting, tmp_path, capfd):  # noqa: F811
    one, other = tmp_path / "one", tmp_path / "other"
    main(composed(*setting, *overrides(one)))
    again = [*setting, *overrides(other)]
    absent = [f"{again[1]}-not", *again[:1], *again[2:]]
    streamed = [*again, "memory=stream", "method=wanda"]
    first_one, second = in_processes(2, partial(started, again, again, again, absent, streamed), tmp_path / "meeting")
    (record,) = records(other)
    assert first_one[0] == second[0] == "SystemExit 143" and first_one[1:3] == second[1:3] == [record["id"]] * 2
    assert "There is no folder" in first_one[3] and first_one[3].startswith("DassError")
    assert second[3].startswith("Elsewhere Process 1 of 2: There is no folder")
    assert "memory=stream is for one" in first_one[4] and first_one[4] == second[4]
    assert same(ended(tmp_path, one), ended(tmp_path, other))
    assert record["machine"]["processes"] == 2 and "processes" not in records(one)[0]["machine"]
    told = capfd.readouterr()
    assert "goes on behind block 2 of 3" in told.err and "already done, skipping" in told.out
    assert sorted(path.name for path in (other / "runs").iterdir()) == [f"{record['id']}.json"]


def test_what_another_run_is_at_is_left_by_all(setting, tmp_path):  # noqa: F811
    def busy():
        with pytest.MonkeyPatch.context() as patch:
            if rank() == 0:  # which alone looks
                patch.setattr("experiments.prune.claimed_run", lambda *_: contextlib.nullcontext(None))
            return runs(setting)

    assert in_processes(2, busy, tmp_path / "meeting") == [[None], [None]]


def test_a_failed_evaluation_of_one_process_leaves_the_record_and_the_others(setting, tmp_path):  # noqa: F811
    given = [*setting, "batch_size=2"]

    def broken():
        with pytest.MonkeyPatch.context() as patch:
            if rank() == 1:
                patch.setattr("dass.evaluation.perplexity.window_losses", lambda *_: 1 / 0)
            failed = runs(given)
        return failed + runs([*given, "rerun=true"])

    one, other = in_processes(2, broken, tmp_path / "meeting")
    (record,) = records(tmp_path)
    assert one == ["Elsewhere Process 2 of 2: ZeroDivisionError: division by zero", record["id"]]
    assert other == ["ZeroDivisionError division by zero", record["id"]]
    assert record["failed"] == {} and len(record["windows"]) == 10


def test_the_record_tells_of_smaller_batches_of_any_process(setting, tmp_path):  # noqa: F811
    def narrow():
        with pytest.MonkeyPatch.context() as patch:
            if rank() == 1:
                Fault(patch, rows=1)
            return runs([*setting, "batch_size=2"])

    in_processes(2, narrow, tmp_path / "meeting")
    (record,) = records(tmp_path)
    resolved = record["config"]["resolved"]
    assert resolved["halved_from"] == {"pruning": 2, "evaluation": 2}
    assert (resolved["batch_size"], resolved["evaluation_batch_size"]) == (1, 1)


def torchrun(count, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "experiments.prune", *overrides], cwd=ROOT, capture_output=True, text=True, env=variables
    )


@pytest.mark.slow
def test_torchrun(setting, tmp_path):  # noqa: F811
    """A sweep of which one run fails, then what is wrong from the start; each is told once."""
    swept = torchrun(2, "-m", *setting, "method=wanda,dass,magnitude", "sparsity=nm", "sparsity.m=4", "sparsity.n=2,9")
    told = [line for line in swept.stderr.splitlines() if line.startswith("error:")]
    assert swept.returncode == 1 and len(told) == 3 and "3 of 6 runs failed:" in swept.stderr
    assert swept.stdout.count("sparsity 0.5000") == 3 and swept.stdout.count("report: ") == 1
    assert len(records(tmp_path)) == 3
    (manifest,) = (tmp_path / "runs" / "manifests").iterdir()
    assert [run["why"] is None for run in json.loads(manifest.read_text())["runs"]] == [True, False] * 3
    for wrong, why in {"sparsty=2of4": "sparsty", "calibration.n_sequences=1": "cannot share 1"}.items():
        failed = torchrun(2, *setting, wrong)
        told = [line for line in failed.stderr.splitlines() if line.startswith(("error:", "stopped"))]
        assert failed.returncode == 1 and len(told) == 1 and why in told[0], failed.stderr
    refused = torchrun(2, "-m", *setting, "hydra/launcher=joblib", "method=wanda,dass")
    assert refused.returncode == 1 and "leave out hydra/launcher" in refused.stderr
