"""Follows a job's journal in a thread, so that reading the counts never waits for storage."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import CLOCK_STEP_SECONDS, JournalTail, read_journal
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.supervisor.metrics.counts import JobCounts

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 15.0
"""How often the journal is read without a request, so that a request has little to catch up."""

T = TypeVar("T")


class JournalFollower:
    """The follower of a run's journal, on the node that leads."""

    def __init__(self, job: JobDirectory, node: str) -> None:
        self._job = job
        self._node = node
        self._clocks = time.time() - time.monotonic()
        self._changed = threading.Condition()
        self._history: JobCounts | None = None  # until the journal was read
        self._requested = self._done = 0
        self._over = False
        self._thread = threading.Thread(target=self._run, name="metrics-feed", daemon=True)

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def stop(self) -> None:
        """Stop reading, without waiting for storage that hangs."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def look(self, seconds: float) -> None:
        """Read what is new; wait at most this many seconds for it."""
        if not self._thread.is_alive():
            return  # not started, or failed
        with self._changed:
            self._requested += 1
            mine = self._requested
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= mine or self._over, seconds)

    def read(self, use: Callable[[JobCounts], T]) -> T | None:
        """Return the result of ``use`` on the counts; None until the journal was read: Prometheus
        would take the counts of earlier runs for new events."""
        with self._changed:
            return None if self._history is None else use(self._history)

    @property
    def now(self) -> float:
        """Seconds since the epoch by the monotonic clock, as for this run's events."""
        return time.monotonic() + self._clocks

    def _run(self) -> None:
        try:
            tail = JournalTail(self._job, self._node)
            self._begin(tail)
            while self._wait():
                self._follow(tail)
        except Exception:  # the job must train on
            log.exception("stopped following the journal: its metrics are frozen")

    def _begin(self, tail: JournalTail) -> None:
        history, found = JobCounts(), read_journal(self._job, marks=False)
        # What was written in the meantime is in both.
        fresh = _rest(tail)
        twice = {_identity(event) for event in fresh}
        for event in found:
            if _identity(event) not in twice:
                history.observe(event)
        with self._changed:
            self._history = history
            self._take(fresh)

    def _wait(self) -> bool:
        """Wait for a request or the next turn; return False after ``stop``."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._requested > self._done, IDLE_SECONDS)
            return not self._over

    def _follow(self, tail: JournalTail) -> None:
        with self._changed:
            requested = self._requested
        events = _rest(tail)
        with self._changed:
            self._take(events)
            self._done = requested
            self._changed.notify_all()

    def _take(self, events: list[JournalEntry]) -> None:
        if self._history is None:
            return
        for event in events:
            steady = event.monotonic + self._clocks
            was_set = abs(steady - event.wall) > CLOCK_STEP_SECONDS
            self._history.observe(event, steady if was_set else None)


def _rest(tail: JournalTail) -> list[JournalEntry]:
    """Return all entries up to now."""
    events: list[JournalEntry] = []
    while found := tail.read():
        events += found
    return events


def _identity(event: JournalEntry) -> tuple[str, str, int, int, float]:
    return event.name, event.node, event.pid, event.rank, event.monotonic
