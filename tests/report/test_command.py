"""`python -m experiments.report`: what it writes, what it refuses, and that a stranger can add a kind of report."""

from pathlib import Path

import pandas as pd
import pytest

from dass.errors import DassError
from dass.manifests import write_manifest
from dass.records import write_record
from experiments.report import ReportConfig, main, report, settings_of
from report.grid import Grid
from report.kinds import KINDS, Material, Report, kind
from tests.report.records import losses, make_record, plan, write_example


@pytest.fixture
def example(tmp_path: Path) -> ReportConfig:
    write_example(tmp_path / "runs")
    return ReportConfig(records=f"{tmp_path}/runs", published=f"{tmp_path}/published", output=f"{tmp_path}/out")


def written(config: ReportConfig) -> dict[str, bytes]:
    root = Path(config.output)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_folder_gives_the_same_bytes_twice_and_lists_its_sweeps(
    example: ReportConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    example.reference = example.records
    report(example)
    once = written(example)
    report(example)
    assert written(example) == once
    names = [f"figures/perplexity.{suffix}" for suffix in ("pdf", "png")]
    assert sorted(once) == names + [f"tables/perplexity.{suffix}" for suffix in ("csv", "md", "tex")]
    printed = capsys.readouterr().out
    assert once["tables/perplexity.md"].decode() in printed and printed.count("+0.000 %") == 16
    command = f"manifest={example.records}/manifests/example-small.json output={example.output}"
    assert f"example-small: 8 runs, 0 missing; python -m experiments.report {command}" in printed


def test_an_experiment_and_its_manifest_give_the_same_tables(example: ReportConfig) -> None:
    example.experiment = "example"
    report(example)
    once = written(example)
    assert "tables/example.md" in once
    example.experiment, example.manifest = None, f"{example.records}/manifests/example-small.json"
    example.records = None  # that of the manifest
    report(example)
    assert written(example) == once


@pytest.mark.parametrize(
    ("shift", "says"), [(0.0, None), (0.004, None), (0.02, "by more than the noise"), (None, "nothing")]
)
def test_a_reference_is_met_within_the_noise_or_the_command_fails(
    example: ReportConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: float | None, says: str | None
) -> None:
    for folder, run_id, by in (
        (example.records, "w", shift or 0.0),
        (tmp_path / "reference", "w" if shift is not None else "x", 0.0),
    ):
        write_record(Path(str(folder)), make_record(run_id, "wanda", losses(0.3 + by)))
    arguments = [f"{key}={value}" for key, value in vars(example).items() if value is not None]
    if says is None:
        main([*arguments, f"reference={tmp_path}/reference"])
    else:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, f"reference={tmp_path}/reference"])
        assert ended.value.code == 1 and says in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["output=~nobody_at_all/x", "records=" + "a" * 300, "page=a\nb", "manifest="])
def test_paths_that_cannot_be_are_one_sentence(argument: str) -> None:
    with pytest.raises(DassError) as found:
        settings_of([argument])
    assert argument.partition("=")[0] in str(found.value) and "\n" not in str(found.value)


def test_a_path_is_what_was_typed() -> None:
    assert settings_of(["output=~/a: [b], {c}=#1"]).output == str(Path.home() / "a: [b], {c}=#1")


def test_a_restricted_sweep_is_reported_by_its_own_manifest(
    example: ReportConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [make_record(name, name, losses(0.2)) for name in ("wanda", "dass", "magnitude")]
    for record in records[:2]:
        write_record(Path(str(example.records)), record)
    path = write_manifest(Path(str(example.records)), plan("example-small-1a2b", records, magnitude="out of memory"))
    example.manifest = str(path)
    report(example)
    assert "example-small-1a2b: 2 runs, 1 missing" in capsys.readouterr().out
    assert "- missing: 1 runs: out of memory" in written(example)["tables/example-small-1a2b.md"].decode()
    example.manifest, example.experiment = None, "all"
    report(example)
    assert "tables/example.md" in written(example)


@pytest.mark.parametrize("emptied", ["folder", "records", "results"])
def test_nothing_is_overwritten_where_there_is_no_result(example: ReportConfig, emptied: str) -> None:
    example.experiment = "all"
    report(example)
    before = written(example)
    for path in Path(str(example.records)).glob("*.json"):
        path.unlink()
    if emptied == "records":  # some other run is there, but none of the manifest's
        write_record(Path(str(example.records)), make_record("other", "dass", losses(0)))
    if emptied == "results":
        failed = {"metrics": [], "windows": [], "failed": {"evaluation": "the text is gone"}}
        write_record(Path(str(example.records)), make_record("0d", "dense", losses(0)) | failed)
    with pytest.raises(DassError, match=r"No run of example-small has a result|No records in .*experiments\.prune"):
        report(example)
    assert written(example) == before


def test_an_experiment_without_a_manifest_is_one_sentence_that_says_what_there_is(example: ReportConfig) -> None:
    example.experiment, example.scale = "exampel", "small"
    with pytest.raises(DassError, match=r"no sweep of experiment=exampel scale=small \(it has example\): launch it"):
        report(example)


def test_a_manifest_that_is_not_there_is_what_the_sentence_says(tmp_path: Path) -> None:
    with pytest.raises(DassError, match=r"absent\.json is not a readable manifest"):
        report(ReportConfig(manifest=str(tmp_path / "runs" / "manifests" / "absent.json")))


def test_a_stranger_adds_a_kind_of_report(example: ReportConfig) -> None:
    @kind
    def counted(material: Material) -> Report:
        frame = pd.DataFrame({"Runs": [str(len(material.runs))]})
        return Report([Grid("How many", frame, words=0)], None, frame)

    try:
        write_manifest(
            Path(str(example.records)), plan("new-small", [make_record("0d", "dense", losses(0))], "counted")
        )
        example.experiment = "new"
        report(example)
        assert "|      1 |" in written(example)["tables/new.md"].decode()
    finally:
        del KINDS["counted"]
    with pytest.raises(DassError, match="kind of report counted is unknown"):
        report(example)


def test_settings_are_typed_and_a_typo_is_one_sentence() -> None:
    assert settings_of(["experiment=all", "scale=paper"]) == ReportConfig(experiment="all", scale="paper")
    with pytest.raises(DassError, match="setting experimnt is unknown: did you mean experiment"):
        settings_of(["experimnt=all"])
    with pytest.raises(DassError, match="setting all is unknown"):
        settings_of(["all"])


def test_the_command_ends_an_error_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"records={tmp_path}/nowhere"])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and printed.out == ""
    assert printed.err.startswith("error: No records in ") and len(printed.err.splitlines()) == 1
