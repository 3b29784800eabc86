"""Models that differ in one thing each: how their trainings went, and what goes with DaSS's lead on Wanda."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from report.figures import COLUMN_WIDTH, METHOD_STYLE, OTHER_COLORS, PANEL_HEIGHT, POINT, VARIANT_MARKERS, Style
from report.grid import MISSING, Grid, number
from report.runs import DENSE, Run, Setting
from report.tables import NAMED, facts_apart, paired_difference, settings_of

COLORS = [*(style.color for name, style in METHOD_STYLE.items() if name != "dense"), *OTHER_COLORS]
TELLS = {"cv": "n: std / mean", "zeros": "share of zero activations"}
LEAD_LEGEND = (
    "n: norms of the intermediate neurons; their spread and the share of exact zeros among the intermediate "
    "activations are means over blocks and trainings, of the dense model. Wanda's cost: its perplexity over the dense "
    "model's. DaSS − Wanda: mean over the trainings, ± standard error over them (over windows where there is one), "
    f"nats per token; negative: DaSS is better. {MISSING}: not run."
)
EXPERT_LEGEND = (
    "Error: of what an expert writes for its tokens, squared and relative, all its projections pruned; below 1, DaSS "
    "does better than Wanda. In brackets the lowest and the highest of the block. Rank correlation (Spearman) of the "
    "error over Wanda's with the tokens that the expert saw; of eight experts chance alone gives more than 0.7 in one "
    f"of twenty cases. {MISSING}: not known."
)


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


def split(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that were evaluated, and those in which methods were compared block by block."""
    compared = [run for run in runs if run.method == "compare"]
    return [run for run in runs if run.method != "compare"], compared


def differing(keys: list[Any], facts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each group of runs the facts in which those of its key differ."""
    alike = {key: [one for theirs, one in zip(keys, facts, strict=True) if theirs == key] for key in keys}
    return [
        {name: words for name, words in one.items() if len({other[name] for other in alike[key]}) > 1}
        for key, one in zip(keys, facts, strict=True)
    ]


def lead_settings(runs: list[Run]) -> list[tuple[Setting, list[Run], dict[str, str]]]:
    """Each setting of the runs with a result, with these and with what tells it from others of its model, in words."""
    tables = settings_of([run for run in split(runs)[0] if run.losses])
    facts = [{name: one[name] for name in NAMED} for one in facts_apart(tables)]
    told = differing([own[0].model for _, own in tables], facts)
    return [(*table, words) for table, words in zip(tables, told, strict=True)]


def lead_frame(runs: list[Run]) -> pd.DataFrame:
    """DaSS against Wanda, a row for each trained model, setting and pattern that both were run on.

    Returns:
        The columns model (with what tells its settings apart, where it has several), seed (of the training; None of
        other models), pattern, lead (loss of DaSS minus that of Wanda, nats), stderr, cost (of Wanda: its loss minus
        the dense model's), and, where methods were compared on that model and calibration, cv (standard deviation over
        mean of the neurons' norms n) and zeros (share of zero activations), each the mean over its blocks. A missing
        number is NaN.
    """
    scored, compared = split(runs)
    settings, rows = lead_settings(runs), []
    for key in dict.fromkeys((run.model, run.training_seed) for run in scored):
        for setting, members, words in settings:
            own = [run for run in members if (run.model, run.training_seed) == key]
            dense = [run for run in own if run.method == "dense"]
            found = _diagnostics([run for run in compared if (run.model, run.training_seed) == key], setting)
            cv, zeros = found.get("norms", {}).get("cv", []), found.get("zeros") or []
            for pattern in sorted({run.pattern for run in own} - {DENSE}):
                wanda, dass = (
                    [run for run in own if run.pattern == pattern and run.method == name and run.as_published]
                    for name in ("wanda", "dass")
                )
                lead, cost = paired_difference(dass, wanda), paired_difference(wanda, dense)
                if lead is None:
                    continue
                model = ", ".join([key[0], *words.values()])
                row = (model, key[1], str(pattern), lead.mean, lead.stderr, cost.mean if cost else math.nan)
                rows.append((*row, mean_of(cv), mean_of(zeros)))
    columns = ["model", "seed", "pattern", "lead", "stderr", "cost", *TELLS]
    return pd.DataFrame(rows, columns=columns)


def _diagnostics(compared: list[Run], setting: Setting) -> dict[str, Any]:
    """What a comparison found with the calibration of a setting; the last, where there are several."""
    fitting = [run for run in compared if run.setting._replace(evaluation=setting.evaluation).agrees(setting)]
    found: list[dict[str, Any]] = [run.record["diagnostics"] for run in fitting if run.record]
    return found[-1] if found else {}


def mean_of(values: list[float | None]) -> float:
    """Over the blocks that have a number; NaN where none has."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else math.nan


def lead_grid(leads: pd.DataFrame, facts: dict[str, str]) -> Grid:
    """A row for each kind of model: its neurons, what 2:4 and 50 % cost it, and DaSS's lead in each training."""
    rows = []
    for model, own in leads.groupby("model", sort=False):
        row = {"Model": str(model), "Trainings": str(own.seed.nunique() or 1)}
        row |= {words: number(own[name].mean(), ".2f") for name, words in TELLS.items()}
        for pattern, part in own.groupby("pattern", sort=False):
            error = part["lead"].std(ddof=1) / len(part) ** 0.5 if len(part) > 1 else part.stderr.iloc[0]
            row[f"Wanda's cost, {pattern}"] = number(math.exp(part.cost.mean()), ".2f")
            row[f"DaSS − Wanda, {pattern}"] = number(part["lead"].mean(), "+.4f", error)
        rows.append(row)
    said = {}
    for pattern, part in leads.groupby("pattern", sort=False):
        known = ", ".join(
            f"{words}: {number(spearmanr(pairs[name], pairs['lead']).statistic, '+.2f')} ({len(pairs)} models)"
            for name, words in TELLS.items()
            if len(pairs := part.dropna(subset=[name])) > 2 and pairs[name].nunique() > 1
        )
        if known:
            said[f"rank correlation with DaSS − Wanda, {pattern}"] = known
    return Grid("DaSS against Wanda, by kind of MLP", pd.DataFrame(rows).fillna(MISSING), facts | said, LEAD_LEGEND)


def lead_figure(leads: pd.DataFrame) -> Figure:
    """DaSS minus Wanda over what the neurons are like, one point for each training; a row of panels for a pattern."""
    styles, patterns = styles_of(leads.model), list(leads.pattern.unique())
    size = (2 * COLUMN_WIDTH, PANEL_HEIGHT * len(patterns) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    for row, pattern in zip(figure.subplots(len(patterns), len(TELLS), squeeze=False), patterns, strict=True):
        for axes, (name, words) in zip(row, TELLS.items(), strict=True):
            for model, own in leads[leads.pattern == pattern].groupby("model", sort=False):
                style = styles[model]
                axes.errorbar(
                    own[name], own["lead"], own.stderr, color=style.color, marker=style.marker, linestyle="", **POINT
                )
            axes.axhline(0, color=METHOD_STYLE["wanda"].color, linestyle="--", linewidth=0.8, zorder=0)
            axes.set_xlabel(words)
            axes.set_ylabel(f"DaSS − Wanda, {pattern} [nats]")
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, markersize=3.5, linestyle="")
        for style in styles.values()
    ]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=4, frameon=False)
    return figure


def expert_runs(runs: list[Run]) -> list[tuple[Run, dict[str, str]]]:
    """Those in which experts were compared, each with what tells it from others of its model, in words."""
    found = [run for run in runs if run.record and run.record.get("diagnostics", {}).get("experts")]
    facts = [
        {name: one[name] for name in NAMED}
        | {"pattern": str(run.pattern), "seeds": f"seed {run.seed}", "identity": f"identity {run.model_identity}"}
        for run, one in zip(found, facts_apart([(run.setting, [run]) for run in found]), strict=True)
    ]
    told = differing([(run.model, run.training_seed) for run in found], facts)
    return list(zip(found, told, strict=True))


def expert_frame(runs: list[Run]) -> pd.DataFrame:
    """A row for each expert of each model in which methods were compared, in each setting.

    Returns:
        The columns model (with what tells its runs apart, where it has several), seed (of the training), block, expert,
        share (of the block's routed tokens, over an even share), and for each method the error of what the expert
        writes; `log_ratio` of DaSS's over Wanda's.
    """
    rows = []
    for run, words in expert_runs(runs):
        found = run.record["diagnostics"]["experts"] if run.record else []
        model = ", ".join([run.model, *words.values()])
        for block in dict.fromkeys(one["block"] for one in found):
            own = [one for one in found if one["block"] == block]
            even = sum(one["tokens"] for one in own) / len(own)
            for one in own:
                known = {"model": model, "seed": run.training_seed, "block": block, "expert": one["index"]}
                rows.append(known | {"tokens": one["tokens"], "share": one["tokens"] / even} | one["errors"])
    frame = pd.DataFrame(rows, columns=None if rows else ["model", "seed", "block", "expert", "share"])
    if {"wanda", "dass"} <= set(frame):
        frame["log_ratio"] = np.log(frame.dass.astype(float) / frame.wanda.astype(float))
    return frame


def expert_grid(experts: pd.DataFrame, facts: dict[str, str]) -> Grid:
    """A row for each block: in how many experts DaSS does better than Wanda, and what the number of tokens tells."""
    rows = []
    for (model, seed, block), own in experts.groupby(["model", "seed", "block"], sort=False, dropna=False):
        ratios = np.exp(own.log_ratio)
        told = spearmanr(own.share, own.log_ratio).statistic if own.share.nunique() > 1 else math.nan
        rows.append(
            {
                "Model": str(model),
                "Training": MISSING if seed is None or pd.isna(seed) else str(seed),
                "Block": str(block).rpartition(".")[2],
                "Tokens of an expert": f"{own.tokens.min()} to {own.tokens.max()}",
                "DaSS better in": f"{(ratios < 1).sum()} of {len(own)}",
                "Error over Wanda's": f"{number(ratios.median(), '.3f')} ({ratios.min():.3f} to {ratios.max():.3f})",
                "Rank correlation": number(told, "+.2f"),
            }
        )
    return Grid("DaSS against Wanda, expert by expert", pd.DataFrame(rows), facts, EXPERT_LEGEND, words=3)


def expert_figure(experts: pd.DataFrame) -> Figure:
    """The error of each expert under DaSS over that under Wanda, over the tokens that it saw; a colour for a block."""
    figure = Figure(figsize=(COLUMN_WIDTH, PANEL_HEIGHT + 0.4), layout="constrained")
    axes = figure.subplots()
    for (block, style), own in zip(
        styles_of(experts.block).items(), (own for _, own in experts.groupby("block", sort=False)), strict=True
    ):
        label = f"block {str(block).rpartition('.')[2]}"
        axes.plot(own.share, np.exp(own.log_ratio), style.marker, color=style.color, markersize=3.5, label=label)
    axes.axhline(1, color=METHOD_STYLE["wanda"].color, linestyle="--", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("tokens of the expert, over an even share")
    axes.set_ylabel("error, DaSS / Wanda")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
