"""Files of tokens, masks, weights and seals that are anything: a valid object or one sentence, soon and in bounds."""

import json
import resource
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dass.checkpoint import WEIGHTS, Stored, stored_tensors
from dass.data.sources import tokens_file
from dass.errors import DassError
from dass.folders import SEAL, read_seal
from dass.sparsity import MASKS_FILE, read_masks

FAST = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BITS = torch.full((4,), 0b11001100, dtype=torch.uint8)
ABOUT = {"layer": {"shape": [4, 8], "axis": "in", "pattern": {"n": 2, "m": 4}, "column_block": None}}
FILES = {
    "tokens": save({"input_ids": torch.arange(12).view(3, 4)}),
    "masks": save({"layer": BITS}, {"provenance": "{}", "masks": json.dumps(ABOUT)}),
    "weights": save({"model.embed.weight": torch.ones(3, 4), "model.norm.weight": torch.ones(4)}),
}
INTEGERS = st.sampled_from([0, 1, -1, 4, 96, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**30])
JUNK = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats()
    | st.sampled_from(["", "x", "U8", "F4", "C64", "F8_E8M0", "\x00", "é"])
)
JUNK = st.recursive(
    JUNK, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def read(kind, folder, content):
    """What a reader makes of the bytes; whatever it is, it is what its docstring says."""
    if kind == "tokens":
        (folder / "tokens.safetensors").write_bytes(content)
        found = tokens_file(folder / "tokens.safetensors")
        assert found.dtype == torch.int64 and found.ndim == 2 and 0 < found.numel() <= len(content)
    elif kind == "masks":
        (folder / MASKS_FILE).write_bytes(content)
        masks, provenance = read_masks(folder)
        assert isinstance(provenance, dict) and all(m.keep.dtype == torch.bool for m in masks.values())
    else:
        (folder / WEIGHTS).write_bytes(content)
        assert all(isinstance(one, Stored) for one in stored_tensors(folder).values())


def or_one_sentence(kind, folder, content):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read(kind, folder, content)
    except DassError as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and ".safetensors" in text and len(text) < 1000 + len(str(folder))
    assert time.process_time() - started < 2  # seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def packed(header, data=bytes(64)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("kind", FILES)
@FAST
@given(st.data())
def test_any_damage_of_a_file_of_tensors(kind, tmp_path, data):
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["cut", "flip", "insert", "length"])):
            case "cut":
                content = content[: data.draw(st.integers(0, len(content)))]
            case "flip" if content:
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                at = data.draw(st.integers(0, len(content)))
                content[at:at] = data.draw(st.binary(max_size=9))
            case _:
                content[:8] = struct.pack("<Q", data.draw(INTEGERS.filter(lambda n: 0 <= n < 2**64)))
    or_one_sentence(kind, tmp_path, bytes(content))


@pytest.mark.parametrize("kind", FILES)
@FAST
@given(st.data())
def test_any_header_of_a_file_of_tensors(kind, tmp_path, data):
    """Each part of a valid one is anything: other types, huge and negative offsets and shapes, keys twice."""
    size = struct.unpack("<Q", FILES[kind][:8])[0]
    header = json.loads(FILES[kind][8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    part = data.draw(st.sampled_from(sorted(header[name]) if isinstance(header[name], dict) else [None]))
    pairs = st.lists(INTEGERS, min_size=0, max_size=3)
    if part is None or data.draw(st.booleans()):
        header[name] = data.draw(JUNK)
    else:
        header[name][part] = data.draw(JUNK | pairs)
    text = json.dumps(header).encode()
    if data.draw(st.booleans()):
        text = text[:-1] + b", " + text[1:]  # all keys once more
    or_one_sentence(kind, tmp_path, packed(text, FILES[kind][8 + size :]))


@pytest.mark.parametrize("kind", FILES)
def test_headers_that_go_deep_or_name_the_same_bytes_twice(kind, tmp_path):
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    for header in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        {"layer": one, "input_ids": one},
        {"layer": one | {"shape": [2**40, 2**40], "data_offsets": [0, 2**63]}},
        {"input_ids": {"dtype": "I64", "shape": [2**61, 8], "data_offsets": [0, 0]}},
        {"input_ids": {"dtype": "I64", "shape": [0, 8], "data_offsets": [0, 0]}},
        {"__metadata__": {"masks": "[" * 50_000, "provenance": "{}"}, "layer": one},
    ):
        or_one_sentence(kind, tmp_path, packed(header))


@FAST
@given(st.binary(max_size=60) | st.recursive(JUNK, st.lists).map(json.dumps).map(str.encode), st.integers(0, 200))
def test_any_bytes_are_a_seal_or_none(tmp_path, content, cut):
    valid = json.dumps({"fingerprint": "abc", "files": {"a": "0" * 64}}).encode()
    (tmp_path / SEAL).write_bytes(valid[:cut] + content)
    held = read_seal(tmp_path)
    assert held is None or (isinstance(held[0], str) and isinstance(held[1], dict))
