"""What the supervisor has heard: all sources of notices of a run, and what was said last."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from elastic_ckpt.journal.events import NoticeSourceFailed, WarningReceived
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices import NoticeSource, SourceEvent
from elastic_ckpt.notices.signals import SignalSource
from elastic_ckpt.policy.deadline import (
    EarlyWarning,
    Incoming,
    Notice,
    Reload,
    SourceStatus,
    StopNow,
    TimeLimit,
    may_wait,
)
from elastic_ckpt.util.units import human_duration

log = logging.getLogger(__name__)

FAR_SECONDS: Final = 900.0
"""A deadline that is further away is a limit, before which there is time to train."""

SETTLE_SECONDS: Final = 2.0
"""How long a start waits for the sources' first answers."""


class Listener:
    """Signals and all other sources; times are monotonic seconds."""

    def __init__(
        self,
        signals: SignalSource,
        others: Sequence[NoticeSource],
        journal: Journal,
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            wake: ends the supervisor's wait; called from the sources' threads.
        """
        self._signals = signals
        self._others = others
        self._journal = journal
        self._wake = wake
        self._words: deque[SourceEvent] = deque()
        self._limits: dict[tuple[str, str], tuple[TimeLimit, float]] = {}  # and when each was heard
        self._noticed = False
        self._started = 0.0

    def start(self, now: float) -> None:
        """Listen from now on."""
        self._started = now
        for source in (self._signals, *self._others):
            source.start(self._hear)

    def stop(self) -> None:
        """Listen no more."""
        for source in (*self._others, self._signals):
            source.stop()

    def is_settled(self, now: float) -> bool:
        """Whether a notice that was pending at the start would be known by now, as far as ever."""
        waited = now - self._started >= SETTLE_SECONDS
        return waited or all(source.settled for source in self._others)

    @property
    def pending(self) -> bool:
        """Whether a signal or a notice has come that was not taken in."""
        return self._signals.pending or self._noticed

    def take_in(self, now: float, lead: Callable[[], float]) -> Iterator[Incoming]:
        """Notices and warnings since the last time; the rest is for the journal.

        Args:
            lead: how many seconds before a limit its notice is due.
        """
        self._noticed = False
        self._signals.deliver()
        while self._words:
            word = self._words.popleft()
            log.info("heard: %s", word)
            match word:
                case SourceStatus():
                    self._journal.write(NoticeSourceFailed(source=word.source, what=word.what))
                case TimeLimit():
                    self._limits[word.source, word.reason] = word, now
                case EarlyWarning():
                    self._journal.write(WarningReceived(source=word.source, reason=word.reason))
                    yield word
                case StopNow() | Reload():
                    yield word
                case Notice() if word.deadline - now > FAR_SECONDS and may_wait(word):
                    # As Azure says days before that a host will be mended.
                    limit = TimeLimit(word.source, word.reason, word.deadline)
                    self._limits[word.source, word.reason] = limit, now
                    left = f"{word.reason} in {human_duration(word.deadline - now)}"
                    self._journal.write(WarningReceived(source=word.source, reason=left))
                    yield EarlyWarning(word.source, left)
                case Notice():
                    if word.source == self._signals.name:
                        self._ask_others()
                    yield word
        if self._limits:
            yield from self._due(now, lead())

    def acknowledge(self) -> None:
        """Let those who wait for it take the node."""
        for source in self._others:
            source.acknowledge()

    def _due(self, now: float, lead: float) -> Iterator[Notice]:
        for limit, heard in list(self._limits.values()):
            # At most half of it, or a short limit would leave no time to train in.
            if limit.deadline - now <= min(lead, (limit.deadline - heard) / 2):
                del self._limits[limit.source, limit.reason]
                log.info("%s: time for a save, %.1f s left", limit.reason, limit.deadline - now)
                yield Notice(limit.source, limit.reason, limit.deadline)

    def _ask_others(self) -> None:
        for source in self._others:
            source.poll_now()

    def _hear(self, word: SourceEvent) -> None:
        self._words.append(word)
        self._noticed = self._noticed or isinstance(word, Notice)
        self._wake()
