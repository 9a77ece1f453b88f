"""When the supervisor asks for saves: at a fixed interval, or at the one that pays."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Final

from elastic_ckpt.journal.events import Saved
from elastic_ckpt.journal.failure_rate import FailureHistory
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.interval import (
    FIRST_INTERVAL,
    SaveInterval,
    estimate_mtbf,
    optimal_interval,
)

_COSTS: Final = 5
"""Number of saves whose median is the cost of one; a single slow save changes nothing."""

_MAX_COST_SECONDS: Final = 86400.0
"""No save takes this long; a journal may hold any number."""


class SaveSchedule:
    """Asks for saves; times are monotonic seconds. For ``auto`` it has the ``optimal`` interval and
    its reason, else None."""

    def __init__(
        self, interval: SaveInterval, mtbf: float, history: Iterable[JournalEntry] = ()
    ) -> None:
        """For ``auto``, begin with the job's journal up to now, and the seconds between failures
        that are expected beforehand."""
        self.optimal = FIRST_INTERVAL if interval.auto else None
        self._seconds = interval.seconds
        self._mtbf = mtbf
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._failures = FailureHistory()
        self._next = math.inf
        for entry in history:
            self._take_in(entry)

    def begin(self, now: float, wall: float) -> None:
        """Start the clock of an incarnation that trains; ``wall`` is ``now`` since the epoch."""
        self._estimate(wall)
        self._arm(now)

    def due(self, now: float) -> bool:
        """Return whether to ask for a save now; true once per interval."""
        if now < self._next:
            return False
        self._arm(now)
        return True

    def learn(self, entry: JournalEntry) -> None:
        """Take in a new event of this node's journal. With ``auto`` any save counts as one that was
        due."""
        if self.optimal is None:
            return
        self._take_in(entry)
        if isinstance(entry.event, Saved):
            self._estimate(entry.wall)
            self._arm(entry.monotonic - entry.event.seconds)

    def _take_in(self, entry: JournalEntry) -> None:
        self._failures.observe(entry)
        cost = entry.event.stall_seconds if isinstance(entry.event, Saved) else None
        if cost is not None and cost <= _MAX_COST_SECONDS:
            self._costs.append(cost)

    def _estimate(self, wall: float) -> None:
        if self.optimal is None or not self._costs:
            return
        trained = self._failures.trained_seconds(wall)
        mtbf = estimate_mtbf(self._mtbf, trained, self._failures.failures)
        current = None if self.optimal is FIRST_INTERVAL else self.optimal.seconds
        self.optimal = optimal_interval(statistics.median(self._costs), mtbf, current)

    def _arm(self, since: float) -> None:
        seconds = self._seconds if self.optimal is None else self.optimal.seconds
        self._next = since + seconds if seconds > 0 else math.inf
