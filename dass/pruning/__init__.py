"""The core: from a block and calibration tokens to masks and weights. Knows no files and no Hydra."""
