"""A source that polls in a thread of its own, which the supervisor never waits for."""

from __future__ import annotations

import random
import threading
from abc import abstractmethod
from collections.abc import Iterable
from typing import Final

from elastic_ckpt.notices import NoticeSource, Report, SourceEvent
from elastic_ckpt.policy.deadline import SourceStatus
from elastic_ckpt.util.text import printable

FAILURES: Final = 3
"""Consecutive failed polls before a warning: a service that restarts misses one or two."""

MAX_BACKOFF_SECONDS: Final = 60.0

MAX_REMEMBERED: Final = 1000
"""Reported events that are remembered, the newest: an endless stream of new ones must not grow."""


class PollingSource(NoticeSource):
    """Polls, reports what is new, and backs off while polls fail.

    Attributes:
        interval_seconds: between the end of a poll and the next one.
    """

    interval_seconds: float = 5.0

    def __init__(self) -> None:
        self._report: Report = lambda event: None
        self._reported: dict[object, None] = {}
        self._failures = 0
        self._over = threading.Event()
        self._awake = threading.Event()
        self._settled = threading.Event()

    @abstractmethod
    def poll(self) -> Iterable[tuple[object, SourceEvent]]:
        """Poll once, for a bounded time. Called in the source's thread.

        Returns:
            All current events, each with a key. Only the first event with a key is reported: a
            deadline that is computed from the current time differs at each poll.

        Raises:
            Exception: the poll failed, or its result makes no sense. It is retried later.
        """

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    def start(self, report: Report) -> None:
        self._report = report
        threading.Thread(target=self._run, name=f"notices-{self.name}", daemon=True).start()

    def poll_now(self) -> None:
        self._awake.set()

    def stop(self) -> None:
        """Stop after the current poll, which ends by itself or with the process."""
        self._over.set()
        self._awake.set()

    def forget(self) -> None:
        """Report events again whose keys were reported before."""
        self._reported.clear()

    def _run(self) -> None:
        while not self._over.is_set():
            wait = self._turn()
            self._settled.set()
            self._awake.wait(wait)
            self._awake.clear()

    def _turn(self) -> float:
        """Poll once, and return the seconds until the next poll."""
        try:
            for key, event in self.poll():  # report each at once: the next one may raise
                self._report_new(key, event)
        # A source may fail in any way; that must not affect the job.
        except Exception as error:
            self._failures += 1
            if self._failures == FAILURES:
                why = printable(str(error) or type(error).__name__, 200)
                self._report(SourceStatus(self.name, f"does not answer: {why}"))
            backoff = self.interval_seconds * 2.0 ** min(self._failures, 10)
            return min(backoff, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
        if self._failures >= FAILURES:
            self._report(SourceStatus(self.name, "answers again"))
        self._failures = 0
        return self.interval_seconds

    def _report_new(self, key: object, event: SourceEvent) -> None:
        if key in self._reported:
            return
        self._reported[key] = None
        if len(self._reported) > MAX_REMEMBERED:
            del self._reported[next(iter(self._reported))]
        self._report(event)
