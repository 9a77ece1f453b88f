"""A source that asks again and again, in a thread of its own that nobody ever waits for."""

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
"""In a row, before it is worth a line: a service that restarts misses one or two."""

MAX_BACKOFF_SECONDS: Final = 60.0

MAX_REMEMBERED: Final = 1000
"""Words that were told, the newest; an endless stream of new ones is no reason to grow."""


class PollingSource(NoticeSource):
    """Asks, tells what is new, and backs off while there is no answer.

    Attributes:
        interval_seconds: between an answer and the next question.
    """

    interval_seconds: float = 5.0

    def __init__(self) -> None:
        self._report: Report = lambda word: None
        self._told: dict[object, None] = {}
        self._failures = 0
        self._over = threading.Event()
        self._awake = threading.Event()
        self._settled = threading.Event()

    @abstractmethod
    def ask(self) -> Iterable[tuple[object, SourceEvent]]:
        """Ask once, bounded.

        Returns:
            Every word that stands now, each with a key: the same key is told once, because a
            deadline that is counted from now is never twice the same number.

        Raises:
            Exception: there was no answer, or none that makes sense.
        """

    @property
    def settled(self) -> bool:
        """Whether the first question was answered, or has failed."""
        return self._settled.is_set()

    def start(self, report: Report) -> None:
        """Begin to ask."""
        self._report = report
        threading.Thread(target=self._poll, name=f"notices-{self.name}", daemon=True).start()

    def poll_now(self) -> None:
        """Ask now."""
        self._awake.set()

    def stop(self) -> None:
        """Ask no more; a question that is under way ends by itself, or with the process."""
        self._over.set()
        self._awake.set()

    def _poll(self) -> None:
        while not self._over.is_set():
            wait = self._turn()
            self._settled.set()
            self._awake.wait(wait)
            self._awake.clear()

    def _turn(self) -> float:
        """Ask once; returns the seconds until the next time."""
        try:
            for key, word in self.ask():  # one that is heard counts, whatever the next one is
                self._report_new(key, word)
        # Whatever an answer holds, and whatever is wrong with a source, costs the job a line.
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

    def _report_new(self, key: object, word: SourceEvent) -> None:
        if key in self._told:
            return
        self._told[key] = None
        if len(self._told) > MAX_REMEMBERED:
            del self._told[next(iter(self._told))]
        self._report(word)
