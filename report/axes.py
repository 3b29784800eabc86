"""The picture of docs/hardware.md: one matrix pruned 2:4 along each axis. python -m report.axes writes it."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dass.pruning.masks import NM, Axis, select_mask
from report.figures import write_figure

SIDE = 8  # of the matrix; two groups of 4 along each axis
PANELS: dict[Axis, tuple[str, str]] = {
    "in": ("along the inputs\n(axis in)", "Y = X Wᵀ"),
    "out": ("along the outputs\n(axis out: DaSS's gate and up)", "dX = dY W alone"),
    "both": ("along both\n(axis both: transposable)", "Y = X Wᵀ and dX = dY W"),
}
KEPT, PRUNED, GROUP = "#0072B2", "#E8E8E8", "#D55E00"


def axes_figure() -> Figure:
    """Which weights 2:4 keeps along each axis of the same matrix, with one group of 4 (or tile of 4 x 4) framed."""
    scores = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(6.6, 2.9), layout="constrained")
    for panel, (axis, (title, helps)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        keep = select_mask(scores, NM(2, 4), axis).keep
        for i in range(SIDE):
            for j in range(SIDE):
                panel.add_patch(Rectangle((j, i), 0.9, 0.9, color=KEPT if keep[i, j] else PRUNED))
        width, height = {"in": (4, 1), "out": (1, 4), "both": (4, 4)}[axis]
        panel.add_patch(Rectangle((-0.05, -0.05), width, height, fill=False, edgecolor=GROUP, linewidth=1.8))
        panel.set(xlim=(-0.3, SIDE + 0.2), ylim=(SIDE + 0.2, -0.3), aspect="equal", xticks=[], yticks=[], title=title)
        panel.set_xlabel(f"inputs j →\nspeeds up {helps}")
        panel.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("← outputs i")
    return figure


if __name__ == "__main__":
    write_figure(axes_figure, Path("results/figures"), "hardware_axes")
