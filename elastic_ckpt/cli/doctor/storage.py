"""Test a storage and its speed, in a child process that can be abandoned."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.ownership.read_lock import NO_LOCKS
from elastic_ckpt.cli.doctor.directory import CheckedPath
from elastic_ckpt.cli.doctor.findings import Finding, State, ok, untried
from elastic_ckpt.cli.doctor.platform import Grace
from elastic_ckpt.cli.doctor.storage_trial import (
    CHUNK_BYTES,
    PREFIX,
    ClockSkew,
    TrialDirectory,
    TrialEvent,
    TrialResult,
    TrialStarted,
    WriteProgress,
    WriteSpeed,
    try_storage,
)
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.policy.prediction import FIRST_MARGIN, Predictor, Route, RouteModel
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer, answers
from elastic_ckpt.util.units import human_bytes, human_duration

MAX_BYTES: Final = 256 * 1024 * 1024
FREE_DIVISOR: Final = 4
"""At most this fraction (1/4) of the free space is written."""

MAX_SECONDS: Final = 5.0
TRIAL_SECONDS: Final = 20.0
"""Limit for the whole test, including the writing."""

REMOVAL_SECONDS: Final = 5.0
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""After one of these a test says nothing about what it tests."""

_SKEW_SECONDS: Final = 5.0
_MORE_ROOM: Final = "free some space, or raise the quota: each save would fail"
_ELSEWHERE: Final = "use a directory on another file system"
_FAILURES: Final[Mapping[str, tuple[State, str]]] = {
    "fsync": ("problem", f"{_ELSEWHERE}: saves would fail, or be lost in a power cut"),
    "rename": ("problem", f"{_ELSEWHERE}: sealing a checkpoint needs an atomic rename"),
    "O_EXCL": ("problem", f"{_ELSEWHERE}: two attempts could write to the same file"),
    "O_NOFOLLOW": ("problem", f"{_ELSEWHERE}: a link could redirect a save"),
    "locks": ("problem", f"{_ELSEWHERE}, or fix its locks: two runs could write to the same job"),
    "modes": ("warning", "restrict the mount to users who may read the checkpoints"),
    "writing": ("problem", "fix the storage: saves would fail"),
}  # fmt: skip
"""How serious a failed test is, and what to do."""

_WORKS: Final = {
    "fsync": "works for files and directories",
    "rename": "replaces files, and moves directories",
    "O_EXCL": "refuses an existing name",
    "O_NOFOLLOW": "refuses a link",
    "locks": "work between processes",
    "modes": "files can be private to their owner",
}


def check_storage(path: CheckedPath, grace: Grace, say: Callable[[str], None]) -> Iterator[Finding]:
    """Check each test, the write speed, and whether a save fits into the grace.

    Args:
        say: receives the progress.
    """
    wrote: WriteSpeed | None = None
    trial_directory, doing, began, full = "", "writing", time.monotonic(), set[int]()
    try:
        with answers(lambda: run_trial(path), TrialEvent, TRIAL_SECONDS) as events:
            for event in events:
                if isinstance(event, TrialDirectory):
                    trial_directory = event.path
                elif isinstance(event, TrialStarted):
                    doing, began = event.what, time.monotonic()
                elif isinstance(event, TrialResult):
                    yield from _results(event, full)
                elif isinstance(event, ClockSkew):
                    yield _clock(event)
                elif isinstance(event, WriteSpeed):
                    wrote = event
                else:
                    say(_written(event, time.monotonic() - began))
        trial_directory = ""  # the test removed it
    except WorkFailed as error:
        text = f"{path.tested} is not writable: {error}"
        yield Finding("writing", "problem", text, _todo(str(error)))
    except NoAnswer as error:
        todo = f"check the storage: a save would block as well; {trial_directory} may be left over"
        yield Finding(doing, "problem", str(error), todo)
    finally:
        if trial_directory:
            _remove(Path(trial_directory))
    yield from _speed(path, wrote)
    yield from _fit(path, grace, wrote)


def _todo(error: str) -> str:
    """Return what helps where nothing can be created."""
    if os.strerror(errno.EROFS) in error:
        return "mount it for writing, or choose another directory"
    if any(os.strerror(number) in error for number in FULL):
        return _MORE_ROOM
    return "run as its owner, or choose another directory"


def _written(event: WriteProgress, seconds: float) -> str:
    """Return how far the writing is, which ends after its time or its bytes."""
    done, most = human_bytes(event.bytes), human_bytes(event.max_bytes)
    share = max(event.bytes / event.max_bytes, min(1.0, seconds / MAX_SECONDS), 0.01)
    left = min(seconds / share - seconds, MAX_SECONDS)
    return f"writing: {min(99, int(100 * share))} %, {done} of {most}, {left:.0f} s left"


def run_trial(path: CheckedPath) -> Generator[TrialEvent, None, None]:
    """Test a directory within the limits above; runs in a child process."""
    return try_storage(
        Path(path.tested), min(MAX_BYTES, path.free_bytes // FREE_DIVISOR), MAX_SECONDS
    )


def _remove(directory: Path) -> None:
    """Remove what a killed test left behind; dead storage keeps it."""

    def remove() -> Generator[bool, None, None]:
        if directory.name.startswith(PREFIX):
            remove_tree(directory)
        yield True

    with contextlib.suppress(NoAnswer, WorkFailed):
        answer(remove, bool, REMOVAL_SECONDS)


def _results(event: TrialResult, full: set[int]) -> Iterator[Finding]:
    """Yield the finding of a test; that there is no room is one problem, and none of the tests'."""
    if event.errno not in FULL:
        yield judge(event)
        return
    if not full:
        yield Finding("writing", "problem", event.why, _MORE_ROOM)
    full.add(event.errno)
    if event.what != "writing":
        yield untried(event.what, f"not tried: {event.why}")


def judge(event: TrialResult) -> Finding:
    """Return the finding of a test's result."""
    if not event.why:
        return ok(event.what, _WORKS[event.what])
    if event.what == "locks" and event.errno in NO_LOCKS:
        todo = (
            "mount it with locks (Lustre: flock; NFS: without nolock); otherwise marker files are "
            "used instead, and retention deletes nothing"
        )
        return Finding(event.what, "warning", f"not supported: {event.why}", todo)
    state, todo = _FAILURES[event.what]
    return Finding(event.what, state, event.why, todo)


def _clock(event: ClockSkew) -> Finding:
    seconds = event.seconds
    if abs(seconds) <= _SKEW_SECONDS:
        return ok("file times", "agree with this machine's clock", seconds, "seconds")
    direction = "ahead of" if seconds > 0 else "behind"
    text = f"the storage's clock is {human_duration(abs(seconds))} {direction} this machine's"
    todo = "synchronise both (NTP); until then ages in list and status are off by as much"
    return Finding("file times", "warning", text, todo, seconds, "seconds")


def _speed(path: CheckedPath, wrote: WriteSpeed | None) -> Iterator[Finding]:
    if path.free_bytes // FREE_DIVISOR < CHUNK_BYTES:
        text = f"not measured: only {human_bytes(path.free_bytes)} free"
        yield Finding("write speed", "warning", text, "free some space")
    if wrote is not None:
        rate = wrote.bytes / wrote.seconds
        yield ok(
            "write speed",
            f"{human_bytes(rate)}/s by one writer with fsync ({human_bytes(wrote.bytes)} in "
            f"{human_duration(wrote.seconds)})",
            rate,
            "bytes/s",
        )


def _fit(path: CheckedPath, grace: Grace, wrote: WriteSpeed | None) -> Iterator[Finding]:
    """Check that a save fits into the grace, with the margin of a first prediction."""
    seconds, source = path.saved_seconds, "by the job's own saves"
    if wrote is not None:
        model = RouteModel(wrote.seconds / wrote.bytes, wrote.least_seconds)
        if seconds is None:
            predictor = Predictor({Route.DISK: model})
            outlook = Outlook(grace.seconds, 0.0, path.state_bytes)
            seconds, source = save_seconds(predictor, outlook), "at this speed"
        if not path.state_bytes:
            most = grace.seconds / (FIRST_MARGIN * model.seconds_per_byte)
            text = (
                f"up to {human_bytes(most)} fit into the grace of {human_duration(grace.seconds)}"
                f" at this speed, with a margin of {FIRST_MARGIN}"
            )
            yield ok("emergency save", text, most, "bytes")
    if path.state_bytes and seconds is not None:
        yield _save_duration(path, grace, seconds, source)


def _save_duration(path: CheckedPath, grace: Grace, seconds: float, source: str) -> Finding:
    text = (
        f"of {human_bytes(path.state_bytes)} takes up to {human_duration(seconds)} {source}, and "
        f"the grace is {human_duration(grace.seconds)}"
    )
    if seconds <= grace.seconds:
        return ok("emergency save", text, seconds, "seconds")
    todo = (
        "give --grace if there is more time, use faster storage, or save more often "
        "(--save-interval), since a notice then leaves only the last periodic save"
    )
    return Finding("emergency save", "problem", text, todo, seconds, "seconds")
