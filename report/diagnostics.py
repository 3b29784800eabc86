"""What methods do to each block, over depth: heat maps of errors and overlaps, the spread of the norms, and tables.

Everything here is made of what `Comparison.as_dict` leaves in the records, one for each model.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from dass.pruning.blocks import MLP_ROLES, ROLES
from report.grid import MISSING, Grid

Measured = dict[str, dict[str, Any]]
"""What `Comparison.as_dict` returned, by the model's name."""
ByRole = dict[str, list[float | None]]
"""By role, one number for each block."""
ByName = dict[str, ByRole]
"""By method or pair of methods."""

PAGE_WIDTH = 6.9  # inches, both columns of a two-column paper
ROW_HEIGHT = 0.13  # inches, of one method in a heat map
LOG_ABOVE = 10.0  # ratio of the largest to the smallest value
LOG_SPAN = 100.0  # what colours tell apart: one huge activation makes the error of its block tiny, and all others alike
SMALL = 6  # points
DASHES = ("-", "--", ":", "-.")  # models, in turn
MAPS = {"errors": "viridis", "jaccard": "cividis"}  # even to colour-blind readers and in grey
LABELS = {"errors": "relative\noutput error", "jaccard": "Jaccard\noverlap"}
NORMS = {
    "cv": "n: std / mean",
    "p90_p10": "n: 90th / 10th percentile",
    "reordered": "pairs that $n^{1/2}$ reorders",
}
ERROR_LEGEND = (
    "Squared error of a projection's output, relative to the squared dense output, over the calibration tokens; every "
    "method on the dense inputs of the dense model. Mean over the blocks."
)
JACCARD_LEGEND = (
    "Weights that both methods keep, over those that at least one keeps; random masks that keep a share k overlap by "
    "k / (2 - k), a third for a half. Mean over the blocks."
)
NORMS_LEGEND = (
    "n: the norms of the intermediate neurons of a block. Reordered: share of the pairs of weights in an input column "
    "of gate or up that n^0.5 puts in the other order than their magnitude does; at 0, DaSS prunes gate and up by "
    "magnitude within each column."
)


def diagnostics_frame(measured: Measured) -> pd.DataFrame:
    """All numbers, one tidy row each: model, measure, methods, role, block, value (missing ones as NaN)."""
    rows = [
        (model, kind, name, role, block, value)
        for kind in MAPS
        for model, one in measured.items()
        for name, by_role in one[kind].items()
        for role, values in by_role.items()
        for block, value in enumerate(values)
    ]
    rows += [
        (model, name, "", "", block, value)
        for model, one in measured.items()
        for name in NORMS
        for block, value in enumerate(one["norms"][name])
    ]
    frame = pd.DataFrame(rows, columns=["model", "measure", "methods", "role", "block", "value"])
    return frame.astype({"block": int, "value": float})


def diagnostics_grids(measured: Measured, facts: dict[str, str]) -> list[Grid]:
    """Three tables with all models: errors by method, overlaps by pair of methods, norms.

    Args:
        facts: what holds for all rows.
    """
    frame = diagnostics_frame(measured)
    grids = []
    for kind, title, what, legend in (
        ("errors", "Relative output error", "Method", ERROR_LEGEND),
        ("jaccard", "Overlap of the masks", "Methods", JACCARD_LEGEND),
    ):
        means = frame[frame.measure == kind].groupby(["model", "methods", "role"], sort=False).value.mean().unstack()
        shown = _shown(means[[role for role in ROLES if role in means]])
        shown["methods"] = shown["methods"].str.replace("|", ", ")
        grids.append(Grid(title, shown.rename(columns={"model": "Model", "methods": what}), facts, legend))
    norms = frame[frame.measure.isin(list(NORMS))].groupby(["model", "measure"], sort=False).value
    found = norms.agg(["mean", "min", "max"]).stack().unstack("measure").reindex(columns=list(NORMS))
    headers = ["Model", "Of the blocks", "n: std / mean", "n: 90th / 10th percentile", "Reordered"]
    shown = _shown(found).set_axis(headers, axis=1).replace({"min": "lowest", "max": "highest"})
    return [*grids, Grid("Spread of the intermediate norms", shown, facts, NORMS_LEGEND)]


def diagnostics_figure(measured: Measured) -> Figure:
    """Heat maps of the MLP's projections, two rows for each model, and below them the norms of all models.

    Colours mean the same number in all maps of a kind; what lies below a logarithmic scale has its lowest colour, as
    the arrow says. Grey: not measured.
    """
    counts = [len(one[kind]) for one in measured.values() for kind in MAPS]
    heights = [0.35 + ROW_HEIGHT * count for count in counts] + [1.35]
    figure = Figure(figsize=(PAGE_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), len(MLP_ROLES), gridspec_kw={"height_ratios": heights})
    scales = {kind: _scale(measured, kind) for kind in MAPS}
    for i, (model, kind) in enumerate((model, kind) for model in measured for kind in MAPS):
        _heat_maps(list(axes[i]), measured[model][kind], kind, scales[kind])
        if kind == "errors":
            for panel, title in zip(axes[i], ("gate", f"{model}\nup", "down"), strict=True):
                panel.set_title(title)
        extend = "min" if isinstance(scales[kind], LogNorm) else "neither"
        bar = figure.colorbar(ScalarMappable(scales[kind], MAPS[kind]), ax=axes[i], aspect=9, pad=0.01, extend=extend)
        bar.set_label(LABELS[kind])
        bar.ax.tick_params(labelsize=SMALL)
    for panel, (name, label) in zip(axes[-1], NORMS.items(), strict=True):
        for i, (model, one) in enumerate(measured.items()):
            grey = str(0.5 * i / len(measured))
            values = np.array(one["norms"][name], dtype=float)
            panel.plot(values, DASHES[i % len(DASHES)], color=grey, linewidth=1, label=model)
        panel.set_title(label)
        panel.set_xlabel("block")
        panel.margins(x=0.02)
        panel.tick_params(labelsize=SMALL)
        if isinstance(_norm(found for one in measured.values() for found in one["norms"][name]), LogNorm):
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    if len(measured) > 1:
        figure.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _heat_maps(panels: list[Axes], by_name: ByName, kind: str, scale: Normalize) -> None:
    """One map for each role: a row for each method or pair, a column for each block."""
    depth = max((len(values) for by_role in by_name.values() for values in by_role.values()), default=0)
    for panel, role in zip(panels, MLP_ROLES, strict=True):
        values = np.array([by_role.get(role, [None] * depth) for by_role in by_name.values()], dtype=float)
        panel.pcolormesh(np.ma.masked_invalid(values), norm=scale, cmap=MAPS[kind], edgecolor="face", linewidth=0.1)
        panel.set_facecolor("0.8")
        panel.invert_yaxis()
        names = [name.replace("|", ", ") for name in by_name] if panel is panels[0] else []
        panel.set_yticks(np.arange(len(by_name)) + 0.5, names or [""] * len(by_name), fontsize=SMALL)
        ticks = np.arange(0, depth, 5 if depth > 10 else 1)
        panel.set_xticks(ticks + 0.5, [str(tick) for tick in ticks], fontsize=SMALL)
        panel.tick_params(length=1.5)


def _scale(measured: Measured, kind: str) -> Normalize:
    """One scale for the MLPs of all models."""
    frame = diagnostics_frame(measured)
    return _norm(frame[(frame.measure == kind) & frame.role.isin(MLP_ROLES)].value)


def _norm(values: Iterable[float | None]) -> Normalize:
    """From the lowest to the highest number; where they are more than a decade apart logarithmic, at most two long."""
    found = [value for value in values if not pd.isna(value)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    return LogNorm(max(low, high / LOG_SPAN), high) if high > LOG_ABOVE * low > 0 else Normalize(low, high)


def _shown(means: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, and what names the rows as columns before them."""
    return means.map(lambda value: MISSING if pd.isna(value) else f"{value:.3f}").reset_index()
