"""Rebuild tables and figures from the run records alone.

python -m experiments.report                             all perplexities of a folder of records, as one report
python -m experiments.report tables=table1_perplexity    one experiment, whose missing runs are named
python -m experiments.report tables=all                  all of them
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dass.errors import DassError
from dass.records import read_failures, read_records, write_atomically
from dass.tracking import track
from experiments.app import run_app
from experiments.experiment import experiment_names, load_experiment
from experiments.identity import design_of_record
from report.figures import write_figure
from report.grid import to_csv, to_latex, to_markdown
from report.kinds import KINDS, Material, Report
from report.published import read_published
from report.runs import missing_run, runs_of
from report.tables import comparison


def report(config: DictConfig) -> None:
    """Write the tables and figures that `conf/report.yaml` describes, and print the tables.

    Raises DassError where a folder holds no record, or there is no such experiment.
    """
    if config.tables is None:
        _report_folder(config)
        return
    folder = Path(config.records)
    records = read_records(folder) if any(folder.glob("*.json")) else []
    by_design = _by_design(records)
    failures, published = read_failures(folder), read_published(Path(config.published))
    names = experiment_names() if config.tables == "all" else [config.tables]
    for name in names:
        experiment = load_experiment(name, config.at_scale, list(config.overrides))
        own = [record for run in experiment.runs for record in by_design.get(run.design, [])]
        found = runs_of(own)
        malformed = {record["id"] for record in own} - {run.id for run in found}
        missing = [
            missing_run(run.design, run.config, run.calibrates, failures.get(run.design, "not run yet"), found)
            for run in experiment.runs
            if all(record["id"] in malformed for record in by_design.get(run.design, []))
        ]
        usable = {record["id"]: record for record in own if record["id"] not in malformed}
        made = KINDS[experiment.kind](Material(found + missing, usable, published))
        stem = name if config.at_scale == "small" else f"{name}_{config.at_scale}"
        figures = _write(made, Path(config.output), stem)
        print(f"{name}: {len(found)} runs, {len(missing)} missing; {config.output}/tables/{stem}.md")
        if config.tables != "all":
            print("\n" + to_markdown(made.grids))
        with track(config.log_to, "dass", name, f"report-{name}", "outputs", {"scale": config.at_scale}) as tracker:
            tracker.log_report(stem, made.frame, [path for path in figures if path.suffix == ".png"])


def _report_folder(config: DictConfig) -> None:
    """Report all perplexities of a folder; compare with `config.reference` if given."""
    runs = [run for run in runs_of(read_records(Path(config.records))) if run.perplexity is not None]
    if not runs:
        raise DassError(f"No perplexity in the records of {config.records}: run `python -m experiments.prune` first.")
    made = KINDS["perplexity"](Material(runs, {}, read_published(Path(config.published))))
    _write(made, Path(config.output), "perplexity")
    print(to_markdown(made.grids))
    if config.reference is not None:
        print(f"Compared with the records of {config.reference}:\n")
        print(comparison(runs, runs_of(read_records(Path(config.reference)))))


def _by_design(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by what their runs were to do; one with a config that does not fit is named on stderr and left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        try:
            found.setdefault(design_of_record(record), []).append(record)
        except DassError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def _write(made: Report, output: Path, name: str) -> list[Path]:
    """Write the tables as Markdown, LaTeX and CSV, and the figure as PDF and PNG; returns the figure's files."""
    write_atomically(output / "tables" / f"{name}.md", to_markdown(made.grids))
    write_atomically(output / "tables" / f"{name}.tex", to_latex(made.grids))
    write_atomically(output / "tables" / f"{name}.csv", to_csv(made.frame))
    return write_figure(made.draw, output / "figures", name) if made.draw is not None else []


if __name__ == "__main__":
    run_app(report, "report")
