"""Rebuild the tables and figures from the run records alone: python -m experiments.report."""

from pathlib import Path

from omegaconf import DictConfig

from dass.errors import DassError
from dass.records import read_records, write_atomically
from dass.report.cells import build_tables, runs_of
from dass.report.figures import write_perplexity_figure
from dass.report.tables import comparison, to_csv, to_latex, to_markdown
from experiments.app import run_app


def report(config: DictConfig) -> None:
    """Write tables and figures of `config.records` under `config.output`; compare with `config.reference` if given.

    Raises DassError where a folder holds no record, or none with a perplexity.
    """
    runs = runs_of(read_records(Path(config.records)))
    if not runs:
        raise DassError(f"No perplexity in the records of {config.records}: run `python -m experiments.prune` first.")
    tables, output = build_tables(runs), Path(config.output)
    markdown = to_markdown(tables)
    write_atomically(output / "tables" / "perplexity.md", markdown)
    write_atomically(output / "tables" / "perplexity.tex", to_latex(tables))
    write_atomically(output / "tables" / "perplexity.csv", to_csv(runs))
    write_perplexity_figure(tables, output / "figures")
    print(markdown)
    if config.reference is not None:
        print(f"Compared with the records of {config.reference}:\n")
        print(comparison(runs, runs_of(read_records(Path(config.reference)))))


if __name__ == "__main__":
    run_app(report, "report")
