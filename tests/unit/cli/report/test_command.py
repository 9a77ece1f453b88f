"""The report of jobs in every state, of arbitrary journals, and how its file is written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.cli.app import main
from elastic_ckpt.cli.report.material import Material, collect
from elastic_ckpt.cli.report.page import render
from elastic_ckpt.cli.report.words import figure, moment, offset, rounded
from elastic_ckpt.jobdir.node_record import FailureRecord, NodeRecord, ProcessIdentity, boot_id
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import MAX_LINE_BYTES
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.protocol.run_state import RunState
from tests.checkpoints import make_checkpoint, open_job
from tests.journals import happened
from tests.unit.journal.test_history import (
    CRASHED,
    EVENTS,
    FIELDS,
    end,
    ended,
    journals,
    launch,
    loaded,
    running,
    saved,
    steps,
)
from tests.unit.test_group_access import GROUP, as_user, make_job

pytestmark = pytest.mark.one_torch

MOST_BYTES = 2_000_000
BEGAN = 1_790_000_000.0
DISTURBED = [
    *CRASHED,
    happened(71, "recovery", {"incarnation": 2, "total": 11.0, "step": 30, "tier": "memory",
                           "stages": {"detect": 1.0, "spawn": 6.0, "load": 4.0}}),
    happened(80, "verified", {"path": "/a/epoch-0_step-30", "intact": True, "how": "every byte"}),
    steps(100, 60, loss=1.5),
    happened(150, "notice", {"source": "aws", "reason": "spot", "seconds": 120.0}),
    happened(150, "choice", {"kind": "full", "predicted_seconds": 2.0, "why": "it fits"}),
    saved(152, 100, "emergency"), ended(152, "stopped"),
    happened(153, "emergency_save", {"step": 100, "predicted_seconds": 2.0, "actual_seconds": 2.5}),
]  # fmt: skip
"""A failure, then a notice; each test adds the end."""

STYLE = r"(?:[a-z-]+:(?:[a-z0-9.%-]+|clamp\([\d.]+ch, [\d.-]+%, 100% - [\d.]+ch\));?)+"
"""Words and numbers: nothing that a journal says."""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def write_journal(job: JobDirectory, entries: list[JournalEntry], node: str = "here") -> None:
    """Write these entries as the journal, from ``BEGAN`` on."""
    lines = [
        json.dumps({
            "event": one.name, "wall": BEGAN + one.wall, "monotonic": one.wall, "node": node,
            "incarnation": one.incarnation, "data": one.data,
        })
        for one in entries
    ]  # fmt: skip
    job.journal(node).write_text("\n".join(lines) + "\n")


def record(job: JobDirectory, state: RunState, *, is_alive: bool, **fields: Any) -> None:
    """Write the record of a supervisor that is alive or gone."""
    gone = ProcessIdentity("host", boot_id(), 2**22 - 1, 1.0)
    NodeRecord(
        job="gpt", run_id="r", node="here", state=state, since=BEGAN,
        owner=ProcessIdentity.current() if is_alive else gone, message=state.value, **fields,
    ).write(job.node_record("here"))  # fmt: skip


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page:
    """A parsed page: its elements and its text."""

    html: str
    elements: list[Element] = field(default_factory=list)
    text: str = ""

    def one(self, name: str) -> Element:
        """Return the element with an id."""
        [found] = [one for one in self.elements if one.attributes.get("id") == name]
        return found

    def answer(self, name: str) -> str:
        return " ".join(self.one(f"answer-{name}").text.split())

    def seconds(self, category: str) -> float:
        """Return the exact value of a category's row."""
        at = self.elements.index(self.one(f"time-{category}"))
        data = next(one for one in self.elements[at:] if one.tag == "data")
        return float(data.attributes["value"] or "")

    def count(self, name: str) -> int:
        return int(self.one(f"{name}-count").attributes["value"] or "")


class _PageParser(HTMLParser):
    VOID = ("meta", "link", "br")

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._page.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._page.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if any(one.tag == "style" for one in self._open):
            return
        self._page.text += data
        for one in self._open:
            one.text += f"{data} "

    def finish(self) -> None:
        self.close()
        assert self._open == []


def page_of(job: JobDirectory) -> Page:
    return parse(render(collect(job)))


def parse(html: str) -> Page:
    page = Page(html)
    parser = _PageParser(page)
    parser.feed(html)
    parser.finish()
    return page


def assert_harmless(page: Page) -> None:
    """No script, nothing to load, no control characters, and a bounded size."""
    assert len(page.html.encode()) < MOST_BYTES
    assert {one.tag for one in page.elements} <= {
        "html", "head", "meta", "link", "title", "style", "body", "a", "header", "div", "h1", "h2",
        "p", "span", "b", "time", "code", "nav", "ul", "li", "main", "section", "svg", "desc",
        "path", "rect", "circle", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
        "small", "data", "br", "details", "summary", "pre", "figure", "figcaption", "i", "em",
        "dl", "dt", "dd", "footer",
    }  # fmt: skip
    for one in page.elements:
        for name, value in one.attributes.items():
            assert not name.startswith("on") and name != "src", (one.tag, name)
            if name == "href":
                assert value == "data:," or (value or "").startswith("#"), value
            if name == "style":
                assert re.fullmatch(STYLE, value or ""), value
    css = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in css and "url(" not in css and "http" not in css
    assert all(char.isprintable() or char == "\n" for char in page.html)
    ids = [one.attributes["id"] for one in page.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    targets = {f"#{name}" for name in ids}
    links = [one.attributes.get("href") for one in page.elements if one.tag == "a"]
    assert set(links) <= targets


# -- states ---------------------------------------------------------------------------------------


def test_an_empty_directory(tmp_path: Path) -> None:
    """Without supervisor, journal or checkpoint, the page states that."""
    (tmp_path / "empty").mkdir()
    page = page_of(JobDirectory.at(tmp_path / "empty"))
    assert_harmless(page)
    assert "never run under a supervisor" in page.text
    assert "There is none yet" in page.answer("good")
    assert "Start it with elastic-ckpt run" in page.answer("safe")
    assert (page.count("failure"), page.count("notice"), page.count("save")) == (0, 0, 0)


def test_what_a_last_failure_lost_was_not_trained_again(job: JobDirectory) -> None:
    """And the command to type has the directory, which the sentence leaves out."""
    again = [steps(100, 60), ended(120, "crashed"), happened(120, "crash", {"rank": 1}),
             end(121, "failed", 70)]  # fmt: skip
    write_journal(job, [*CRASHED, *again])
    failure = FailureRecord(1, "signal", "killed", ("x",), BEGAN)
    record(job, RunState.FAILED, is_alive=False, exit_code=70, last_failure=failure)
    page = page_of(job)
    assert_harmless(page)
    assert "20 steps Trained again after an interruption. What was lost last" in page.answer("lost")
    assert "See why it failed, fix that, then" in page.answer("safe")
    assert f"elastic-ckpt logs --last --rank 1 {job.root}" in page.answer("safe")


def test_without_a_session_all_is_lost(job: JobDirectory) -> None:
    write_journal(job, [*DISTURBED, end(154, "preempted", 76)])
    record(job, RunState.PREEMPTED, is_alive=False, exit_code=76, sessionless=True)
    assert "All that was trained The script creates no Session" in page_of(job).answer("lost")


def test_a_job_that_was_preempted(job: JobDirectory) -> None:
    """Every number follows from ``DISTURBED``."""
    write_journal(job, [*DISTURBED, end(154, "preempted", 75)])
    record(job, RunState.PREEMPTED, is_alive=False, exit_code=75)
    make_checkpoint(job, 100, reason="emergency")
    page = page_of(job)
    assert_harmless(page)
    assert (page.count("failure"), page.count("notice"), page.count("save")) == (1, 1, 2)
    expected = {"setup": 10, "training": 30 + 82, "lost_work": 20, "recovery": 10 + 2, "wall": 154}
    for name, seconds in expected.items():
        assert page.seconds(name) == pytest.approx(seconds, abs=1e-3), name
    assert "preempted, waiting to be restarted" in page.text
    assert "20 steps Trained again after an interruption." in page.answer("lost")
    assert "No preemption lost anything" in page.answer("lost")
    assert "1 failure and 1 preemption" in page.answer("why")
    assert "Killed by a signal, F1: it fell." in page.answer("why")
    assert "A notice from aws: spot." in page.answer("why")
    assert "Yes: saved, and waiting" in page.answer("safe")
    assert "resumes from step 100" in page.answer("safe")
    assert "1 load, verified first by every byte." in page.answer("good")
    assert "Every save was sealed." in page.answer("good")
    assert f"{100 * 112 / 154:.1f} % goodput" in page.answer("cost")
    assert "Most of the rest was lost work." in page.answer("cost")
    row = " ".join(page.one("n1").text.split())
    assert "spot notice from aws 2 min step 100 it fits 2 s 2.5 s saved exit code 75" in row
    failure = " ".join(page.one("f1").text.split())
    assert "20 s 20 steps 10 s - step 30, memory" in failure and "OSError" in failure


def test_a_job_that_finished(job: JobDirectory) -> None:
    write_journal(
        job, [*CRASHED, saved(90, 50, "final"), ended(90, "completed"), end(91, "finished", 0)]
    )
    record(job, RunState.FINISHED, is_alive=False, exit_code=0)
    make_checkpoint(job, 50, reason="final")
    page = page_of(job)
    assert_harmless(page)
    assert "Yes: it has finished" in page.answer("safe")
    assert "epoch-0_step-50" in page.text


def test_a_job_that_runs(job: JobDirectory) -> None:
    """Its account of time lasts until now."""
    shift = time.time() - BEGAN - 100.0
    late = [replace(one, wall=one.wall + shift) for one in CRASHED]
    write_journal(job, late)
    record(job, RunState.RUNNING, is_alive=True, incarnation=2)
    page = page_of(job)
    assert_harmless(page)
    assert "No: there is no checkpoint" in page.answer("safe")
    assert 100.0 <= page.seconds("wall") < 160.0
    assert "still running" in page.one("incarnations").text
    make_checkpoint(job, 30)
    page = page_of(job)
    assert "Yes The newest on the disk is step 30" in page.answer("safe")


def test_a_job_whose_supervisor_was_killed(job: JobDirectory) -> None:
    write_journal(job, [*CRASHED, steps(100, 60)])
    record(job, RunState.RUNNING, is_alive=False)
    make_checkpoint(job, 30)
    page = page_of(job)
    assert_harmless(page)
    assert page.count("failure") == 2
    assert "No: it is not running" in page.answer("safe")
    assert "Rerun the same command: it resumes from step 30." in page.answer("safe")
    assert "run killed" in page.one("f2").text.lower()
    assert page.seconds("lost_work") == pytest.approx(20 + 30, abs=1e-3)


def test_a_script_without_a_supervisor(job: JobDirectory) -> None:
    write_journal(job, [happened(0, "script", {"world_size": 2}), saved(10, 5), saved(20, 10)])
    make_checkpoint(job, 10)
    page = page_of(job)
    assert_harmless(page)
    assert "Not known" in page.answer("lost") and "Not known" in page.answer("cost")
    assert page.count("save") == 2 and page.count("failure") == 0
    assert "there is no account of the time" in page.one("time").text


def test_checkpoints_of_named_sessions_have_a_column(job: JobDirectory) -> None:
    make_checkpoint(job, 30)
    assert ">Session<" not in render(collect(job))
    fold = job.session("fold0")
    fold.prepare()
    make_checkpoint(fold, 40, session="fold0")
    html = render(collect(job))
    assert ">Session<" in html and "<td>fold0</td>" in html


def test_a_bad_checkpoint_is_listed_with_its_reason(job: JobDirectory) -> None:
    write_journal(job, [
        *CRASHED,
        happened(75, "quarantined", {"path": "/a/epoch-0_step-40", "to": "/b/x", "reason": "bits"}),
    ])  # fmt: skip
    record(job, RunState.FINISHED, is_alive=False, exit_code=0)
    bad = make_checkpoint(job, 60)
    (bad / "modeling" / "model.safetensors").unlink()
    make_checkpoint(job, 50)
    set_aside(job, make_checkpoint(job, 45), "looked <odd>")
    page = page_of(job)
    assert_harmless(page)
    assert "Yes; 1 bad one refused" in page.answer("good")
    assert "epoch-0_step-40, bits" in page.answer("good")
    assert "1 of 2 are intact" in page.answer("good")
    assert "looked <odd>" in page.one("checkpoints").text
    assert "model.safetensors" in page.one("checkpoints").text


# -- hostile and long -----------------------------------------------------------------------------

NASTY = "<script>alert(1)</script>\"'`&amp;{{7*7}}{% raw %}\x00\x1b[2J\u202e</style></svg>"
SHOWN = "<script>alert(1)</script>\"'`&amp;{{7*7}}{% raw %}"


def test_every_field_is_escaped(job: JobDirectory) -> None:
    """In the journal, the record and quarantine; as keys, as node names, in lists."""
    data: dict[str, Any] = dict.fromkeys(FIELDS, NASTY)
    numbers = {"step": 7, "epoch": 0, "seconds": 1.0, "total": 2.0, "rank": 1, "exit_code": 70}
    kinds = {"ended": "crashed"}
    entries = []
    for at, name in enumerate(["start", "launch", *EVENTS]):
        if name in ("script", "launch", "end"):
            continue
        fields = data | numbers | {
            "tail": [NASTY], "stacks": {"1": [NASTY]}, "metrics": {NASTY: 1.0, "loss": 2.0},
            "stages": {NASTY: 1.0, "load": 1.0}, "kind": kinds.get(name, NASTY),
        }  # fmt: skip
        entries.append(
            happened(at, name, fields | ({"state": "running"} if name == "state" else {}))
        )
        if name == "start":
            entries.append(launch(at, 1))
    write_journal(job, entries, node="a<b>c")
    record(job, RunState.FAILED, is_alive=False, exit_code=70)
    path = job.node_record("here")
    path.write_text(path.read_text().replace('"gpt"', json.dumps(NASTY)))
    set_aside(job, make_checkpoint(job, 45), NASTY)
    page = page_of(job)
    assert_harmless(page)
    assert page.text.count(SHOWN) > 10
    assert "49" not in page.one("f1").text.split() and "\\x1b[2J\\u202e" in page.text
    assert page.elements[0].tag == "html"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=journals)
def test_any_journal_makes_a_page(job: JobDirectory, entries: list[JournalEntry]) -> None:
    write_journal(
        job, [replace(one, wall=one.wall if math.isfinite(one.wall) else 1.0) for one in entries]
    )
    assert_harmless(page_of(job))


def test_a_job_with_thousands_of_events_makes_a_bounded_page(job: JobDirectory) -> None:
    """Each table lists the newest rows, and their total number."""
    entries = [happened(0, "start")]
    tail = ["x" * 400] * 40
    for number in range(1, 1501):
        at = 100.0 * number
        entries += [
            launch(at, number), loaded(at + 5, number), running(at + 10, number),
            *(steps(at + 10 + each, number + each, loss=1 / number) for each in range(1, 6)),
            saved(at + 20, number + 1), ended(at + 60, "crashed"),
            happened(at + 60, "crash", {"kind": "error", "message": "m" * 900, "tail": tail}),
            happened(at + 61, "recovery", {"total": 3.0, "stages": {"load": 3.0}}),
            happened(at + 62, "notice", {"source": "s" * 70, "reason": "r" * 900, "seconds": 1.0}),
            happened(at + 63, "resize", {"before": 1, "now": 2}),
            happened(at + 64, "quarantined", {"path": "p" * 900, "reason": "w" * 900}),
        ]  # fmt: skip
    write_journal(job, entries)
    page = page_of(job)
    assert_harmless(page)
    assert (page.count("failure"), page.count("save"), page.count("notice")) == (1500, 1500, 1500)
    assert "the newest 150 of 1,500" in page.text


def test_a_long_message_is_cut(job: JobDirectory) -> None:
    """Even one of 60 kB."""
    long = "m" * (MAX_LINE_BYTES - 2000)
    write_journal(job, [*CRASHED[:7], happened(60, "crash", {"kind": "error", "message": long})])
    page = page_of(job)
    assert (
        page.count("failure") == 2 and len(page.html) < 200_000
    )  # the other is the run that was killed


# -- the details ----------------------------------------------------------------------------------


def test_a_night_of_disturbances_is_spread_over_rows(job: JobDirectory) -> None:
    """Twelve in ten hours: each has its label, and labels of a lane do not overlap."""
    entries = [happened(0, "start")]
    for number in range(12):
        at = 3000.0 * number
        entries += [launch(at + 1, number + 1), running(at + 20, 0), ended(at + 2900, "crashed"),
                    happened(at + 2900, "crash", {"kind": "error"})]  # fmt: skip
    write_journal(job, entries)
    from elastic_ckpt.cli.report.timeline import timeline

    found = timeline(material_of(job))
    assert found is not None and 3 <= len(found.rows) <= 12
    marks = [mark for row in found.rows for mark in row.marks if mark.kind == "failure"]
    assert sorted(int(mark.label[1:]) for mark in marks if mark.lane >= 0) == list(range(1, 13))
    for row in found.rows:
        for lane in (0, 1):
            places = [mark.left for mark in row.marks if mark.lane == lane]
            assert all(b - a >= 5 for a, b in pairwise(places))


def test_adjacent_empty_rows_become_one(job: JobDirectory) -> None:
    entries = [*CRASHED[:8], end(61, "failed", 70)]
    again = [replace(one, wall=one.wall + 30 * 86400) for one in entries]
    write_journal(job, [*entries, *again])
    page = page_of(job)
    assert_harmless(page)
    assert page.text.count("nothing ran") == 1


def material_of(job: JobDirectory) -> Material:
    return collect(job)


def test_rounded_seconds_add_up() -> None:
    assert rounded([0.04, 0.04, 0.04], 0.1) == pytest.approx([0.1, 0.0, 0.0])
    shown = rounded([1 / 3, 1 / 3, 1 / 3, 98.0], 0.1)
    assert sum(shown) == pytest.approx(99.0)
    assert all(abs(a - b) <= 0.1 for a, b in zip(shown, [1 / 3] * 3 + [98.0], strict=True))


def test_formats() -> None:
    assert moment(0.0).iso == "1970-01-01T00:00:00.000Z"
    assert [offset(each) for each in (0, 0.25, 30, 75, 3600, 5400, 7 * 86400)] == [
        "0 s", "0.25 s", "30 s", "1 min 15", "1 h", "1 h 30", "7 d",
    ]  # fmt: skip
    assert [figure(each) for each in (0, 2000, 0.002, 3e-7, 1234567, 1e30)] == [
        "0", "2,000", "0.002", "3e-07", "1,234,567", "1e+30",
    ]  # fmt: skip


def test_the_page_is_accessible(job: JobDirectory) -> None:
    """Every category has a row, every table a caption, every drawing a label."""
    write_journal(job, DISTURBED)
    page = page_of(job)
    for category in Category:
        assert page.one(f"time-{category.value}").text.strip()
    tables = [one for one in page.elements if one.tag == "table"]
    captions = [one for one in page.elements if one.tag == "caption"]
    assert len(tables) == len(captions) >= 5
    for one in page.elements:
        if one.tag == "th":
            assert one.attributes.get("scope") in ("col", "row")
        if one.attributes.get("role") == "img":
            named = one.attributes.get("aria-label") or one.attributes.get("aria-labelledby")
            assert named
        if one.attributes.get("role") == "region":
            assert one.attributes.get("tabindex") == "0" and one.attributes.get("aria-label")
    assert page.elements[0].attributes["lang"] == "en"
    assert sum(one.tag == "h1" for one in page.elements) == 1


# -- the command ----------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Call the installed script's ``main`` in an empty directory."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("ELASTIC_CKPT_DIR", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["elastic-ckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main()
        out, err = capfd.readouterr()
        return int(leaving.value.code or 0), out, err

    return call


def test_the_command_prints_the_path(cli: Command, job: JobDirectory) -> None:
    write_journal(job, DISTURBED)
    code, out, err = cli("report", job.root)
    assert (code, err) == (0, "")
    path = Path.cwd() / "report.html"
    assert out == f"wrote {path}\n"
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir() == ["report.html"]


def test_an_existing_page_is_replaced(cli: Command, job: JobDirectory) -> None:
    Path("old.html").write_text("old")
    assert cli("report", job.root, "-o", "old.html")[0] == 0
    assert Path("old.html").read_text().startswith("<!DOCTYPE html>")


def test_the_page_goes_to_standard_output(cli: Command, job: JobDirectory) -> None:
    code, out, err = cli("report", job.root, "--output", "-")
    assert (code, err) == (0, "") and os.listdir() == []
    assert_harmless(parse(out))


@pytest.mark.parametrize("what", ["link", "broken", "fifo", "directory"])
def test_only_regular_files_are_replaced(cli: Command, job: JobDirectory, what: str) -> None:
    place = Path("there.html")
    if what == "fifo":
        os.mkfifo(place)
    elif what == "directory":
        place.mkdir()
    else:
        Path("other").write_text("other")
        place.symlink_to("other" if what == "link" else "nothing")
    before = place.lstat()
    code, out, err = cli("report", job.root, "-o", place)
    assert (code, out) == (73, "") and err.count("\n") == 1 and "there.html" in err
    assert os.path.samestat(before, place.lstat())
    assert what != "link" or Path("other").read_text() == "other"


@pytest.mark.parametrize("place", ["no/such/place.html", "x" * 300])
def test_a_path_that_cannot_be_written_is_one_line_of_error(
    cli: Command, job: JobDirectory, place: str
) -> None:
    code, out, err = cli("report", job.root, "-o", place)
    assert (code, out) == (73, "") and err.count("\n") == 1
    assert "cannot write" in err and ".tmp-" not in err and os.listdir() == []


def test_a_missing_job_directory_is_73(cli: Command, tmp_path: Path) -> None:
    code, out, err = cli("report", tmp_path / "nothing")
    assert (code, out) == (73, "") and err.count("\n") == 1 and os.listdir() == []


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user may enter; pytest's own are private."""
    place = Path(tempfile.mkdtemp())
    place.chmod(stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH)
    yield place
    shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_group_can_report_on_a_job_with_group_access(place: Path) -> None:
    done = as_user(make_job(place, group_access=True), GROUP, "report", "-o", "-")
    assert done.returncode == 0, done.stderr
    page = parse(done.stdout)
    assert page.count("save") == 1 and "epoch-0_step-20" in page.text
