"""What the page says and colours: severity, one figure once, legend, axis, market, origin, JSON."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from elastic_ckpt.cli.report.figures import figures
from elastic_ckpt.cli.report.material import collect
from elastic_ckpt.cli.report.origin import without_secrets
from elastic_ckpt.cli.report.timeline import timeline
from elastic_ckpt.cli.report.words import exact
from elastic_ckpt.jobdir.node_record import FailureRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util import versions as versions_module
from elastic_ckpt.util.versions import revision, versions
from scripts.schemas import report_schema
from tests.checkpoints import make_checkpoint
from tests.journals import happened
from tests.unit.cli.report.test_command import (
    BEGAN,
    DISTURBED,
    Page,
    assert_harmless,
    page_of,
    record,
    write_journal,
)
from tests.unit.journal.test_history import (
    CRASHED,
    crash,
    end,
    ended,
    launch,
    loaded,
    running,
    saved,
    steps,
)

pytestmark = pytest.mark.one_torch

SCHEMA = Path(__file__).parents[4] / "docs" / "schemas" / "report.json"
CLEAN = [
    happened(0, "start"), launch(0.5, 1), running(1, 0), steps(2, 10, loss=2.0),
    steps(5, 40, loss=1.0), saved(8, 60, "final"), ended(8.5, "completed"), end(9, "finished", 0),
]  # fmt: skip


def colours(page: Page) -> dict[str, str]:
    """Return the colour of each answer, and of the state."""
    found = {}
    for one in page.elements:
        classes = (one.attributes.get("class") or "").split()
        if "answer" in classes:
            name = (one.attributes["id"] or "").removeprefix("answer-")
            found[name] = " ".join(set(classes) & {"amber", "red"})
        if "pill" in classes:
            found["state"] = " ".join(set(classes) & {"amber", "red"})
    return found


def test_nothing_normal_has_a_colour(job: JobDirectory) -> None:
    write_journal(job, CLEAN)
    record(job, RunState.FINISHED, is_alive=False, exit_code=0)
    make_checkpoint(job, 60, reason="final")
    page = page_of(job)
    assert set(colours(page).values()) == {""} and len(colours(page)) == 6
    body = page.html.partition("</style>")[2]
    assert not re.search(r'class="[^"]*\b(amber|red|good|crashed)\b', body)


def test_lost_time_is_amber_and_data_at_risk_is_red(job: JobDirectory) -> None:
    write_journal(job, [*CRASHED, steps(100, 60)])
    record(job, RunState.RUNNING, is_alive=False)
    make_checkpoint(job, 30)
    found = colours(page_of(job))
    assert found == dict.fromkeys(("lost", "why", "safe", "cost", "state"), "amber") | {"good": ""}
    (job.root / "epoch-0_step-30" / "modeling" / "model.safetensors").unlink()
    found = colours(page_of(job))
    assert (found["safe"], found["state"], found["good"]) == ("red", "red", "red")


def test_a_job_that_has_just_begun_is_not_at_risk(job: JobDirectory) -> None:
    """Its first save is still to come; later, none is a risk."""
    import time

    from msgspec.structs import replace

    from tests.unit.cli.report.test_command import BEGAN

    def begun(seconds: float) -> dict[str, str]:
        shift = time.time() - BEGAN - seconds
        write_journal(job, [replace(one, wall=one.wall + shift) for one in CLEAN[:5]])
        record(job, RunState.RUNNING, is_alive=True, incarnation=1)
        return colours(page_of(job))

    assert begun(30)["safe"] == ""
    assert begun(3000)["safe"] == "red"


def test_a_failed_save_is_red_only_while_it_is_the_last(job: JobDirectory) -> None:
    broken = happened(60, "save_failed", {"step": 50, "reason": "interval", "error": "full"})
    start = [*CRASHED[:5], broken]
    record(job, RunState.RUNNING, is_alive=True, incarnation=1)
    make_checkpoint(job, 30)
    write_journal(job, start)
    assert colours(page_of(job))["good"] == "red" and colours(page_of(job))["safe"] == "red"
    write_journal(job, [*start, saved(70, 60)])
    assert colours(page_of(job))["good"] == "amber"
    assert "1 of 3 saves failed, the last: full." in page_of(job).answer("good")


def measured(page: Page) -> list[str]:
    """Return the durations and shares in the answers, the lead texts and the table of time."""
    parts = [page.answer(name) for name in ("lost", "why", "good", "cost")]
    parts += [" ".join(page.one("time").text.split())]
    parts += [one.text for one in page.elements if one.attributes.get("class") in ("lead", "facts")]
    return re.findall(r"\d[\d.,]* (?:s|min|h|d|%)(?!\w)", re.sub(r"\+\d+ s", "", " ".join(parts)))


def test_no_figure_is_said_twice(job: JobDirectory) -> None:
    write_journal(job, [*DISTURBED, end(154, "preempted", 75)])
    record(job, RunState.PREEMPTED, is_alive=False, exit_code=75)
    make_checkpoint(job, 100, reason="emergency")
    html_desc = re.compile(r"<desc.*?</desc>", re.DOTALL)  # for screen readers, not drawn
    from tests.unit.cli.report.test_command import parse

    page = parse(html_desc.sub("", page_of(job).html))
    found = measured(page)
    assert len(found) >= 6
    assert sorted(found) == sorted(set(found))


def test_the_legend_lists_what_is_drawn(job: JobDirectory) -> None:
    write_journal(job, CLEAN)
    [legend] = [one for one in page_of(job).elements if one.attributes.get("class") == "legend"]
    assert " ".join(legend.text.split()) == "completed training set-up save"
    write_journal(job, [*DISTURBED, end(154, "preempted", 75)])
    [legend] = [one for one in page_of(job).elements if one.attributes.get("class") == "legend"]
    shown = " ".join(legend.text.split())
    assert "failure notice" in shown and "save on a notice" in shown and "lost work" in shown
    for missing in ("warning", "regrouping", "completed", "still running", "waiting", "stall"):
        assert missing not in shown


@pytest.mark.parametrize("began", [0.0, 3595.0, 86_395.0, 86_399.7])
@pytest.mark.parametrize("seconds", [0.4, 9.0, 65.0, 700.0, 4000.0, 100_000.0])
def test_the_axis_fits_the_job(job: JobDirectory, began: float, seconds: float) -> None:
    """Also around midnight, where no round time is near."""
    scale = seconds / 9.0
    entries = [
        happened(began + one.wall * scale, one.name, one.data) for one in CLEAN
    ]  # fmt: skip
    write_journal(job, entries)
    found = timeline(collect(job))
    assert found is not None and len(found.rows) == 1
    assert seconds <= found.period + 1e-3 <= max(2.001, 2.1 * seconds)


def test_a_row_before_the_first_worker_shows_the_set_up(job: JobDirectory) -> None:
    entries = [happened(18, "start")]
    for number in range(1, 5):  # failures enough for two rows
        at = 36.0 + 6 * number
        entries += [launch(at, number), running(at + 1, 0), crash(at + 5), ended(at + 5, "failed")]
    write_journal(job, [*entries, end(68, "failed", 70)])
    found = timeline(collect(job))
    assert found is not None and len(found.rows) > 1
    assert not found.rows[0].idle and [kind for kind, _ in found.rows[0].strips] == ["setup"]


def test_why_a_job_failed_is_shown_with_the_last_lines(job: JobDirectory) -> None:
    write_journal(job, CRASHED)
    tail = ("Traceback", "  raise it", "  ^^^~~^^", "ValueError: shard 17")
    last = FailureRecord(1, "error", "ValueError: shard 17", tail, BEGAN)
    record(job, RunState.RUNNING, is_alive=True, last_failure=last)
    assert "raise it" not in page_of(job).answer("why")
    record(job, RunState.FAILED, is_alive=False, last_failure=last)
    assert page_of(job).answer("why").endswith("Traceback raise it ValueError: shard 17")


def test_a_script_without_a_loss_gets_a_hint(job: JobDirectory) -> None:
    silent = [happened(one.wall, one.name, {k: v for k, v in one.data.items() if k != "metrics"})
              for one in CLEAN]  # fmt: skip
    write_journal(job, silent)
    assert "session.report(loss=loss.item())" in page_of(job).one("hint-loss").text
    write_journal(job, CLEAN)
    assert "hint-loss" not in page_of(job).html


def on_nodes() -> list[JournalEntry]:
    """Three failures on two nodes of four."""
    entries = [happened(0, "start")]
    for number, (node, kind) in enumerate([("node1", "hang"), ("node1", "hang"), ("node3", "x")]):
        at = 100.0 * number
        entries += [
            happened(at + 1, "launch", {"incarnation": number + 1, "nproc": 8, "nodes": 4}),
            loaded(at + 5, 10 * number), running(at + 10, 10 * number),
            saved(at + 40, 10 * number + 10), steps(at + 60, 10 * number + 15),
            ended(at + 60, "crashed"), crash(at + 60, kind, node=node),
        ]  # fmt: skip
    entries += [launch(301, 4), loaded(305, 30), running(310, 30)]
    return entries


def test_failures_are_added_up_by_cause_and_by_node(job: JobDirectory) -> None:
    write_journal(job, on_nodes())
    record(job, RunState.RUNNING, is_alive=True, incarnation=4)
    page = page_of(job)
    assert_harmless(page)
    text = " ".join(page.one("failures").text.split())
    assert "By cause Times Lost steps Lost work Recovery Waiting hang 2 10 " in text
    assert "By node Times Lost steps Lost work Recovery Waiting node1 2 10 " in text
    assert "node3 1 5 " in text and "rank 1 on node1, hang" in text
    found = figures(collect(job))
    by_node = {row.name: row.count for row in found.market if row.by == "node"}
    assert by_node == {"node1": 2, "node3": 1}
    for by in ("cause", "node"):
        rows = [row for row in found.market if row.by == by]
        assert sum(row.lost_seconds for row in rows) == pytest.approx(found.time["lost_work"])


def test_one_failure_needs_no_sums(job: JobDirectory) -> None:
    write_journal(job, CRASHED)
    assert "By cause" not in page_of(job).text


COMMAND = RunCommand(
    ("elastic-ckpt", "run", "--dir", "a b", "--", "t.py", "--api-key", "hunter2", "--token=x"),
    "/home/me", (), {"python": "3.11.7"}, "v1-3-gabc",
)  # fmt: skip


def test_the_page_says_how_the_job_was_run(job: JobDirectory) -> None:
    started = {"version": "0.1.0", "versions": {"elastic-ckpt": "0.1.0", "torch": "2.9"}}
    write_journal(job, [
        happened(0, "start", {**started, "revision": "v1-3-gabc-dirty"}),
        happened(9, "start", {**started, "revision": "v1-3-gabc-dirty"}),
        happened(20, "start", {**started, "revision": "v2"}),
    ])  # fmt: skip
    record(job, RunState.FINISHED, is_alive=False, command=COMMAND)
    page = page_of(job)
    assert_harmless(page)
    text = " ".join(page.one("origin").text.split())
    assert "elastic-ckpt run --dir 'a b' -- t.py --api-key '***' '--token=***'" in text
    assert "/home/me" in text and "here on host" in text and "torch 2.9" in text
    assert text.count("with changes that were not committed") == 1
    assert text.count("git revision v2") == 1 and text.count("since") == 2
    assert "hunter2" not in page.html


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--password p t.py", "--password *** t.py"),
        ("HF_TOKEN=p x", "HF_TOKEN=*** x"),
        ("--secret --lr 3", "--secret --lr 3"),
        ("--keep-last 3 --lr=0.1", "--keep-last 3 --lr=0.1"),
    ],
)
def test_secrets_in_a_command_are_hidden(given: str, shown: str) -> None:
    assert " ".join(without_secrets(given.split())) == shown


def test_copies_are_listed_by_session_and_tier(job: JobDirectory) -> None:
    make_checkpoint(job, 30)
    assert "Where copies are" not in page_of(job).text
    fold = job.session("fold0")
    fold.prepare()
    make_checkpoint(fold, 40, session="fold0")
    failed = {"host": "b", "step": 20, "error": "refused"}
    write_journal(job, [
        happened(0, "start"),
        happened(1, "launch", {"incarnation": 1, "nproc": 1, "nodes": 2}), saved(2, 10),
        happened(3, "replicated", {"host": "b", "step": 10, "bytes": 1000}),
        happened(4, "replica_failed", failed),
    ], node="a")  # fmt: skip
    copied = happened(3, "replicated", {"host": "a", "step": 10, "bytes": 1000, "follows": True})
    write_journal(job, [copied], node="b")
    page = page_of(job)
    assert_harmless(page)
    text = " ".join(page.one("checkpoints").text.split())
    assert "memory of other nodes 10 2 2.0 kB" in text
    assert "1 failed, the last: refused" in text and "fold0 disk 40 1" in text


@pytest.mark.parametrize(
    ("seconds", "whole", "shown"),
    [(6.84, 9, "6.8 s"), (112, 154, "1 min 52.0 s"), (0, 9, "-"), (0.02, 9, "0.02 s"),
     (4500, 9000, "1 h 15 min 0 s"), (197_640, 224_520, "2 d 6 h 54 min"),
     (20, 224_520, "20 s"), (60, 86400, "1 min")],
)  # fmt: skip
def test_durations_that_add_up(seconds: float, whole: float, shown: str) -> None:
    assert exact(seconds, whole) == shown


# -- for programs -----------------------------------------------------------------------------

States = Callable[[JobDirectory], None]


@pytest.mark.parametrize("entries", [[], CLEAN, DISTURBED, on_nodes()], ids=str.__len__ and repr)
def test_json_fits_its_schema(job: JobDirectory, entries: list[JournalEntry]) -> None:
    write_journal(job, entries)
    found: Any = json.loads(msgspec.json.encode(figures(collect(job))))
    jsonschema.validate(found, report_schema())
    assert sum(found["time"].values()) == pytest.approx(found["wall_seconds"])
    assert found["counts"]["failures"] == len(found["failures"])


def test_the_schema_is_written_down() -> None:
    """python scripts/schemas.py docs/schemas/report.json writes it."""
    assert json.loads(SCHEMA.read_text()) == report_schema()
    jsonschema.Draft202012Validator.check_schema(report_schema())


# -- versions ---------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> None:
    command = ("git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words)
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def test_the_revision_of_a_script(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    assert revision(tmp_path) == ""
    git(tree, "init", "-q")
    (tree / "t.py").write_text("1")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "first")
    git(tree, "tag", "v1")
    assert revision.__wrapped__(tree) == "v1"
    (tree / "t.py").write_text("2")
    assert revision.__wrapped__(tree) == "v1-dirty"


def test_a_git_that_is_missing_or_hangs_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(versions_module, "GIT_SECONDS", 0.1)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert revision.__wrapped__(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert revision.__wrapped__(tmp_path) == ""


def test_versions_are_found_without_imports() -> None:
    found = versions()
    assert list(found)[:2] == ["elastic-ckpt", "python"] and "torch" in found
