"""A job has a bad night: what its owner asks in the morning, status and the report answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.journal.time_account import Category
from scripts.night.run import Night

CRASHES = 6  # SIGKILL to a rank twice, to the agent; a NaN, an exception, a hang
NOTICES = 5
LOST_RUNS = 1  # its supervisor was killed


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    night = Night(tmp_path_factory.mktemp("night"), steps_between=30)
    try:
        night.pass_by()
        night.leave()
        yield night
    finally:
        night.close()


def command(night: Night, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *arguments, str(night.directory)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_status_after_the_night(night: Night) -> None:
    view = night.view()
    assert (view.state, view.exit_code, view.warnings) == ("preempted", 1, [])
    assert "resumes from step" in view.advice
    assert (view.restarts.failures, view.restarts.preemptions) == (CRASHES, NOTICES + 1)
    # Is it safe now? Was the checkpoint good?
    assert view.newest_intact is not None and view.position is not None
    assert view.newest_intact.step == view.position.step and view.newest_intact.tier == "disk"
    [rejected] = view.rejected
    assert "does not match its checksum" in rejected.reason
    # What was lost, why, and what did it cost?
    assert 0 < view.lost_work_seconds == view.time.lost_work_seconds < view.time.wall_seconds
    assert view.last_failure is not None and view.last_failure.kind == "signal"
    assert (
        view.last_recovery is not None
        and view.last_recovery.total_seconds < view.time.recovery_seconds
    )
    page = " ".join(command(night, "status", "-v").split())
    for words in (
        "preempted", f"resumes from step {view.position.step}", "newest intact",
        f"{CRASHES} after failures", f"{NOTICES + 1} after preemptions", "lost work", "recovery",
        "does not match its checksum", "rank 0, signal", "killed by SIGKILL",
    ):  # fmt: skip
        assert words in page, words


@pytest.mark.timeout(600)
def test_every_second_is_accounted_for(night: Night) -> None:
    events = read_journal(JobDirectory.at(night.directory))
    found = History.of(events).account.goodput()
    spent = {one: found.seconds(one) for one in Category}
    assert sum(spent.values()) == pytest.approx(found.wall_seconds)
    assert found.wall_seconds == pytest.approx(events[-1].wall - events[0].wall, abs=0.01)
    assert min(spent.values()) > 0, spent
    # The hang alone lost what it waited for.
    assert found.lost_work_seconds > 4.0


@pytest.mark.timeout(600)
def test_report_after_the_night(night: Night, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    command(night, "report", "-o", str(file))
    page = file.read_text()
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    view = night.view()
    assert view.position is not None and view.goodput is not None
    goodput = f"{100 * view.goodput:.1f} %"
    for question in (
        "What was lost?", "Why?", "Is it safe now?", "Was the checkpoint good?",
        "What did it cost?",
    ):  # fmt: skip
        assert question in text, question
    for answer in (
        f"{CRASHES + LOST_RUNS} failures and {NOTICES + 1} preemptions",
        "NonFiniteLoss", "an illegal memory access was encountered", "Hang",
        "the run ended without a word", "SIGUSR1", f"step {view.position.step}",
        "1 bad one refused", "does not match its checksum", goodput,
    ):  # fmt: skip
        assert answer in text, answer
