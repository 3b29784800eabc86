"""Models that differ in one thing each: how their trainings went, and what goes with DaSS's lead on Wanda."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.figures import COLUMN_WIDTH, METHOD_STYLE, OTHER_COLORS, PANEL_HEIGHT, VARIANT_MARKERS, Style

COLORS = [*(style.color for name, style in METHOD_STYLE.items() if name != "dense"), *OTHER_COLORS]


def training_figure(curves: pd.DataFrame) -> Figure:
    """Held-out loss over the epochs, a line for each seed; a panel each for a gate, none, and experts.

    Args:
        curves: the points of all trainings, with the fields of their recipes.
    """
    kinds = curves.gate.map({True: "gate", False: "no gate"}).where(curves.experts == 0, "experts")
    styles = styles_of(curves.activation)
    panels = list(curves.groupby(kinds, sort=False))
    figure = Figure(figsize=(COLUMN_WIDTH, 0.8 * PANEL_HEIGHT * len(panels) + 0.6), layout="constrained")
    for axes, (kind, own) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for (activation, _), line in own.groupby(["activation", "seed"]):
            axes.plot(line.epoch, line.held_out_loss, color=styles[activation].color, linewidth=0.8)
        axes.set_title(kind)
        axes.set_ylabel("held-out loss [nats]")
    figure.axes[-1].set_xlabel("epochs")
    handles = [Line2D([], [], color=style.color) for style in styles.values()]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=3, frameon=False)
    return figure


def styles_of(names: pd.Series) -> dict[str, Style]:
    """A colour and a marker for each name, in order of appearance."""
    markers = "os^D" + "".join(VARIANT_MARKERS)
    return {
        name: Style(COLORS[i % len(COLORS)], markers[i % len(markers)]) for i, name in enumerate(dict.fromkeys(names))
    }
