"""Write a model with its sparse weights packed, or as it was before; the same tensors bit for bit.

python -m experiments.pack model=DIR out=DIR
python -m experiments.pack model=PACKED out=DIR unpack=true
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from dass.packed_model import pack_model, unpack_model
from experiments.plain import run_plain


@dataclass
class PackConfig:
    """The settings of packing."""

    model: str  # a folder
    out: str  # a folder; one that this project wrote and nobody changed is replaced
    unpack: bool = False  # whether `model` is packed, and is to be as it was


WORDS = {"in": "N:M along the inputs", "out": "N:M along the outputs", "bitmask": "with a bitmask"}
WORDS |= {"dense": "not packed"}


def main(config: PackConfig) -> None:
    """Pack or unpack, and print the bytes; DassError where a folder is none that can be read or written."""
    source, out = Path(config.model), Path(config.out)
    if config.unpack:
        unpack_model(source, out)
        print(f"{out}: as before it was packed")
        return
    sums = pack_model(source, out)
    for name, (count, before, after) in sums.items():
        print(f"{WORDS[name]}: {count} tensors, {before} bytes, now {after} ({after / max(before, 1):.4f})")
    before, after = (sum(sizes[i] for sizes in sums.values()) for i in (1, 2))
    print(f"{out}: {before} bytes of weights, now {after} ({after / max(before, 1):.4f})")


if __name__ == "__main__":
    run_plain(main, PackConfig, ("model", "out"), sys.argv[1:])
