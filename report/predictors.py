"""What tells in advance in which blocks DaSS does better than Wanda: the paper's break condition, over all models.

What is compared is the error of a block's whole MLP; what might tell are the norms that the two methods go by, and what
their masks keep.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dass.pruning.comparison import WHOLE
from report.grid import Grid, number

Measured = dict[str, dict[str, Any]]
"""What `dass.pruning.comparison.diagnostics` returned, by the model's name."""

REFERENCE, OURS = "wanda", "dass"
PREDICTORS = {
    "cv": "n: std / mean",
    "p90_p10": "n: 90th / 10th percentile",
    "reordered": "pairs that n^0.5 reorders",
    "input_cv": "x: std / mean",
    "input_p90_p10": "x: 90th / 10th percentile",
    "cv_ratio": "std / mean, n over x",
    "p90_p10_ratio": "90th / 10th percentile, n over x",
    "kept_gain": "kept importance of gate and up, minus Wanda's",
    "own_errors": "errors of gate and up alone, over Wanda's",
}
"""What is known of a block before its MLP is run pruned, in words."""
WINS_LEGEND = (
    "Error of a block's whole MLP under each method over that under Wanda; below 1, the method does better than Wanda."
)
CORRELATION_LEGEND = (
    "Spearman's rank correlation, over blocks, of what is known of a block with the logarithm of the error of its "
    "whole MLP over that under Wanda; negative: the more of it, the better for the method. n: norms of the "
    "intermediate neurons, which DaSS goes by; x: input norms of gate and up, which Wanda goes by. Of k blocks, "
    "chance alone gives more than about 2 / sqrt(k) in one of twenty cases; blocks of one model are not independent, "
    "and models differ in more than the predictor, so that only what holds within the models too is to be trusted."
)


def blocks_frame(measured: Measured) -> pd.DataFrame:
    """A row for each model, method beside Wanda and block: the predictors, and `log_ratio`, that of the MLP's errors.

    Natural logarithm; missing where one of the errors is.
    """
    frames = [
        _blocks_of(one, method).assign(model=model, method=method)
        for model, one in measured.items()
        for method in one["errors"]
        if method != REFERENCE and REFERENCE in one["errors"]
    ]
    empty = pd.DataFrame(columns=["model", "method", "block", *PREDICTORS, "log_ratio"])
    return pd.concat(frames, ignore_index=True)[list(empty)] if frames else empty


def correlation(blocks: pd.DataFrame, predictor: str) -> float:
    """Spearman's rank correlation of a predictor with `log_ratio`; NaN where either is the same everywhere."""
    pairs = blocks[[predictor, "log_ratio"]].astype(float).dropna()
    if (pairs.nunique() < 2).any():
        return float("nan")
    return float(spearmanr(pairs[predictor], pairs.log_ratio).statistic)


def wins_grid(blocks: pd.DataFrame, facts: dict[str, str]) -> Grid:
    """In how many blocks each method does better than Wanda, and by how much."""
    rows = []
    for (model, method), own in blocks.dropna(subset="log_ratio").groupby(["model", "method"], sort=False):
        ratios = np.exp(own.log_ratio)
        shown = {"Median": ratios.median(), "Lowest": ratios.min(), "Highest": ratios.max()}
        better = {"Better than Wanda in": f"{(ratios < 1).sum()} of {len(own)} blocks"}
        words = {name: number(value, ".3f") for name, value in shown.items()}
        rows.append({"Model": model, "Method": method} | better | words)
    columns = ["Model", "Method", "Better than Wanda in", "Median", "Lowest", "Highest"]
    return Grid("Error of the whole MLP, over Wanda's", pd.DataFrame(rows, columns=columns), facts, WINS_LEGEND)


def correlation_grid(blocks: pd.DataFrame, facts: dict[str, str]) -> Grid:
    """Every predictor's rank correlation, over all blocks and over those of each model; for the variants of DaSS."""
    rows = []
    for method in _variants(blocks):
        own = blocks[blocks.method == method]
        parts = {"All blocks": own} | dict(iter(own.groupby("model", sort=False)))
        for predictor, words in PREDICTORS.items():
            found = {str(name): number(correlation(part, predictor), "+.2f") for name, part in parts.items()}
            rows.append({"Method": method, "Predictor": words} | found)
    frame = pd.DataFrame(rows, columns=None if rows else ["Method", "Predictor", "All blocks"])
    said = {"in short": sentence(blocks)} if rows else {}
    return Grid("What tells in advance where DaSS beats Wanda", frame, facts | said, CORRELATION_LEGEND)


def sentence(blocks: pd.DataFrame) -> str:
    """The break condition in words: where DaSS wins, and how much each spread of norms has to do with it."""
    own = blocks[blocks.method == OURS].dropna(subset="log_ratio")
    found = {predictor: correlation(own, predictor) for predictor in PREDICTORS}
    known = {predictor: value for predictor, value in found.items() if not np.isnan(value)}
    best = max(known, key=lambda predictor: abs(known[predictor]), default=None)
    if best is None:
        return "too few blocks to tell."
    told = {"of the spread of n": "cv", "of that of the input norms": "input_cv", "of their ratio": "cv_ratio"}
    values = ", ".join(f"{words} {number(found[predictor], '+.2f')}" for words, predictor in told.items())
    return (
        f"DaSS does better than Wanda in {(own.log_ratio < 0).sum()} of {len(own)} blocks of "
        f"{own.model.nunique()} models; the rank correlation with its error over Wanda's (std / mean over neurons or "
        f"inputs) is {values}; the strongest is that of {PREDICTORS[best]}: {number(known[best], '+.2f')}."
    )


def _blocks_of(one: dict[str, Any], method: str) -> pd.DataFrame:
    """The blocks of one model, and of one method beside Wanda."""
    blocks = pd.DataFrame(one["norms"]).astype(float)
    errors, kept = (
        {name: _by_role(table[name]) for name in (method, REFERENCE)} for table in (one["errors"], one["kept"])
    )
    with np.errstate(divide="ignore"):  # what errs nowhere, or spreads nowhere, is infinitely far off: ranks take it
        log_ratios = np.log(errors[method] / errors[REFERENCE])
        blocks["cv_ratio"] = blocks.cv / blocks.input_cv
        blocks["p90_p10_ratio"] = blocks.p90_p10 / blocks.input_p90_p10
    blocks["kept_gain"] = (kept[method] - kept[REFERENCE])[["gate", "up"]].mean(axis=1)
    blocks["own_errors"] = log_ratios[["gate", "up"]].mean(axis=1)
    blocks["log_ratio"] = log_ratios[WHOLE]
    return blocks.rename_axis("block").reset_index()


def _by_role(values: dict[str, list[float | None]]) -> pd.DataFrame:
    """Numbers by role over the blocks; a role that is missing everywhere as NaN."""
    return pd.DataFrame(values).reindex(columns=["gate", "up", WHOLE]).astype(float)


def _variants(blocks: pd.DataFrame) -> Iterable[str]:
    """The methods that are DaSS, with whatever alpha."""
    return [name for name in blocks.method.unique() if name.split()[0] == OURS]
