"""Zeros counted, masks written, read and applied."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from dass.errors import DassError
from dass.packing import encoded_bytes
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Mask, Unstructured, select_mask
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.walk import prune_model
from dass.sparsity import MASKS_FILE, PackedMasks, apply_masks, read_masks, require_own_masks, sparsity_report
from tests.models import LAYOUTS, random_tokens, tiny_model
from tests.test_folders import in_child


def pruned_model(pattern, criterion="dass", update="none"):
    model, packed = tiny_model(), PackedMasks()
    axis = (
        {"gate": "out", "up": "out", "down": "in"}
        if criterion == "dass"
        else dict.fromkeys(("gate", "up", "down"), "layer")
    )

    parameters = {"block_size": 24} if update == "obs" else {}
    masks = prune_model(model, BlockPruner(Method(criterion, axis, pattern, update, parameters)), random_tokens())
    for name, mask in masks.items():
        packed.add(name, mask)
    return model, packed, masks


@pytest.mark.parametrize("criterion", ["dass", "obs"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.3)], ids=str)
def test_written_masks_make_the_same_model(tmp_path, pattern, criterion):
    model, packed, masks = pruned_model(pattern, criterion, "obs" if criterion == "obs" else "none")
    packed.write(tmp_path, {"id": "abc123", "config": {"seed": 0}})
    read, provenance = read_masks(tmp_path)
    assert provenance == {"id": "abc123", "config": {"seed": 0}}
    assert read.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(read[name].keep, mask.keep)
        assert (read[name].pattern, read[name].axis) == (mask.pattern, mask.axis)
    dense = tiny_model()
    apply_masks(dense, read)
    for name in masks:
        assert torch.equal(dense.get_parameter(f"{name}.weight") == 0, model.get_parameter(f"{name}.weight") == 0)
    size = os.path.getsize(tmp_path / "masks.safetensors")
    bits = 0.67 if pattern == NM(2, 4) else 1.0
    assert size < bits * sum(mask.keep.numel() for mask in masks.values()) / 8 + 8000


def test_masks_of_a_bit_a_weight_are_still_read(tmp_path):
    """As files were before 2:4 took digits of groups."""
    save_file(BITS, tmp_path / MASKS_FILE, header())
    assert torch.equal(read_masks(tmp_path)[0]["layer"].keep, torch.tensor([[1, 1, 0, 0] * 2] * 4) > 0)


@pytest.mark.parametrize("axis", ["in", "out", "both"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_masks_along_any_axis_come_back(tmp_path, axis, pattern):
    packed, mask = PackedMasks(), select_mask(torch.rand(24, 40), pattern, axis)
    packed.add("layer", mask)
    packed.write(tmp_path, {"id": "x"})
    found = read_masks(tmp_path)[0]["layer"]
    assert torch.equal(found.keep, mask.keep) and (found.axis, found.pattern) == (axis, pattern)
    assert found.keep.is_contiguous() and len(packed.bits["layer"]) == encoded_bytes(24 * 40, pattern)


def test_masks_that_do_not_fit(tmp_path):
    with pytest.raises(DassError, match="not a file of masks"):
        read_masks(tmp_path)
    with pytest.raises(DassError, match="fits no projection"):
        apply_masks(tiny_model(), {"model.layers.0.mlp.up_proj": select_mask(torch.rand(4, 4), NM(2, 4), "in")})
    packed = PackedMasks()
    packed.add("layer", Mask(torch.ones(4, 4, dtype=torch.bool), NM(2, 4), "in"))
    packed.write(tmp_path, {"id": "x"})
    with pytest.raises(DassError, match="breaks its pattern"):
        read_masks(tmp_path)


def header(**changes):
    """The header of a valid file of one 2:4 mask, `(4, 8)`, with other values; None leaves one out."""
    facts = {"shape": [4, 8], "axis": "in", "pattern": {"n": 2, "m": 4}, "column_block": None} | changes
    return {"provenance": "{}", "masks": json.dumps({"layer": {k: v for k, v in facts.items() if v != "left out"}})}


BITS = {"layer": torch.full((4,), 0b11001100, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("metadata", "bits"),
    [
        (header(shape=[10**6, 10**6]), BITS),
        (header(shape=[10**30, 8]), BITS),
        (header(shape=[-4, -8]), BITS),
        (header(shape=[4.0, 8]), BITS),
        (header(shape=[True, 32]), BITS),
        (header(shape=[32]), BITS),
        (header(shape="48"), BITS),
        (header(column_block=-4), BITS),
        (header(column_block=0), BITS),
        (header(column_block="4"), BITS),
        (header(column_block="left out"), BITS),
        (header(axis="diagonal"), BITS),
        (header(axis=["in"]), BITS),
        (header(pattern={"n": 2}), BITS),
        (header(pattern=[2, 4]), BITS),
        (header(pattern={"n": 2, "m": 10**30}), BITS),
        (header(pattern={"ratio": "half"}), BITS),
        (header(more=1), BITS),
        (header(grouped=True), BITS),
        (header(grouped=True), {"layer": torch.full((3,), 255, dtype=torch.uint8)}),
        (header(grouped=True, pattern={"n": 1, "m": 10**9}), BITS),
        (header() | {"masks": "[1, 2]"}, BITS),
        (header() | {"masks": '["layer"]'}, BITS),
        (header() | {"masks": "{"}, BITS),
        (header() | {"masks": "[" * 10**5}, BITS),
        (header() | {"provenance": "[]"}, BITS),
        ({"masks": header()["masks"]}, BITS),
        ({}, BITS),
        (header(), {"layer": BITS["layer"][:3]}),
        (header(), {"layer": torch.zeros(5, dtype=torch.uint8)}),
        (header(), {"layer": BITS["layer"].float()}),
        (header(), {"layer": torch.zeros(4, dtype=torch.uint8)}),
        (header(), {"another": BITS["layer"]}),
        (header(), BITS | {"another": BITS["layer"].clone()}),
    ],
)
def test_a_header_that_means_nothing(tmp_path, metadata, bits):
    save_file(BITS, tmp_path / MASKS_FILE, header())
    assert read_masks(tmp_path)[0]["layer"].keep.sum() == 16
    save_file(bits, tmp_path / MASKS_FILE, metadata)
    with pytest.raises(DassError) as caught:
        read_masks(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_file_is_masks_or_one_sentence(tmp_path, data):
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=3)
        | st.sampled_from(["in", "n", "m"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "m", "ratio"]), inner),
        max_leaves=5,
    )
    facts = st.fixed_dictionaries(
        {}, optional={"shape": values | st.just([4, 8]), "axis": values, "pattern": values, "column_block": values}
    )
    path = tmp_path / MASKS_FILE
    match data.draw(st.sampled_from(["bytes", "damaged", "header"])):
        case "bytes":
            path.write_bytes(data.draw(st.binary(max_size=200)))
        case "damaged":
            content = bytearray(save(BITS, header()))
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        case _:
            save_file(BITS, path, header(**data.draw(facts)) | data.draw(st.sampled_from([{}, {"provenance": "1"}])))
    try:
        masks, provenance = read_masks(tmp_path)
    except DassError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(provenance, dict) and all(mask.keep.dtype == torch.bool for mask in masks.values())


@pytest.mark.parametrize("kind", ["bytes", "safetensors", "changed", "link", "folder"])
def test_masks_of_somebody_else_are_never_touched(tmp_path, kind):
    _, packed, _ = pruned_model(NM(2, 4))
    path = tmp_path / MASKS_FILE
    packed.write(tmp_path, {"id": "old"})
    packed.write(tmp_path, {"id": "new"})  # ours are replaced
    assert read_masks(tmp_path)[1] == {"id": "new"} and os.listdir(tmp_path) == [MASKS_FILE]
    content = path.read_bytes()
    path.unlink()
    if kind == "bytes":
        path.write_bytes(b"years of work")
    elif kind == "safetensors":
        save_file(BITS, path, header())
    elif kind == "changed":
        path.write_bytes(content.replace(b"new", b"own"))
        assert read_masks(tmp_path)[1] == {"id": "own"}
    elif kind == "link":
        (tmp_path / "ours").write_bytes(content)
        path.symlink_to(tmp_path / "ours")
    else:
        path.mkdir()
    before = None if kind == "folder" else path.read_bytes()
    with pytest.raises(DassError, match=f"{MASKS_FILE} would be replaced, but it is not one"):
        packed.write(tmp_path, {"id": "newer"})
    assert path.is_dir() if before is None else path.read_bytes() == before
    assert not (tmp_path / f".{MASKS_FILE}.unfinished").exists()


def test_one_process_writes_masks_at_a_time(tmp_path):
    _, packed, _ = pruned_model(NM(2, 4))

    def work(name: int) -> None:
        for _ in range(5):
            packed.write(tmp_path, {"id": name})

    children = []
    for name in range(5):
        if (pid := os.fork()) == 0:
            os._exit(in_child(lambda name=name: work(name)))
        children.append(pid)
    assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children} <= {0, 3}
    assert read_masks(tmp_path)[1]["id"] in range(5) and os.listdir(tmp_path) == [MASKS_FILE]
    require_own_masks(tmp_path)


def test_report_counts_zeros():
    model, _, _ = pruned_model(NM(1, 4))
    blocks = find_blocks(model)
    targeted = [p for block in blocks for p in block.projections if p.role in ("gate", "down")]
    report = sparsity_report(model, blocks, targeted)
    assert report["targeted"] == report["mlp"] == 0.75
    mlp, attention = 3 * 3 * 32 * 64, 3 * 32 * (32 + 16 + 16 + 32)
    assert report["linear"] == pytest.approx(0.75 * mlp / (mlp + attention))
    assert report["total"] == pytest.approx(0.75 * mlp / sum(p.numel() for p in model.parameters()))
    first = report["projections"]["model.layers.0.mlp.gate_proj"]
    assert first == {"role": "gate", "weights": 2048, "zeros": 1536, "sparsity": 0.75}


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_masks_of_every_layout_apply_to_the_released_model(tmp_path, architecture):
    axis = {"gate": "out", "up": "out", "down": "in"}
    pruned, released, packed = tiny_model(architecture), tiny_model(architecture), PackedMasks()
    masks = prune_model(pruned, BlockPruner(Method("dass", axis, NM(2, 4))), random_tokens())
    for name, mask in masks.items():
        packed.add(name, mask)
    packed.write(tmp_path, {"id": "x"})
    apply_masks(released, read_masks(tmp_path)[0])
    for (name, weight), applied in zip(pruned.named_parameters(), released.parameters(), strict=True):
        assert torch.equal(weight, applied), name
    assert sparsity_report(pruned, find_blocks(pruned), [])["mlp"] == 0.5
