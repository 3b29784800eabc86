"""The core: from a block and calibration tokens to masks and weights. Knows no files and no Hydra."""

NUMERICS = 1
"""Of the numbers that the core makes; to be raised where masks or weights change, so that old records are not reused."""
