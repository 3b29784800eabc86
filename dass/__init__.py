"""DaSS: one-shot pruning of language models with GLU MLPs (arXiv 2405.01943). A plain library; no Hydra in it."""
