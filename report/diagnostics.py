"""What methods do to each block, over depth: errors, overlaps and the spread of the norms.

Everything here is made of what `Comparison.as_dict` leaves in the records, one for each model.
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dass.pruning.blocks import MLP_ROLES, ROLES
from report.figures import METHOD_STYLE, literal
from report.grid import Grid, number

Measured = dict[str, dict[str, Any]]
"""What `Comparison.as_dict` returned, by the model's name."""

PAGE_WIDTH = 6.9  # inches, both columns of a two-column paper
ROW_HEIGHT = 1.4  # inches
LOG_ABOVE = 10.0  # ratio of the largest to the smallest error
SMALL = 7  # points
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": SMALL, "frameon": False}
DASHES = ("-", "--", ":", "-.")  # models, in turn
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
        for kind in LABELS
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
    """Errors and overlaps over depth, a row of panels each for every model, and below them the norms of all models."""
    frame = diagnostics_frame(measured)
    rows = [(model, kind) for model in measured for kind in LABELS]
    figure = Figure(figsize=(PAGE_WIDTH, ROW_HEIGHT * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(MLP_ROLES), squeeze=False)
    for panels, (model, kind) in zip(axes, rows, strict=False):
        own = frame[(frame.model == model) & (frame.measure == kind)]
        for panel, role in zip(panels, MLP_ROLES, strict=True):
            for i, (name, values) in enumerate(own[own.role == role].groupby("methods", sort=False)):
                style = METHOD_STYLE.get(str(name))
                color = style.color if style else f"C{i}"
                label = literal(str(name).replace("|", ", "))
                panel.plot(values.block, values.value, color=color, linewidth=0.9, label=label)
            panel.set_title(literal(f"{model}, {role}"), fontsize=SMALL)
        if kind == "errors" and own.value.max() > LOG_ABOVE * own.value.min() > 0:
            for panel in panels:
                panel.set_yscale("log")
        panels[0].set_ylabel(LABELS[kind])
        panels[-1].legend(**BESIDE)
    for panel, (name, label) in zip(axes[-1], NORMS.items(), strict=True):
        for i, (model, values) in enumerate(frame[frame.measure == name].groupby("model", sort=False)):
            panel.plot(
                values.block, values.value, DASHES[i % len(DASHES)], color="0.2", linewidth=1, label=literal(str(model))
            )
        panel.set_title(label, fontsize=SMALL)
        panel.set_xlabel("block")
        panel.set_ylim(bottom=0)
    axes[-1, -1].legend(**BESIDE)
    return figure


def _shown(means: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, and what names the rows as columns before them."""
    return means.map(lambda value: number(value, ".3f")).reset_index()
