"""Advises when the next save is due, and what to save on a notice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.journal.events import EmergencyChosen, SaveIntervalChanged
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.emergency import EmergencyChoice
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.supervisor.ports import Clock, DirectoryPort
from elastic_ckpt.supervisor.saves.forecast import SaveForecast, step_seconds
from elastic_ckpt.supervisor.saves.schedule import SaveSchedule
from elastic_ckpt.supervisor.settings import RunSettings

LEAD_SECONDS: Final = 10.0
"""Time for the processes to end, and for clocks that differ."""

UNKNOWN_LEAD_SECONDS: Final = 60.0
"""The lead where no save has been measured yet."""


class SaveAdviser:
    """Advises one run. Times are monotonic seconds."""

    def __init__(
        self, settings: RunSettings, clock: Clock, directory: DirectoryPort, journal: Journal
    ) -> None:
        """Start from what earlier runs learned; call it before this run's first event."""
        self._clock = clock
        self._directory = directory
        self._journal = journal
        history = directory.history() if settings.interval.auto else ()
        self._schedule = SaveSchedule(settings.interval, settings.mtbf, history)
        self._forecast = SaveForecast(directory, journal)

    @property
    def optimal_interval(self) -> OptimalInterval | None:
        """The interval of ``--save-interval auto`` and its reason; None if it was given."""
        return self._schedule.optimal

    def change(self, settings: RunSettings, now: float) -> None:
        """Use another interval from now on."""
        history = self._directory.history() if settings.interval.auto else ()
        self._schedule = SaveSchedule(settings.interval, settings.mtbf, history)
        self.begin(now)

    def begin(self, now: float) -> None:
        """Note that an incarnation has started to train."""
        before = self._schedule.optimal
        self._take_in()
        self._schedule.begin(now, self._clock.wall())
        self._journal_change(before)

    def due(self, now: float) -> bool:
        """Return whether to ask for a save now; true once per interval."""
        return self._schedule.due(now)

    def learn(self) -> bool:
        """Take in what the workers have journaled; return whether the interval changed."""
        before = self._schedule.optimal
        self._take_in()
        self._journal_change(before)
        return self._schedule.optimal != before

    def noticed(
        self, grace_left: float, slots: Iterable[Slot], now: float, kept: Sealed | None
    ) -> EmergencyChoice:
        """Return what to save on a notice, and how long it takes; reads no disk. The disk lacks
        ``kept``, the newest generation in memory."""
        undrained = kept.seal.total_bytes if kept else None
        outlook = self._forecast.outlook(grace_left, slots, now, undrained)
        choice = self._forecast.noticed(outlook, now)
        self._journal.note(
            EmergencyChosen(
                kind=choice.kind.value,
                predicted_seconds=choice.predicted_seconds,
                seconds_left=grace_left,
                why=choice.why,
            )
        )
        return choice

    def lead_seconds(self, slots: Iterable[Slot]) -> float:
        """Return how long before a known end a node gets its notice: a step and twice the worst
        save, as to leave a little early costs less than a save."""
        save = self._forecast.seconds()
        step = max((step_seconds(slot) for slot in slots), default=0.0)
        return UNKNOWN_LEAD_SECONDS if save is None else LEAD_SECONDS + step + 2 * save

    def close(self) -> None:
        """Take in the last events, such as that of an emergency save."""
        self._take_in()

    def _take_in(self) -> None:
        for event in self._directory.events():
            self._forecast.learn(event)
            self._schedule.learn(event)
        self._forecast.keep()

    def _journal_change(self, before: OptimalInterval | None) -> None:
        after = self._schedule.optimal
        if before is not None and after is not None and after.seconds != before.seconds:
            self._journal.write(SaveIntervalChanged(seconds=after.seconds, why=after.why))
