"""What each ending of a worker means for the job, row by row as in docs/endings.md."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.job import SCRIPTS, Job
from tests.marks import slow
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "endings.md"
LAST = 16

pytestmark = pytest.mark.one_torch
"""The last step of the script's Session; it saves every five."""


def ending(directory: Path, what: str, nproc: int = 2) -> Job:
    job = Job(directory, what, str(directory), nproc=nproc, script=SCRIPTS / "endings.py")
    job.options = ["--memory-dir", "off"]
    return job


@dataclass(frozen=True)
class Row:
    """An ending, and what it leads to.

    Attributes:
        saved: the newest checkpoint's step in the end; None for none.
        crashes: (rank, exit code) of each failure, and a part of its message.
    """

    what: str
    code: int = 0
    message: str = "finished"
    saved: int | None = LAST
    crashes: tuple[tuple[int, int, str], ...] = ()
    nproc: int = 2


ROWS: dict[str, Row] = {
    "returns, or `sys.exit(0)`, after its Session": Row("exit-after"),
    "`os._exit(0)` of all ranks after their Sessions": Row("os-exit-after"),
    "`os._exit(0)` of one rank after its Session": Row("os-exit-one-after"),
    "`os._exit(0)` after the last step, inside the Session": Row("os-exit-in-tail"),
    "`sys.exit(0)` of all ranks inside their Sessions": Row("exit-all", saved=8),
    "`sys.exit(0)` of one rank inside its Session": Row(
        "exit-one", crashes=((0, 70, "left its Session with exit code 0 after step 8"),)
    ),
    "`os._exit(0)` inside an open Session": Row(
        "os-exit-one", crashes=((1, 0, "exited with code 0 inside an open Session"),)
    ),
    "code 0 of one rank before its Session, while others wait": Row(
        "exit-before", crashes=((0, 0, "exited with code 0 and closed no Session"),)
    ),
    "an exception that leaves the Session, and that the script catches": Row(
        "swallow", message="finished, but rank 0 left its Session by an exception", saved=5
    ),
    "an exception in a thread": Row("thread"),
    "code 0 without a Session": Row("plain-exit", saved=None),
    "`os._exit(0)` without a Session": Row("plain-os-exit", saved=None),
    "goes into the background (a daemon)": Row(
        "daemon", 64, "a copy of itself in the background", None, ((-1, 64, "foreground"),), 1
    ),
    "`mp.spawn` of processes without a Session": Row("spawn", saved=None, nproc=1),
    "`mp.spawn` of processes with a Session": Row(
        "spawn-session", 70, "let elastic-ckpt start all ranks with --nproc", None,
        ((0, 1, "UsageError"),), 1,
    ),
    "raises after a while, without a Session": Row(
        "fail-once-later", saved=None, crashes=((0, 1, "ConnectionError"),), nproc=1
    ),
}  # fmt: skip

_QUICK = ("os-exit-after", "exit-all", "exit-one", "daemon")


def cases() -> list[Any]:
    return [row if row.what in _QUICK else slow(row) for row in ROWS.values()]


@pytest.mark.parametrize("row", cases(), ids=lambda row: row.what)
def test_each_ending_means_what_the_table_says(tmp_path: Path, row: Row) -> None:
    with ending(tmp_path, row.what, row.nproc) as job:
        assert job.start().wait() == row.code, job.output()
        view = job.view()
        assert row.message in view.message
        assert (view.newest_intact.step if view.newest_intact else None) == row.saved
        crashes = [event["data"] for event in job.events() if event["event"] == "crash"]
        for crash, (rank, exit_code, part) in zip(crashes, row.crashes, strict=True):
            assert (crash["rank"], crash["exit_code"]) == (rank, exit_code)
            assert part in crash["message"]


def test_the_page_has_these_rows() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    others = {
        "a worker", "an uncaught exception, or a code other than 0", "a signal",
        "its own SIGTERM handler saves, and it returns", "a notice after the last step",
    }  # fmt: skip
    found = {row.strip() for row in rows if not row.startswith("-")}
    assert found - others == set(ROWS)


@pytest.mark.parametrize("what", ["exit-within", slow("exit-all")])
def test_script_that_leaves_within_a_step_is_told(tmp_path: Path, what: str) -> None:
    with ending(tmp_path, what, 1) as job:
        assert job.start().wait() == 0, job.output()
        assert ("left within step 8: a later run repeats" in job.output()) is (what != "exit-all")
        assert job.view().newest_intact.step == (8 if what == "exit-all" else 7)


def test_script_with_its_own_handler_that_returns_ends_with_76(tmp_path: Path) -> None:
    with ending(tmp_path, "handle-signal", 1) as job:
        job.start()
        until(lambda: "up" in job.output(), seconds=60)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 76, job.output()
        assert "preempted" in job.view().message


def test_notice_after_the_last_step_loses_nothing(tmp_path: Path) -> None:
    with ending(tmp_path, "evaluate", 1) as job:
        job.start("--grace", "3")
        until(lambda: (tmp_path / "evaluates-0").exists(), seconds=60)
        assert job.view().newest_intact.step == LAST
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 75, job.output()
        (tmp_path / "may-end").touch()
        assert job.start().wait() == 0, job.output()
        assert job.view().newest_intact.step == LAST


def test_directory_of_the_longest_name_works(tmp_path: Path) -> None:
    with ending(tmp_path, "plain-exit", 1) as job:
        job.directory = tmp_path / ("n" * 245)
        assert job.start().wait() == 0, job.output()
