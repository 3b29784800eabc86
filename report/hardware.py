"""What it costs to comply with sparse tensor cores: the status of a method's masks and what they can gain at most."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from report.figures import draw
from report.grid import MISSING, Grid, grid_of, number
from report.rows import to_reference
from report.runs import RELEASED, Run, frame_of

HARDWARE_LEGEND = (
    "± one standard error over windows. Bold: the lowest perplexity of a pattern and every other that cannot be told "
    "apart from it; Δ loss: nats per token, ≈: cannot be told apart. Status, of the roles that are pruned, and bounds: "
    "stored in bf16 where the run has fp32, whose kernel takes 1:2 alone. "
    "accelerated: 2:4 along the inputs, and a kernel of torch takes shape and dtype; K-aligned but no kernel: N:M on "
    "the inputs, but another pattern or shape; not K-aligned: no sparse tensor core executes it forward. Helps: the "
    "passes that it does speed up. At most: prefill: Amdahl over the operations of the linear layers; decode: over the "
    "bytes that a token reads, packed as the 2:4 kernels have it or, where there is no kernel, with a bitmask for any "
    f"zeros. {MISSING}: not run, or by a record that is older than the audit."
)
AUDITED = ("status", "helps", "prefill", "packed", "bitmask")


def hardware_grid(table: pd.DataFrame) -> Grid:
    """One model: a row for each method, order and update."""

    def row(cell: Any) -> dict[str, str]:
        audit = audit_of(cell.runs)
        return {
            "Perplexity": number(cell.perplexity, ".2f", cell.stderr),
            "Δ loss to Wanda": to_reference(cell, "+.4f"),
            "Prefill, at most": number(audit.get("prefill"), ".2f"),
            "Decode, at most": number(audit.get("packed"), ".2f"),
            "Decode, bitmask": number(audit.get("bitmask"), ".2f"),
            "Status": audit.get("status", MISSING),
            "Helps": audit.get("helps", MISSING),
        }

    facts = table.facts.iloc[0]
    return grid_of(f"Price of compliance, {facts['model']}", table, row, facts, HARDWARE_LEGEND, "Perplexity")


def hardware_frame(runs: list[Run]) -> pd.DataFrame:
    """The rows of `frame_of` with what the audit says."""
    return frame_of(runs).join(pd.DataFrame([audit_of([run]) for run in runs], columns=AUDITED))


def hardware_figure(cells: pd.DataFrame) -> Figure:
    """Perplexity by what prefill can gain at most; in the released order, each method with the update of its own."""
    chosen = [
        cell._asdict() | {"x": f"{audit['prefill']:.2f}x" if cell.method != "dense" else None}
        for cell in cells.itertuples()
        if (audit := audit_of(cell.runs)) and cell.runs[0].order == RELEASED
        if cell.method == "dense" or cell.runs[0].update == ("obs" if cell.method == "sparsegpt" else "none")
    ]
    points = pd.DataFrame(chosen, columns=[*cells.columns, "x"])
    panel = points.title + " " + points.pattern.map(str)
    points = points.assign(y=points.perplexity, error=points.stderr, ylabel="perplexity", panel=panel, is_open=False)
    points = points[points.method != "dense"].assign(label=points.method, rank=0)
    return draw(points, "speed-up of prefill, at most", "released order", joined=False, explodes=True)


def audit_of(runs: list[Run]) -> dict[str, Any]:
    """What the record of the first run says, of fp32 as if in bf16, flat; empty where there is none, or no audit."""
    audit = next((run.record["audit"] for run in runs if run.record and run.record.get("audit")), None)
    audit = audit and audit.get("bfloat16", audit)
    return {} if audit is None else {key: audit[key] for key in ("status", "helps", "prefill")} | audit["decode"]
