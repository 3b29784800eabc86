"""The manifest of a sweep: what is written is read again, and nothing else is taken for one."""

from pathlib import Path

import pytest

from dass.errors import DassError
from dass.manifests import read_manifest, read_manifests, write_manifest
from report.reading import planned_runs, runs_of
from tests.report.records import losses, make_record, plan

RECORDS = [make_record("w", "wanda", losses(0.2)), make_record("d", "dass", losses(0.1))]


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = plan("table-small", RECORDS, d="out of memory")
    path = write_manifest(tmp_path, manifest)
    assert path == tmp_path / "manifests" / "table-small.json"
    assert read_manifest(path) == manifest and read_manifests(tmp_path) == [manifest]
    assert read_manifests(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"name": "x", "runs": [{}]}', '{"name": "x", "runs": [3]}', '"runs"']
)
def test_another_file_is_one_sentence_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DassError, match=r"x\.json is not a readable manifest"):
        read_manifest(tmp_path / "x.json")
    with pytest.raises(DassError, match=r"nowhere\.json"):
        read_manifest(tmp_path / "nowhere.json")


def test_a_renamed_manifest_is_refused(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, plan("table-small", RECORDS))
    path.rename(path.with_name("other.json"))
    with pytest.raises(DassError, match="give it back its name"):
        read_manifests(tmp_path)


def test_its_runs_are_those_with_a_record_and_the_missing_ones_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = plan("table-small", [*RECORDS, RECORDS[0]], d="out of memory")
    manifest.runs.append(type(manifest.runs[0])(None, {}, False, "the model is gated"))
    runs = planned_runs(manifest, runs_of([RECORDS[0], make_record("other", "dass", losses(0.3))]))
    assert [(run.id, run.record is None, run.why) for run in runs] == [("w", False, ""), ("d", True, "out of memory")]
    assert "the model is gated" in capsys.readouterr().err
