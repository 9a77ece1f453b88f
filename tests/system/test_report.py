"""The report of a real job in a real browser: it renders, agrees with the journal, and fits."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.time_account import Category
from tests.browser import Browser, why_not
from tests.job import SCRIPTS, Job, environment

PHONE, DESKTOP = (390, 844), (1280, 900)
MOST_PAGES = 12

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@dataclass
class Made:
    """A report, and the journal that it was made from."""

    page: Path
    events: list[JournalEntry]

    def count(self, *names: str) -> int:
        return sum(event.name in names for event in self.events)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A job of two workers: one is killed, then a notice comes, then it is run to its end."""
    root = tmp_path_factory.mktemp("report")
    enough = root / "enough"
    with Job(root, "--enough", str(enough), script=SCRIPTS / "reporting.py") as job:
        job.start().until_step(60)
        psutil.Process(job.view().workers[1].pid).send_signal(signal.SIGKILL)
        job.until(lambda view: view.incarnation == 2, "the next incarnation")
        job.until_training()
        job.until_step(job.view().position.step + 40)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        job.start().until_training()
        job.until_step(job.view().position.step + 20)
        enough.touch()
        assert job.wait() == 0, job.output()
        page = root / "report.html"
        done = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "report", str(job.directory), "-o", str(page)],
            capture_output=True, text=True, timeout=60, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Made(page, read_journal(JobDirectory.at(job.directory)))


@pytest.fixture
def browser(made: Made) -> Iterator[Browser]:
    with Browser() as browser:
        browser.look_like(*DESKTOP)
        browser.open(made.page)
        yield browser


def figure(browser: Browser, selector: str) -> float:
    return float(browser.value(f"document.querySelector({selector!r}).value"))


def test_page_renders_without_errors_and_requests(made: Made, browser: Browser) -> None:
    """The console is empty, and only the file itself was requested."""
    assert browser.value("document.querySelector('h1').getClientRects().length") == 1
    assert browser.value("document.scripts.length") == 0
    assert browser.console == []
    assert browser.requests == [made.page.resolve().as_uri()]


def test_browser_reports_console_errors_and_requests(browser: Browser, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.log('seen'); oops()</script>"
    )
    browser.open(bad)
    assert any("seen" in line for line in browser.console)
    assert any("oops" in line for line in browser.console)
    assert "http://127.0.0.1:9/x.png" in browser.requests


def test_figures_match_the_journal(made: Made, browser: Browser) -> None:
    expected = History.of(made.events).account.goodput()
    for category in Category:
        shown = figure(browser, f"#time-{category.value} data")
        assert shown == pytest.approx(expected.seconds(category), abs=1e-6), category
    assert figure(browser, "#time-wall data") == pytest.approx(expected.wall_seconds, abs=1e-6)
    assert expected.lost_work_seconds > 0 and expected.training_seconds > 0
    assert figure(browser, "#failure-count") == made.count("crash") == 1
    assert figure(browser, "#notice-count") == made.count("notice", "warning", "held") == 1
    assert figure(browser, "#save-count") == made.count("saved", "save_failed")
    rows = browser.value("document.querySelectorAll('#incarnations section, #incarnations tbody')"
                         "[0].rows.length")  # fmt: skip
    assert rows == made.count("launch") == 3
    goodput = f"{100 * (expected.fraction or 0):.1f} % goodput"
    assert goodput in browser.value("document.querySelector('#answer-cost').innerText")


def test_loss_is_drawn_once_per_step(made: Made, browser: Browser) -> None:
    """From left to right without a step back; what was lost is apart."""
    path = browser.value("document.querySelector('#training .curve.kept').getAttribute('d')")
    places = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", path)]
    assert len(places) > 5 and places == sorted(places)
    assert places[0] >= 0 and places[-1] <= 1000
    assert browser.value("document.querySelectorAll('#training figure').length") >= 2


@pytest.mark.parametrize("size", [PHONE, (320, 640), (768, 1024), DESKTOP], ids=str)
def test_page_fits_the_window(browser: Browser, size: tuple[int, int]) -> None:
    """Wide tables scroll by themselves."""
    browser.look_like(*size, phone=size[0] < 500)
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    assert browser.value("innerWidth") == size[0]
    cut = browser.value("""[...document.querySelectorAll('h1, h2, p, li, dd, figcaption, .rec')]
        .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText)""")
    assert cut == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=str)
def test_timeline_labels_do_not_overlap(browser: Browser, size: tuple[int, int]) -> None:
    browser.look_like(*size, phone=size == PHONE)
    places = browser.value("""[...document.querySelectorAll('.labels')].map(row =>
        [...row.children].map(one => { const r = one.getBoundingClientRect();
                                       return [r.left, r.right, r.top]; }))""")
    labels = [label for row in places for label in row]
    assert len(labels) == 2
    for row in places:
        for one in row:
            for other in row:
                beside = one[1] <= other[0] or other[1] <= one[0] or one[2] != other[2]
                assert one is other or beside


@pytest.mark.parametrize("size", [(320, 640), PHONE, DESKTOP], ids=str)
def test_labels_stay_within_their_drawings(browser: Browser, size: tuple[int, int]) -> None:
    """Wherever a tick happens to be: a label past the edge would widen the page."""
    browser.look_like(*size, phone=size[0] < 500)
    outside = browser.value("""
        [...document.querySelectorAll('.acrosses i, .axis span, .labels span')].filter(one => {
            const r = one.getBoundingClientRect();
            const p = one.parentElement.getBoundingClientRect();
            return r.right > p.right + 1 || r.left < p.left - 1; })
        .map(one => one.innerText)""")
    assert outside == []


def test_figures_of_any_length_fit_the_window_and_the_paper(browser: Browser) -> None:
    """A duration may be `1 d 23 h` where this job's are `2.1 s`."""
    browser.value("""document.querySelectorAll('td, tbody th, .rec > span').forEach(
        one => one.append(' 23 h 59 min'))""")
    browser.look_like(320, 640, phone=True)
    assert browser.value("document.documentElement.scrollWidth") <= 320
    browser.look_like(718, 1000)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.value("document.documentElement.scrollWidth") <= 718


def contrast(browser: Browser, selector: str) -> float:
    """Of a text and the nearest background that is painted, as WCAG defines it."""
    return float(browser.value("""((selector) => {
        const parts = (text) => text.match(/[\\d.]+/g).map(Number);
        const shine = (text) => parts(text).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        let one = document.querySelector(selector);
        const ink = shine(getComputedStyle(one).color);
        const background = (one) => getComputedStyle(one).backgroundColor;
        while (parts(background(one))[3] === 0) one = one.parentElement;
        const page = shine(background(one));
        return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    })(""" + repr(selector) + ")"))  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast_in_both_colour_schemes(browser: Browser, dark: bool) -> None:
    """A contrast of at least 4.5 to 1; and the two schemes differ."""
    browser.look_like(*DESKTOP, dark=dark)
    page = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page)[:3])) < 200) is dark
    for selector in ("h1", ".pill", ".facts", "nav a", ".answer .verdict", ".answer li", "td",
                     "thead th", "td small", ".legend li", ".labels span", ".box",
                     ".amber .verdict",
                     "summary", ".acrosses i", ".rec > span", "footer p",
                     *(f".key.s{number}" for number in range(1, 9))):  # fmt: skip
        assert contrast(browser, selector) >= 4.5, selector


def test_page_has_headings_and_labels(browser: Browser) -> None:
    """Landmarks, one first heading, the tables' names, the drawings' words, as computed."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role: Any = node["role"]["value"]
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    for role in ("banner", "main", "navigation", "contentinfo"):
        assert len(found[role]) == 1, role
    assert len(found["table"]) >= 5 and all(found["table"])
    assert len(found["image"]) >= 4 and all(found["image"])
    assert len(found["columnheader"]) > 20 and len(found["rowheader"]) > 10
    assert browser.value("document.documentElement.lang") == "en"
    assert browser.value("document.querySelectorAll('h1').length") == 1


def test_page_prints_on_a_few_pages(browser: Browser) -> None:
    """With the last lines of each failure open, and only the requested backgrounds."""
    data = browser.print()
    assert data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= MOST_PAGES
    browser.look_like(718, 1000)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.value("document.documentElement.scrollWidth") <= 718
    heights = browser.value(
        "[...document.querySelectorAll('details pre')].map(one => one.offsetHeight)"
    )
    assert heights and all(height > 0 for height in heights)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_browser_leaves_no_processes_or_files(made: Made) -> None:
    with Browser() as browser:
        browser.open(made.page)
        profile = Path(browser._profile)
        tree = psutil.Process(browser._process.pid).children(recursive=True)
        assert tree and profile.is_dir()
    assert not profile.exists()
    _, left = psutil.wait_procs(tree, timeout=5)
    assert [one for one in left if one.is_running() and one.status() != "zombie"] == []
