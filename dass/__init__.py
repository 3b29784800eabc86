"""DaSS: one-shot pruning of language models with GLU MLPs (arXiv 2405.01943). A plain library; no Hydra in it.

Everything that a notebook needs can be imported from here.
"""

from dass.data.assets import packaged_model
from dass.data.calibration import calibration_tokens
from dass.errors import DassError
from dass.evaluation.perplexity import evaluation_windows, perplexity, window_losses
from dass.models import load_model, load_tokenizer
from dass.pruning.blocks import find_blocks
from dass.pruning.comparison import compare_block, comparison_needs, diagnostics, norm_spread
from dass.pruning.criteria import criterion
from dass.pruning.masks import NM, Mask, Unstructured, select_mask
from dass.pruning.method import BlockPruner, Method
from dass.pruning.statistics import Statistics
from dass.pruning.update import update
from dass.pruning.walk import prune_model, walk
from dass.sparsity import apply_masks, read_masks

__all__ = [
    "NM",
    "BlockPruner",
    "DassError",
    "Mask",
    "Method",
    "Statistics",
    "Unstructured",
    "apply_masks",
    "calibration_tokens",
    "compare_block",
    "comparison_needs",
    "criterion",
    "diagnostics",
    "evaluation_windows",
    "find_blocks",
    "load_model",
    "load_tokenizer",
    "norm_spread",
    "packaged_model",
    "perplexity",
    "prune_model",
    "read_masks",
    "select_mask",
    "update",
    "walk",
    "window_losses",
]
