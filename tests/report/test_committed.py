"""The committed tables and the page are those that the committed records give; figures are drawn in other tests."""

from pathlib import Path

import pytest

from dass.manifests import read_manifests
from dass.records import read_records
from experiments import report as app
from experiments.report import ReportConfig, report
from report.page import page_path, render_page
from report.reading import runs_of

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "runs"


def test_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and nothing else is there."""
    monkeypatch.setattr(app, "write_figure", lambda draw, folder, name: [])
    report(ReportConfig("all", records=str(RECORDS), published=f"{ROOT}/results/published", output=str(tmp_path)))
    committed = {path.name: path.read_text() for path in (ROOT / "results" / "tables").iterdir()}
    assert {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()} == committed


def test_the_page() -> None:
    template = ROOT / "docs" / "reproduction.template.md"
    built = render_page(template, runs_of(read_records(RECORDS)), read_manifests(RECORDS))
    assert page_path(template).read_text() == built
