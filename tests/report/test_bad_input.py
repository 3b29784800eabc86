"""One bad record, manifest or file of published numbers is named, and costs the others nothing."""

import contextlib
import copy
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dass.errors import DassError
from dass.fingerprint import Fingerprint
from dass.manifests import Manifest, read_manifest, read_manifests
from dass.records import read_record, read_records
from experiments.report import ReportConfig, report
from report.grid import to_latex, to_markdown
from report.kinds import KINDS, Material
from report.reading import planned_runs, runs_of
from report.rows import COLUMNS, read_published
from report.runs import Run
from tests.report.records import losses, make_record, write_example

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "runs"
FAST = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS_OF = {"perplexity": "table1_perplexity-small", "zero_shot": "table_zero_shot-small"}
KINDS_OF["diagnostics"] = "diagnostics-small"
LONG = "[" * 100_000 + "]" * 100_000


def real(manifest: str) -> list[dict[str, Any]]:
    """Committed records of a sweep: the first, and two that read calibration tokens."""
    runs = read_manifest(RECORDS / "manifests" / f"{manifest}.json").runs
    first, *others = (run for run in runs if (RECORDS / f"{run.fingerprint}.json").is_file())
    chosen = [first, *(run for run in others if run.calibrates)][:3]
    return [read_record(RECORDS / f"{run.fingerprint}.json") for run in chosen]


SWEEPS = {kind: real(manifest) for kind, manifest in KINDS_OF.items()}


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every entry of a tree; of a list the first three."""
    entries = list(tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ())
    return [path] * bool(path) + [place for key, value in entries for place in places(value, (*path, key))]


def put(tree: Any, place: tuple, value: Any) -> Any:
    """A copy of a tree with another value at a place; `del` takes the entry away."""
    changed = copy.deepcopy(tree)
    part = changed
    for key in place[:-1]:
        part = part[key]
    if value is del_:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return changed


del_ = object()
WORDS = ["", "x", "a\nb", "|", "\\", "$\\frac$", "<b>", "_a_", "[x", "\ud800", "dense", "none", "perplexity", "mean"]
NUMBERS = [0, -1, 1, 3, 0.5, 1e308, -1e308, 5e-324, 2**62, 2**63, 10**400, float("nan"), float("inf"), True, None]
JUNK = st.sampled_from([*WORDS, *NUMBERS, [], {}, [1], {"a": 1}, [[[[]]]], {"a": {"b": {"c": 1}}}, del_])


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one to three entries changed: first one of the parts, then a place in it, so that all are met."""
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(list(tree)))
        tree = put(tree, draw(st.sampled_from([place for place in places(tree) if place[0] == part])), draw(JUNK))
        if not tree:
            break
    return tree


def run_or_line(records: list[dict[str, Any]]) -> list[Run]:
    """The runs of records; every other record has one line on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        runs = runs_of(records)
    lines = err.getvalue().splitlines()
    assert len(lines) == len(records) - len(runs) and all(".json" in line for line in lines)
    return runs


@pytest.mark.parametrize("kind", SWEEPS)
@FAST
@given(data=st.data())
def test_any_record_is_a_run_or_a_line_and_the_others_are_reported(kind: str, data: st.DataObject) -> None:
    good = SWEEPS[kind]
    bad = copy.deepcopy(data.draw(st.sampled_from(good)))
    if data.draw(st.booleans()):  # its identity cannot be reckoned, so that the other checks must hold
        bad["determinants"] = {"calibration": bad["determinants"]["calibration"]}
    bad = data.draw(mutated(bad)) | {"id": "bad"}
    runs = run_or_line([*good, bad])
    assert {run.id for run in runs} >= {record["id"] for record in good}
    made = KINDS[kind](Material(runs, read_published(ROOT / "results" / "published")))
    written = to_markdown(made.grids) + to_latex(made.grids) + made.frame.to_csv(index=False)
    assert written.encode() and "nan" not in to_markdown(made.grids)


@FAST
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), cut=st.integers(0, 3000))
def test_any_bytes_are_one_sentence_that_names_the_file(content: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record, manifest = Path(folder) / "abc.json", Path(folder) / "table1_perplexity-small.json"
        record.write_bytes((RECORDS / f"{SWEEPS['perplexity'][0]['id']}.json").read_bytes()[:cut] + content)
        with pytest.raises(DassError, match=r"abc\.json"):
            read_record(record)
        manifest.write_bytes((RECORDS / "manifests" / manifest.name).read_bytes()[:cut] + content)
        with pytest.raises(DassError, match="table1_perplexity-small"):
            read_manifest(manifest)


NO_PLAIN_JSON = [b"\xef\xbb\xbf{}", b"\xff\xfe", b"", b"null", b"[1]", b"{", b"\x00", b'"\\ud800"', LONG.encode()]
NO_PLAIN_JSON += [b'{"a": ' * 5000, b'{"id": NaN}', b'{"id": 1e999}', b'{"id": 1' + b"0" * 9000 + b"}"]
NO_PLAIN_JSON += [b'{"id": 1, "id": 2}', b'{"id": 9' * 30, b'{"id": 18446744073709551616}']


@pytest.mark.parametrize("content", NO_PLAIN_JSON, ids=range(len(NO_PLAIN_JSON)))
def test_what_is_no_plain_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "abc.json").write_bytes(content)
    for read in (read_record, read_manifest):
        with pytest.raises(DassError, match=r"abc\.json") as raised:
            read(tmp_path / "abc.json")
        assert len(str(raised.value).splitlines()) == 1


def test_what_is_no_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_example(tmp_path)
    good = read_records(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("nowhere")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "a\nb.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.json")
    assert read_records(tmp_path) == good
    assert len(capsys.readouterr().err.splitlines()) == 5


LIES: dict[str, tuple[str, dict[tuple, Any]]] = {
    "a word for a standard error": ("perplexity", {("metrics", 0, "stderr"): "0.1"}),
    "no windows": ("perplexity", {("windows",): []}),
    "a window less": ("perplexity", {("windows", 3): del_}),
    "a window changed": ("perplexity", {("windows", 3): 9.0}),
    "an infinite window": ("perplexity", {("windows", 3): float("inf")}),
    "a perplexity": ("perplexity", {("metrics", 0, "value"): 9.0}),
    "a standard error": ("perplexity", {("metrics", 0, "stderr"): 0.001}),
    "no standard error": ("perplexity", {("metrics", 0, "stderr"): None}),
    "the number of windows": ("perplexity", {("metrics", 0, "n"): 23}),
    "the tokens": ("perplexity", {("metrics", 0, "tokens"): 1}),
    "the length": ("perplexity", {("metrics", 0, "seq_len"): 256, ("metrics", 0, "tokens"): 24 * 256}),
    "no metric": ("perplexity", {("metrics",): []}),
    "a metric twice": ("perplexity", {("metrics",): [SWEEPS["perplexity"][1]["metrics"][0]] * 2}),
    "a seed in words": ("perplexity", {("config", "seed"): "0"}),
    "a huge seed": ("perplexity", {("config", "seed"): 2**64}),
    "another seed": ("perplexity", {("config", "seed"): 7}),
    "negative seconds": ("perplexity", {("stages", "load", "seconds"): -1.0}),
    "no stage of pruning": ("perplexity", {("stages", "pruning"): del_}),
    "a share beyond 1": ("perplexity", {("sparsity", "linear"): 1.5}),
    "the sparsity": ("perplexity", {("sparsity", "targeted"): 0.6}),
    "the zeros": ("perplexity", {("sparsity", "projections", "model.layers.0.mlp.gate_proj", "zeros"): 3}),
    "no projections": ("perplexity", {("sparsity", "projections"): {}, ("sparsity", "targeted"): 0.0}),
    "another pattern": ("perplexity", {("config", "sparsity"): {"name": "x", "ratio": None, "n": 1, "m": 4}}),
    "n above m": ("perplexity", {("config", "sparsity"): {"name": "x", "ratio": None, "n": 5, "m": 4}}),
    "another dtype": ("perplexity", {("config", "resolved", "dtype"): "bfloat16"}),
    "another method": ("perplexity", {("config", "method", "name"): "dass"}),
    "its text": ("perplexity", {("determinants", "evaluation", "sha256"): "0"}),
    "its hash": ("perplexity", {("identity", "model"): "0" * 16}),
    "other numerics": ("perplexity", {("identity", "numerics"): 99}),
    "a surrogate": ("perplexity", {("machine", "cpu"): "\ud800"}),
    "NaN where nothing reads it": ("perplexity", {("config", "tracking"): float("nan")}),
    "a name that is a list": ("perplexity", {("config", "model", "name"): ["x"]}),
    "alpha in words": ("perplexity", {("config", "method", "alpha"): "half"}),
    "an item": ("zero_shot", {("metrics", 0, "items", 0): 2}),
    "an item less": ("zero_shot", {("metrics", 0, "items", 0): del_}),
    "an accuracy": ("zero_shot", {("metrics", 0, "value"): 0.1}),
    "the error of an accuracy": ("zero_shot", {("metrics", 0, "stderr"): 0.3}),
    "the mean": ("zero_shot", {("metrics", -1, "value"): 0.1}),
    "no mean": ("zero_shot", {("metrics", -1): del_}),
    "a block less": ("diagnostics", {("diagnostics", "norms", "cv", 0): del_}),
    "an overlap beyond 1": ("diagnostics", {("diagnostics", "jaccard", "wanda|dass", "up", 0): 1.5}),
    "no diagnostics": ("diagnostics", {("diagnostics",): del_}),
}


@pytest.mark.parametrize("lie", LIES)
def test_numbers_that_contradict_each_other_are_not_printed(lie: str) -> None:
    kind, changes = LIES[lie]
    record = SWEEPS[kind][-1]
    assert len(run_or_line([record])) == 1
    for place, value in changes.items():
        record = put(record, place, value)
    assert run_or_line([record]) == []


def test_all_committed_records_are_sound() -> None:
    records = read_records(RECORDS)
    assert len(records) == len(list(RECORDS.glob("*.json"))) == len(run_or_line(records))


def test_an_identity_is_reckoned_again_from_the_determinants() -> None:
    record = copy.deepcopy(SWEEPS["zero_shot"][0])
    record["determinants"]["model"]["sha256"] = "0" * 64
    changed = Fingerprint(record["determinants"])
    assert run_or_line([record]) == []
    assert len(run_or_line([record | {"id": changed.id, "identity": changed.as_dict()}])) == 1


def test_a_run_with_fewer_windows_than_the_others_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    records = [make_record(name, name, losses(0.1)) for name in ("wanda", "dass", "sparsegpt")]
    short = make_record("short", "magnitude", losses(0.1, n=15))
    short["identity"]["evaluation"] = records[0]["identity"]["evaluation"]
    assert [run.id for run in runs_of([*records, short])] == ["wanda", "dass", "sparsegpt"]
    assert "short.json has more or fewer windows" in capsys.readouterr().err


def test_models_may_have_other_numbers_of_windows(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its own tokenizer, and so another number of tokens of one text."""
    one = [make_record(f"a{name}", name, losses(0.1), model="a") for name in ("wanda", "dass", "sparsegpt")]
    other = [make_record(f"b{name}", name, losses(0.1, n=15), model="b") for name in ("wanda", "dass")]
    for record in other:
        record["identity"]["evaluation"] = one[0]["identity"]["evaluation"]
    assert len(runs_of([*one, *other])) == 5 and capsys.readouterr().err == ""


def test_the_report_goes_on_without_the_bad_ones(tmp_path: Path) -> None:
    config = ReportConfig("example", records=f"{tmp_path}/runs", published=f"{tmp_path}/p", output=f"{tmp_path}/out")
    write_example(tmp_path / "runs")
    report(config)
    tables = [(tmp_path / "out" / "tables" / f"example.{suffix}") for suffix in ("md", "tex", "csv")]
    before = [path.read_bytes() for path in tables]
    example = read_records(tmp_path / "runs")[0]
    for number, place in enumerate(places(example | {"config": {}})):
        bad = put(example, place, [LONG[:50]]) | {"id": f"bad{number}"}
        (tmp_path / "runs" / f"bad{number}.json").write_text(json.dumps(bad))
    report(config)
    assert [path.read_bytes() for path in tables] == before


@FAST
@given(data=st.data())
def test_any_manifest_is_one_or_a_sentence_and_its_runs_are_reported(data: st.DataObject) -> None:
    tree = json.loads((RECORDS / "manifests" / "table_zero_shot-small.json").read_text())
    tree["runs"] = tree["runs"][:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifests" / "table_zero_shot-small.json"
        path.parent.mkdir()
        path.write_text(json.dumps(data.draw(mutated(tree))))
        try:
            (manifest,) = read_manifests(Path(folder))
        except DassError as error:
            assert "table_zero_shot-small" in str(error) and len(str(error).splitlines()) == 1
            return
    assert isinstance(manifest, Manifest)
    for found in ([], runs_of(SWEEPS["zero_shot"])):
        with contextlib.redirect_stderr(io.StringIO()):
            to_markdown(KINDS["zero_shot"](Material(planned_runs(manifest, found), read_published(ROOT))).grids)


@FAST
@given(data=st.data())
def test_any_published_file_is_numbers_or_a_sentence(data: st.DataObject) -> None:
    lines = [",".join(COLUMNS), "perplexity,wikitext2-test,smollm2_135m,dense,dense,5.12,4096,all,README"]
    content = "\n".join([*lines, ""]).encode()
    start, cut = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
    junk = data.draw(st.sampled_from([b",", b'"', b"\n", b"-", b"1e999", b"nan", b"x"]) | st.binary(max_size=9))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "numbers.csv").write_bytes(content[:start] + junk + content[start + cut :])
        try:
            published = read_published(Path(folder))
        except DassError as error:
            assert "numbers.csv" in str(error)
            return
    assert published.value.between(1, 1e300).all() and published.seq_len.gt(0).all()
    to_markdown(KINDS["perplexity"](Material(runs_of(SWEEPS["perplexity"]), published)).grids)
