"""What methods do to each block, over depth: errors, kept importance, overlaps and the spread of the norms.

Everything here is made of what `dass.pruning.comparison.diagnostics` leaves in the records, one for each model.
"""

import textwrap
from collections import Counter
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dass.fingerprint import hashed
from dass.pruning.blocks import ROLES
from dass.pruning.comparison import SHARE, WHOLE
from dass.records import identity_of
from report.figures import METHOD_STYLE, OTHER_COLORS, literal
from report.grid import Grid, number
from report.predictors import Measured, blocks_frame, correlation_grid, wins_grid
from report.runs import Run
from report.words import calibration_words, facts_of, model_words

PAGE_WIDTH = 6.9  # inches, both columns of a two-column paper
ROW_HEIGHT = 1.25  # inches
LOG_ABOVE = 10.0  # ratio of the largest to the smallest value of a row of panels
TITLE_SIZE, TICK_SIZE = 7, 6  # points
TITLE_WIDTH = 128  # characters of that size, over the whole page
BY_ROLE = ("errors", "kept", "jaccard")
NORMS = {
    "cv": "n: std / mean",
    "p90_p10": "n: 90th / 10th percentile",
    "input_cv": "x: std / mean",
    "input_p90_p10": "x: 90th / 10th percentile",
    "reordered": "Reordered",
}
SPREADS = {"p90_p10": "norms:\n90th / 10th perc.", "cv": "norms:\nstd / mean"}
SPREAD_STYLE = {"n (neurons)": ("", "#000000", "-"), "x (inputs)": ("input_", "#999999", "--")}
ERROR_LEGEND = (
    "Squared error of a projection's output, relative to the squared dense output, over the calibration tokens; every "
    f"method on the dense inputs of the dense model. {WHOLE}: of what the whole MLP adds to the block, pruned in all "
    f"its projections, over {SHARE:.0%} of the calibration sequences. Mean over the blocks."
)
KEPT_LEGEND = (
    "Share of the sum of the scores of the dense weights that the mask keeps, by each method's own criterion. Mean "
    "over the blocks."
)
JACCARD_LEGEND = (
    "Weights that both methods keep, over those that at least one keeps; random masks that keep a share k overlap by "
    "k / (2 - k), a third for a half. Mean over the blocks."
)
NORMS_LEGEND = (
    "n: the norms of the intermediate neurons of a block; x: the input norms of gate and up. Reordered: share of the "
    "pairs of weights in an input column of gate or up that n^0.5 puts in the other order than their magnitude does; "
    "at 0, DaSS prunes gate and up by magnitude within each column."
)


def comparison_sets(runs: list[Run]) -> list[dict[str, Run]]:
    """The runs that stand in one set of tables, by the words of their model: each model once, in one setting.

    Settings are those that were given: where a text begins with a BOS token is the model's own.
    """
    sets: dict[tuple[Any, ...], dict[str, Run]] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for run in runs:
        if not run.record or "diagnostics" not in run.record:
            continue
        text = {key: value for key, value in run.config["calibration"].items() if key != "bos" and value is not None}
        setting = (run.setting.pruned, identity_of(hashed("calibration", text)), run.pattern)
        model = model_words(run)
        sets.setdefault((*setting, times[*setting, model]), {})[model] = run
        times[*setting, model] += 1
    return list(sets.values())


def comparison_facts(runs: dict[str, Run]) -> dict[str, str]:
    """What may hold for all rows of a set of tables."""
    if not runs:
        return {}
    first, own = next(iter(runs.values())), list(runs.values())
    methods = dict.fromkeys(name for run in own if run.record for name in run.record["diagnostics"]["errors"])
    words = facts_of(own, "pruned", "seeds")
    facts = {"calibration": calibration_words(first), "pattern": str(first.pattern), "methods": ", ".join(methods)}
    return facts | {"pruned": words["pruned"], "seeds": words["seeds"]}


def diagnostics_frame(measured: Measured) -> pd.DataFrame:
    """All numbers, one tidy row each: model, measure, methods, role, block, value (missing ones as NaN)."""
    rows = [
        (model, kind, name, role, block, value)
        for kind in BY_ROLE
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
    """Tables with all models: who wins and what tells in advance; errors, kept importance, overlaps, norms.

    Args:
        facts: what holds for all rows.
    """
    frame, blocks = diagnostics_frame(measured), blocks_frame(measured)
    grids = [wins_grid(blocks, facts), correlation_grid(blocks, facts)]
    for kind, title, what, legend in (
        ("errors", "Relative output error", "Method", ERROR_LEGEND),
        ("kept", "Kept importance", "Method", KEPT_LEGEND),
        ("jaccard", "Overlap of the masks", "Methods", JACCARD_LEGEND),
    ):
        means = frame[frame.measure == kind].groupby(["model", "methods", "role"], sort=False).value.mean().unstack()
        shown = _shown(means[[role for role in (*ROLES, WHOLE) if role in means]])
        shown["methods"] = shown["methods"].str.replace("|", ", ")
        grids.append(Grid(title, shown.rename(columns={"model": "Model", "methods": what}), facts, legend))
    norms = frame[frame.measure.isin(list(NORMS))].groupby(["model", "measure"], sort=False).value
    found = norms.agg(["median", "min", "max"]).stack().unstack("measure").reindex(columns=list(NORMS))
    headers = ["Model", "Of the blocks", *NORMS.values()]
    shown = _shown(found).set_axis(headers, axis=1).replace({"min": "lowest", "max": "highest"})
    return [*grids, Grid("Spread of the norms", shown, facts, NORMS_LEGEND)]


def diagnostics_figure(measured: Measured) -> Figure:
    """Over depth, a column of panels for each model: error of the whole MLP, kept importance, spread of the norms."""
    frame, blocks = diagnostics_frame(measured), blocks_frame(measured)
    kept = frame[(frame.measure == "kept") & frame.role.isin(["gate", "up"])]
    errors = frame[(frame.measure == "errors") & (frame.role == WHOLE)]
    by_method = {
        "error of the\nwhole MLP": errors,
        "log error,\nminus Wanda's": blocks.rename(columns={"method": "methods", "log_ratio": "value"}),
        "kept importance\nof gate and up": kept.groupby(
            ["model", "methods", "block"], sort=False, as_index=False
        ).value.mean(),
    }
    height = ROW_HEIGHT * (len(by_method) + len(SPREADS)) + 0.4
    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    axes = figure.subplots(len(by_method) + len(SPREADS), len(measured), squeeze=False, sharex="col", sharey="row")
    for panels, (label, values) in zip(axes, by_method.items(), strict=False):
        _draw(
            panels, label, {name: (own, *_style(name)) for name, own in values.groupby("methods", sort=False)}, measured
        )
    for panel in axes[1]:
        panel.axhline(0, color=METHOD_STYLE["wanda"].color, linewidth=0.9, zorder=0)
        panel.set_yscale("symlog", linthresh=0.1)
    for panels, (measure, label) in zip(axes[len(by_method) :], SPREADS.items(), strict=True):
        lines = {n: (frame[frame.measure == prefix + measure], *style) for n, (prefix, *style) in SPREAD_STYLE.items()}
        _draw(panels, label, lines, measured)
    for panel, model in zip(axes[0], measured, strict=True):
        panel.set_title(textwrap.fill(literal(model), max(1, TITLE_WIDTH // len(measured))), fontsize=TITLE_SIZE)
    for panel in axes[-1]:
        panel.set_xlabel("block")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = {line.get_label(): line for panel in axes.flat for line in panel.lines if line.get_label()[0] != "_"}
    figure.align_ylabels(axes[:, 0])
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(panels: list[Axes], label: str, lines: dict[str, tuple[pd.DataFrame, str, str]], models: Measured) -> None:
    """One row of panels, a model each: values over the block, with the color and dashes of each line."""
    for panel, model in zip(panels, models, strict=True):
        for name, (values, color, dashes) in lines.items():
            own = values[values.model == model]
            panel.plot(own.block, own.value, dashes, color=color, linewidth=0.9, label=literal(name))
        panel.tick_params(labelsize=TICK_SIZE)
    found = pd.concat([values.value for values, *_ in lines.values()])
    if found.max() > LOG_ABOVE * found.min() > 0:
        panels[0].set_yscale("log")
    panels[0].set_ylabel(label, fontsize=TITLE_SIZE)


def _style(name: str) -> tuple[str, str]:
    """The colour of a method, and dashes; a variant of a known one keeps its colour."""
    base, _, variant = name.partition(" ")
    known = METHOD_STYLE.get(base)
    return known.color if known else OTHER_COLORS[0], "--" if variant else "-"


def _shown(means: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, and what names the rows as columns before them."""
    return means.map(lambda value: number(value, ".3f")).reset_index()
