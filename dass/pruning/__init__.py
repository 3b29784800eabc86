"""The core: from a block and calibration tokens to masks and weights. Knows no files and no Hydra."""

NUMERICS = 1
"""Raised where the core's masks or weights change, so that no old record is taken for a new one."""
