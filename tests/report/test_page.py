"""Pages: their numbers are those of the records, and what the records do not support is not built."""

from pathlib import Path

import numpy as np
import pytest

from dass.errors import DassError
from dass.manifests import read_manifests
from dass.records import read_records
from report.page import page_path, render_page, require, verdict
from report.reading import runs_of
from report.tables import Difference
from tests.report.records import losses, write_example


@pytest.fixture
def render(tmp_path: Path):
    write_example(tmp_path)

    def filled(text: str) -> str:
        template = tmp_path / "page.template.md"
        template.write_text('{% set t = view("example", "toy") %}\n' + text)
        page = render_page(template, runs_of(read_records(tmp_path)), read_manifests(tmp_path))
        note, body = page.split("\n\n", 1)
        assert note.startswith("<!-- Built by") and "page.template.md" in note
        return body.rstrip("\n")

    return filled


def test_numbers_are_those_of_the_records(render) -> None:
    d = losses(0.25, 0.03) - losses(0.40, 0.02)
    assert render('{{ t.delta("dass", "2:4") | pm }}') == f"−{abs(d.mean()):.3f} ± {d.std(ddof=1) / 4:.3f}"
    assert render('{{ t.ppl("dass", "2:4") | f(".2f") }}') == f"{np.exp(losses(0.25, 0.03).mean()):.2f}"
    d = losses(0.25, 0.03) - losses(0.0)
    assert render('{{ t.delta("dass", "2:4", "dense") | pm("+.4f") }}').startswith(f"+{d.mean():.4f} ± ")
    assert render('{{ t.delta("sparsegpt", "50%", "dass") | marked }}').startswith("≈ +0.00")
    # load and evaluation of all eight runs, pruning of seven, calibration of six, 12.34 s each
    assert render('{{ minutes() | f(".1f") }} {{ minutes("example") | f(".1f") }}') == "6.0 6.0"


def test_bold_are_the_best_and_those_in_a_draw(render) -> None:
    names = ("wanda", "sparsegpt", "dass")
    cells = ", ".join(f't.cell("{name}", "50%")' for name in names)
    texts = render(f'{{{{ bold_best([{cells}]) | join(" ") }}}}').split()
    assert [text.startswith("**") for text in texts] == [False, True, True]
    assert "**" not in render('{{ bold_best([t.cell("dass", "50%")])[0] }}')


def test_verdicts_follow_the_numbers(render) -> None:
    assert render('{{ verdict(t.delta("dass", "2:4")) }}') == "holds here"
    assert render('{{ verdict(t.delta("magnitude", "2:4")) }}') == "does not hold here"
    assert render('{{ verdict(t.delta("sparsegpt", "50%", "dass")) }}') == "cannot be told"
    better, worse = Difference(-1.0, 0.1), Difference(1.0, 0.1)
    assert verdict(better, better) == "holds here"
    with pytest.raises(DassError, match="does not hold here and holds here"):
        verdict(better, worse)


def test_a_claim_that_the_records_do_not_support_is_not_built(render) -> None:
    assert render('{{ require(t.ppl("dass", "2:4") < t.ppl("wanda", "2:4"), "DaSS wins") -}}\nIt wins.') == "It wins."
    with pytest.raises(DassError, match='no longer support "Wanda wins"'):
        render('{{ require(t.ppl("dass", "2:4") > t.ppl("wanda", "2:4"), "Wanda wins") }}')
    assert require(True, "") == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{{ t.ppl("magnitude", "50%") }}', "magnitude at 50% .* not one result"),
        ('{{ view("other", "toy") }}', "needs the sweep experiment=other"),
        ('{{ view("example", "giant") }}', "one table of giant in example: there are 0"),
        ("{{ nonsense }}", "'nonsense' is undefined"),
        ("{% for %}", "is not a template that can be filled"),
    ],
)
def test_what_is_not_there_is_one_sentence(render, text: str, sentence: str) -> None:
    with pytest.raises(DassError, match=sentence):
        render(text)


def test_a_page_lies_beside_its_template(tmp_path: Path) -> None:
    assert page_path(tmp_path / "page.template.md") == tmp_path / "page.md"
    with pytest.raises(DassError, match="is not a file NAME"):
        render_page(tmp_path / "page.md", [], [])
