"""Zeros counted, masks written, read and applied."""

import os

import pytest
import torch

from dass.errors import DassError
from dass.pruning.layout import find_blocks
from dass.pruning.masks import NM, Mask, Unstructured, select_mask
from dass.pruning.method import BlockPruner, Method
from dass.pruning.walk import prune_model
from dass.sparsity import PackedMasks, apply_masks, read_masks, sparsity_report
from tests.models import LAYOUTS, random_tokens, tiny_model


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
    assert size < sum(mask.keep.numel() for mask in masks.values()) / 8 + 8000


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
