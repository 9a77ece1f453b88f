"""Collects what all notice sources of a run report, and decides when a known limit is due."""

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
"""A deadline further away than this is a limit: there is time to train before it."""

SETTLE_SECONDS: Final = 2.0
"""How long a start waits for the sources' first answers."""


class Listener:
    """Listens to signals and all other sources; times are monotonic seconds."""

    def __init__(
        self,
        signals: SignalSource,
        others: Sequence[NoticeSource],
        journal: Journal,
        wake: Callable[[], None],
    ) -> None:
        """The sources' threads call ``wake``, which ends the supervisor's wait."""
        self._signals = signals
        self._others = others
        self._journal = journal
        self._wake = wake
        self._arrived: deque[SourceEvent] = deque()
        self._limits: dict[tuple[str, str], tuple[TimeLimit, float]] = {}  # and its arrival
        self._noticed = False
        self._started = 0.0

    def start(self, now: float) -> None:
        """Start all sources."""
        self._started = now
        for source in (self._signals, *self._others):
            source.start(self._receive)

    def stop(self, *, hold: bool = False) -> None:
        """Stop all sources; ``hold`` keeps signals for the next listener of this process."""
        for source in self._others:
            source.stop()
        if hold:
            self._signals.hold()
        else:
            self._signals.stop()

    def is_settled(self, now: float) -> bool:
        """Return whether a notice pending at the start would be known by now."""
        waited = now - self._started >= SETTLE_SECONDS
        return waited or all(source.settled for source in self._others)

    @property
    def pending(self) -> bool:
        """Whether a signal or a notice has arrived that was not taken in."""
        return self._signals.pending or self._noticed

    def take_in(self, now: float, lead: Callable[[], float]) -> Iterator[Incoming]:
        """Yield what the supervisor acts on since the last call; journal the rest. The notice of a
        limit is due ``lead`` seconds before it."""
        self._noticed = False
        self._signals.deliver()
        while self._arrived:
            event = self._arrived.popleft()
            log.info("received: %s", event)
            match event:
                case SourceStatus():
                    self._journal.write(NoticeSourceFailed(source=event.source, what=event.what))
                case TimeLimit():
                    self._limits[event.source, event.reason] = event, now
                case EarlyWarning():
                    self._journal.write(WarningReceived(source=event.source, reason=event.reason))
                    yield event
                case StopNow() | Reload():
                    yield event
                case Notice() if event.deadline - now > FAR_SECONDS and may_wait(event):
                    # Azure announces the maintenance of a host days ahead.
                    limit = TimeLimit(event.source, event.reason, event.deadline)
                    self._limits[event.source, event.reason] = limit, now
                    left = f"{event.reason} in {human_duration(event.deadline - now)}"
                    self._journal.write(WarningReceived(source=event.source, reason=left))
                    yield EarlyWarning(event.source, left)
                case Notice():
                    if event.source == self._signals.name:
                        for source in self._others:
                            source.poll_now()
                    yield event
        if self._limits:
            yield from self._due(now, lead())

    def acknowledge(self) -> None:
        """Tell the platforms that wait for it that the node may go."""
        for source in self._others:
            source.acknowledge()

    def _due(self, now: float, lead: float) -> Iterator[Notice]:
        for limit, arrived in list(self._limits.values()):
            # At most half of it, or a short limit would leave no time to train in.
            if limit.deadline - now <= min(lead, (limit.deadline - arrived) / 2):
                del self._limits[limit.source, limit.reason]
                log.info("%s: time for a save, %.1f s left", limit.reason, limit.deadline - now)
                yield Notice(limit.source, limit.reason, limit.deadline)

    def _receive(self, event: SourceEvent) -> None:
        self._arrived.append(event)
        self._noticed = self._noticed or isinstance(event, Notice)
        self._wake()
