"""DaSS: one-shot pruning of language models with GLU MLPs (arXiv 2405.01943). A plain library; no Hydra in it.

Everything that a notebook needs can be imported from here.
"""

import importlib
from typing import Any

HOMES = {
    "dass.data.assets": ("packaged_model",),
    "dass.data.calibration": ("calibration_tokens",),
    "dass.errors": ("DassError",),
    "dass.evaluation.perplexity": ("evaluation_windows", "perplexity", "window_losses"),
    "dass.models": ("load_model", "load_tokenizer"),
    "dass.pruning.adaptive": ("AdaptivePruner",),
    "dass.pruning.comparison": ("compare_block", "comparison_needs", "diagnostics", "jaccard", "norm_spread"),
    "dass.pruning.criteria": ("criterion",),
    "dass.pruning.layout": ("find_blocks",),
    "dass.pruning.masks": ("NM", "Mask", "Unstructured", "select_mask"),
    "dass.pruning.method": ("Method",),
    "dass.pruning.order": ("order",),
    "dass.pruning.pruner": ("BlockPruner",),
    "dass.pruning.statistics": ("Statistics",),
    "dass.pruning.update": ("Rows", "update"),
    "dass.pruning.walk": ("prune_model", "walk"),
    "dass.sparsity": ("apply_masks", "read_masks"),
}
"""Each is imported when it is asked for: a report needs no transformers."""
__all__ = sorted(name for names in HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """One of the names above."""
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'dass' has no attribute '{name}'")
