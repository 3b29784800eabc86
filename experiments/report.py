"""Rebuild tables, figures and pages from files alone: manifests, run records, published numbers.

python -m experiments.report experiment=table1_perplexity scale=small   one experiment, whose missing runs are named
python -m experiments.report experiment=all                             all of them at that scale, and the pages
python -m experiments.report manifest=FILE                              a restricted or changed sweep
python -m experiments.report records=DIR output=DIR [reference=DIR]     whatever lies in a folder, and what it lacks
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dass.errors import DassError
from dass.manifests import FOLDER, Manifest, read_manifest, read_manifests
from dass.records import read_records, write_atomically
from dass.tracking import log_report, track
from experiments.cli import run_cli
from report.figures import write_figure
from report.grid import to_latex, to_markdown
from report.kinds import Material, Report, find_kind
from report.page import page_path, render_page
from report.perplexity import comparison
from report.published import read_published
from report.runs import Run, planned_runs, runs_of


@dataclass
class ReportConfig:
    """The settings of a report."""

    experiment: str | None = None  # a file of conf/experiment, or all
    scale: str = "small"  # or paper
    manifest: str | None = None  # of a sweep, a JSON file
    records: str | None = None  # folder of run records and manifests; null: that of the manifest, or results/runs
    published: str = "results/published"  # folder of published numbers, CSV
    output: str = "results"  # the tables go to <output>/tables, the figures to <output>/figures
    reference: str | None = None  # folder of records to compare each run with, by identity
    page: str | None = None  # a template, NAME.template.md: the page NAME.md is built beside it
    log_to: str = "none"  # or wandb: log tables and figures into the experiment's group


def report(config: ReportConfig) -> None:
    """Write the tables and figures that the settings ask for, and print the tables.

    Raises DassError where there is no record, no manifest or no such kind of report; nothing is then overwritten.
    """
    beside = Path(config.manifest).parent.parent if config.manifest else Path("results/runs")
    folder = Path(config.records) if config.records else beside
    runs = runs_of(read_records(folder))
    if not runs:
        raise DassError(f"No usable record in {folder}: run `python -m experiments.prune` first.")
    published = read_published(Path(config.published))
    if config.page is not None:
        template = Path(config.page)
        write_atomically(page_path(template), render_page(template, runs, read_manifests(folder)))
        return
    if config.experiment is None and config.manifest is None:
        _report_folder(config, folder, runs, published)
        return
    without = []
    for manifest in _manifests(config, folder):
        planned = planned_runs(manifest, runs)
        if all(run.why for run in planned):
            without.append(manifest.name)
            continue
        made = find_kind(manifest.report)(Material(planned, published))
        name = manifest.name.removesuffix("-small")
        figures = _write(made, Path(config.output), name)
        print(f"{name}: {_counted(planned)}; {config.output}/tables/{name}.md")
        if config.experiment != "all":
            print("\n" + to_markdown(made.grids))
        if config.log_to != "none":
            group = manifest.experiment or manifest.name
            with track(config.log_to, "dass", group, f"report-{name}", "outputs", {"scale": manifest.scale}) as mirror:
                log_report(mirror, name, made.frame, [path for path in figures if path.suffix == ".png"])
        _compare(config, planned)
    if without:
        raise DassError(f"No run of {', '.join(without)} has a result in {folder}: launch the sweep first.")


def _manifests(config: ReportConfig, folder: Path) -> list[Manifest]:
    """Those that the settings name."""
    if config.manifest is not None:
        return [read_manifest(Path(config.manifest))]
    whole = [m for m in read_manifests(folder) if m.name == f"{m.experiment}-{config.scale}"]
    chosen = [manifest for manifest in whole if config.experiment in ("all", manifest.experiment)]
    if not chosen:
        known = ", ".join(str(manifest.experiment) for manifest in whole) or "none"
        raise DassError(
            f"{folder} has no sweep of experiment={config.experiment} scale={config.scale} (it has {known}): "
            f"launch it with `python -m experiments.prune experiment={config.experiment} scale={config.scale}`."
        )
    return chosen


def _report_folder(config: ReportConfig, folder: Path, runs: list[Run], published: pd.DataFrame) -> None:
    """Report all perplexities of a folder, and list the sweeps whose manifests lie in it."""
    scored = [run for run in runs if run.perplexity is not None]
    if scored:
        made = find_kind("perplexity")(Material(scored, published))
        _write(made, Path(config.output), "perplexity")
        print(to_markdown(made.grids))
    _compare(config, scored)
    for manifest in read_manifests(folder):
        command = f"python -m experiments.report manifest={folder / FOLDER / manifest.name}.json output={config.output}"
        print(f"{manifest.name}: {_counted(planned_runs(manifest, runs))}; {command}")
    if not scored:
        raise DassError(f"No perplexity in the records of {folder}: report its sweeps by their manifests.")


def _counted(runs: list[Run]) -> str:
    missing = sum(bool(run.why) for run in runs)
    return f"{len(runs) - missing} runs, {missing} missing"


def _compare(config: ReportConfig, runs: list[Run]) -> None:
    if config.reference is not None:
        print(f"Compared with the records of {config.reference}:\n")
        print(comparison(runs, runs_of(read_records(Path(config.reference)))))


def _write(made: Report, output: Path, name: str) -> list[Path]:
    """Write the tables as Markdown, LaTeX and CSV, and the figure as PDF and PNG; returns the figure's files."""
    write_atomically(output / "tables" / f"{name}.md", to_markdown(made.grids))
    write_atomically(output / "tables" / f"{name}.tex", to_latex(made.grids))
    write_atomically(output / "tables" / f"{name}.csv", made.frame.to_csv(index=False, lineterminator="\n"))
    return write_figure(made.draw, output / "figures", name) if made.draw is not None else []


if __name__ == "__main__":
    run_cli(report, ReportConfig)
