"""Rebuild tables, figures and pages from files alone: manifests, run records, published numbers.

python -m experiments.report experiment=table1_perplexity scale=small   one experiment, whose missing runs are named
python -m experiments.report experiment=all                             all of them at that scale
python -m experiments.report manifest=FILE                              a restricted or changed sweep
python -m experiments.report records=DIR output=DIR [reference=DIR]     whatever lies in a folder, and what it lacks
python -m experiments.report page=NAME.template.md                      a page whose numbers come from the records
python -m experiments.report site=FOLDER                                all whole sweeps as one page for a browser
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dass.errors import DassError
from dass.manifests import FOLDER, Manifest, read_manifest, read_manifests
from dass.records import read_records, write_atomically
from dass.tracking import log_report, track
from experiments import plain
from report.figures import write_figure
from report.grid import to_latex, to_markdown
from report.kinds import Material, find_kind
from report.page import page_path, render_page
from report.reading import planned_runs, runs_of
from report.rows import beyond_noise, comparison, read_published
from report.runs import Run
from report.site import write_site


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
    site: str | None = None  # a folder: the page of all whole sweeps is index.html in it
    log_to: str = "none"  # or wandb: log tables and figures into the experiment's group


PATHS = ("manifest", "records", "published", "output", "reference", "page", "site")


def settings_of(arguments: list[str]) -> ReportConfig:
    """The settings that `key=value` arguments give; DassError on a word without `=`, an unknown key or no path."""
    return plain.settings_of(ReportConfig, PATHS, arguments)


def report(config: ReportConfig) -> None:
    """Write the tables and figures that the settings ask for, and print the tables.

    Raises DassError where there is no record, no manifest or no such kind of report; nothing is then overwritten.
    """
    named = read_manifest(Path(config.manifest)) if config.manifest else None
    beside = Path(config.manifest).parent.parent if config.manifest else Path("results/runs")
    folder = Path(config.records) if config.records else beside
    runs = runs_of(read_records(folder))
    if not runs:
        raise DassError(f"No usable record in {folder}: run `python -m experiments.prune` first.")
    if config.page is not None:
        template = Path(config.page)
        write_atomically(page_path(template), render_page(template, runs, read_manifests(folder)))
    elif config.site is not None:
        whole = [one for one in read_manifests(folder) if one.name == f"{one.experiment}-{one.scale}"]
        print(write_site(Path(config.site), runs, whole, read_published(Path(config.published))))
    elif config.experiment is None and named is None:
        _report_folder(config, folder, runs)
    else:
        chosen = [named] if named else _manifests(config, folder)
        without = [one.name for one in chosen if not _report_sweep(config, one, runs)]
        if without:
            raise DassError(f"No run of {', '.join(without)} has a result in {folder}: launch the sweep first.")


def main(arguments: list[str]) -> None:
    """Report as the command line says; an error of the user is one sentence on stderr, and exit 1."""
    plain.run_plain(report, ReportConfig, PATHS, arguments)


def _manifests(config: ReportConfig, folder: Path) -> list[Manifest]:
    """Those of the experiment and the scale that the settings name."""
    whole = [m for m in read_manifests(folder) if m.name == f"{m.experiment}-{config.scale}"]
    chosen = [manifest for manifest in whole if config.experiment in ("all", manifest.experiment)]
    if not chosen:
        known = ", ".join(str(manifest.experiment) for manifest in whole) or "none"
        raise DassError(
            f"{folder} has no sweep of experiment={config.experiment} scale={config.scale} (it has {known}): "
            f"launch it with `python -m experiments.prune experiment={config.experiment} scale={config.scale}`."
        )
    return chosen


def _report_sweep(config: ReportConfig, manifest: Manifest, runs: list[Run]) -> bool:
    """Report a sweep, if any of its runs has a result; returns whether one has."""
    planned = planned_runs(manifest, runs)
    if all(run.why for run in planned):
        return False
    name = manifest.name.removesuffix("-small")
    print(f"{name}: {_counted(planned)}; {config.output}/tables/{name}.md")
    frame, figures = _write(config, manifest.report, planned, name)
    if config.log_to != "none":
        group = manifest.experiment or manifest.name
        with track(config.log_to, "dass", group, f"report-{name}", "outputs", {"scale": manifest.scale}) as mirror:
            log_report(mirror, name, frame, [path for path in figures if path.suffix == ".png"])
    return True


def _report_folder(config: ReportConfig, folder: Path, runs: list[Run]) -> None:
    """Report all perplexities of a folder, and list the sweeps whose manifests lie in it."""
    scored = [run for run in runs if run.perplexity is not None]
    if scored:
        _write(config, "perplexity", scored, "perplexity")
    for manifest in read_manifests(folder):
        command = f"python -m experiments.report manifest={folder / FOLDER / manifest.name}.json output={config.output}"
        print(f"{manifest.name}: {_counted(planned_runs(manifest, runs))}; {command}")
    if not scored:
        raise DassError(f"No perplexity in the records of {folder}: report its sweeps by their manifests.")


def _counted(runs: list[Run]) -> str:
    missing = sum(bool(run.why) for run in runs)
    return f"{len(runs) - missing} runs, {missing} missing"


def _write(config: ReportConfig, kind: str, runs: list[Run], name: str) -> tuple[pd.DataFrame, list[Path]]:
    """Write the tables as Markdown, LaTeX and CSV, and the figure as PDF and PNG; returns the numbers and the figure.

    Prints the tables of a single report, and the comparison of its runs with the reference.
    """
    made = find_kind(kind)(Material(runs, read_published(Path(config.published))))
    output, markdown = Path(config.output), to_markdown(made.grids)
    write_atomically(output / "tables" / f"{name}.md", markdown)
    write_atomically(output / "tables" / f"{name}.tex", to_latex(made.grids))
    write_atomically(output / "tables" / f"{name}.csv", made.frame.to_csv(index=False, lineterminator="\n"))
    if config.experiment != "all":
        print(f"\n{markdown}")
    figure = write_figure(made.draw, output / "figures", name) if made.draw is not None else []
    if config.reference is not None:
        committed = runs_of(read_records(Path(config.reference)))
        print(to_markdown([comparison(runs, committed)]))
        if not {run.id for run in runs} & {run.id for run in committed}:
            raise DassError(f"reference={config.reference} has no run of the same identity: nothing was compared.")
        if others := beyond_noise(runs, committed):
            raise DassError(
                f"{', '.join(others)}: another perplexity than the committed one, by more than the noise above; look "
                f"for what differs."
            )
    return made.frame, figure


if __name__ == "__main__":
    main(sys.argv[1:])
