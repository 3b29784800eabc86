"""The page of the results: whole, well-formed, alone on its disk; and in a browser a cell leads to its record."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dass.errors import DassError
from dass.manifests import read_manifests
from dass.records import read_records
from experiments.report import main
from report import site
from report.reading import runs_of
from report.rows import read_published
from report.site import write_site
from tests.report.records import losses, make_record, plan, write_example, write_record

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "runs"
PUBLISHED = read_published(ROOT / "results" / "published")
VOID = {"meta", "img", "br", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds; an element that is closed by another's end is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.rows: list[tuple[list[str], list[str]]] = []  # of tables: the texts, and the records that they lead to
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert len(given) == len(attributes), f"an attribute of {tag} stands twice"
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if tag == "a" else []
        self.loaded += [given[name] or "" for name in ("src", "srcset", "data", "poster") if name in given]
        self.loaded += [given["href"] or ""] if tag != "a" and "href" in given else []
        if tag == "tr":
            self.rows.append(([], []))
        if tag == "a" and self.rows and (given["href"] or "").startswith("#run-"):
            self.rows[-1][1].append((given["href"] or "")[5:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open and data.strip():
            self.rows[-1][0].append(data.strip())


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The page of a small example."""
    write_example(tmp_path / "runs")
    main([f"records={tmp_path / 'runs'}", f"site={tmp_path / 'site'}"])
    return tmp_path / "site" / "index.html"


def test_all_that_is_committed_is_one_click_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "write_figure", lambda draw, folder, name: [folder / f"{name}.png"])
    manifests = [one for one in read_manifests(RECORDS) if one.name == f"{one.experiment}-{one.scale}"]
    runs = runs_of(read_records(RECORDS))
    text = write_site(tmp_path, runs, manifests, PUBLISHED).read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.links) - {"#closed"} - {f"#{one}" for one in page.ids} == set(page.loaded)
    planned = {run.fingerprint for one in manifests for run in one.runs}
    assert {f"#run-{run.id}" for run in runs if run.id in planned} <= set(page.links)
    assert {"figures/reproduce.png", "figures/table1_perplexity.png"} <= set(page.loaded)
    assert not re.search(r"url\(|@import|fetch\(|import\(", text)


def test_a_row_leads_to_its_own_records_and_they_tell_what_they_are(example: Path) -> None:
    text = example.read_text()
    page = Page(text)
    rows = {tuple(words[:2]): runs for words, runs in page.rows if runs}
    assert set(rows["2:4", "dass"]) == {"4d"} and set(rows["dense", "dense"]) == {"0d"}
    assert len(rows["2:4", "dass"]) == 6  # each number, and the list of them
    assert not any(runs for words, runs in page.rows if words[:2] == ["50%", "magnitude"])  # was not run
    section = text.split('id="run-4d"')[1].split("</section>")[0]
    for told in ("0" * 40, "Some CPU, 2 threads, 8 GB", "alpha: 0.5", "numerics: 1", "16 windows", "python 3.11"):
        assert told in section
    assert section.count("<circle") == 16
    assert (example.parent / "figures" / "example.png").is_file()


def test_a_number_leads_to_its_own_run_and_a_mean_to_all_of_them(tmp_path: Path) -> None:
    shifts = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    given = {"a": (0, "x"), "b": (1, "x"), "c": (2, "x"), "d": (0, "y")}
    records = [
        make_record(one, "wanda", losses(shifts[one]), seed=seed, model=model) for one, (seed, model) in given.items()
    ]
    for record in records:
        write_record(tmp_path, record)
    runs = runs_of(read_records(tmp_path))
    page = Page(write_site(tmp_path, runs, [plan("x-small", records)], PUBLISHED).read_text())
    side_by_side, x, y = (runs for words, runs in page.rows if words[:2] == ["2:4", "wanda"])
    assert side_by_side == ["d", *"abcd"]  # the number of y alone, and the list
    assert x == ["a", "b", "c"] and set(y) == {"d"}


def test_names_are_text(tmp_path: Path) -> None:
    records = [make_record("a", "dense", losses(0.0), model="<script>alert(1)</script>")]
    write_record(tmp_path, records[0])
    runs = runs_of(read_records(tmp_path))
    text = write_site(tmp_path, runs, [plan("x-small", records)], PUBLISHED).read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    Page(text)


def test_without_any_result_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(DassError, match="No sweep has a result"):
        write_site(tmp_path, [], [], PUBLISHED)


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_it_renders_and_a_cell_leads_to_its_record(example: Path, width: int) -> None:
    plain = shot(example, "", width)
    assert len(plain.getcolors(1 << 24)) > 50  # text, lines and a figure
    record = shot(example, "#run-4d", width)
    panel = (width - 460, 0, width, 900)
    assert record.crop(panel).tobytes() != plain.crop(panel).tobytes()


@needs_browser
def test_in_a_browser_a_click_sorts_or_shows_a_record(example: Path) -> None:
    script = """<script>
    const head = [...document.querySelectorAll("th button")].find(one => one.textContent === "Perplexity");
    const table = head.closest("table"), column = head.parentElement.cellIndex;
    const shown = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim().split(" ")[0]);
    const found = [shown()];
    for (let i = 0; i < 3; i++) { head.click(); found.push(shown()); }
    const link = document.querySelector('.number a[href="#run-4d"]');
    const style = () => getComputedStyle(document.getElementById("run-4d")).display;
    found.push(style());
    link.click();
    setTimeout(() => { found.push(style()); document.title = JSON.stringify(found); }, 200);
    </script>"""
    clicked = example.with_name("clicked.html")
    clicked.write_text(example.read_text().replace("</body>", f"{script}</body>"))
    dom = browse(clicked, "--virtual-time-budget=3000", "--dump-dom")
    released, rising, falling, restored, before, after = json.loads(unescape(re.search("<title>(.*?)<", dom)[1]))
    numbers = [float(one) for one in released if one != "—"]
    assert rising == [f"{one:.2f}" for one in sorted(numbers)] + ["—"]
    assert falling == [f"{one:.2f}" for one in sorted(numbers, reverse=True)] + ["—"]
    assert restored == released != rising
    assert (before, after) == ("none", "block")


def shot(page: Path, fragment: str, width: int) -> Image.Image:
    """A picture of a page as a browser shows it."""
    path = page.with_suffix(".png")
    browse(page, f"--screenshot={path}", f"--window-size={width},900", "--hide-scrollbars", fragment=fragment)
    return Image.open(path).convert("RGB").copy()


def browse(page: Path, *options: str, fragment: str = "") -> str:
    """What a headless browser without a network prints of a page."""
    alone = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}")
    command = [str(CHROMIUM), *alone, "--host-resolver-rules=MAP * ~NOTFOUND", *options, f"{page.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
