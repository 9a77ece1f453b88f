"""Advises when the next save is due, and what to save on a notice."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from elastic_ckpt.journal.events import EmergencyChosen, SaveIntervalChanged
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.emergency import ChoiceKind, EmergencyChoice
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.supervisor.ports import Clock, DirectoryPort
from elastic_ckpt.supervisor.saves.forecast import SaveForecast, step_seconds
from elastic_ckpt.supervisor.saves.schedule import SaveSchedule
from elastic_ckpt.supervisor.settings import RunSettings

log = logging.getLogger(__name__)

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
        self._chosen: ChoiceKind | None = None

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
        self,
        grace_left: float,
        slots: Iterable[Slot],
        now: float,
        undrained: int | None,
        saving: float | None,
    ) -> EmergencyChoice:
        """Return what to save under a notice, and how long it takes; reads no disk. Journals each
        change of the choice.

        Args:
            undrained: bytes of the newest generation in memory that the disk lacks; None for none.
            saving: how long the ranks have been writing, in seconds; None if they are not.
        """
        outlook = self._forecast.outlook(grace_left, slots, now, undrained, saving)
        choice = self._forecast.noticed(outlook, now)
        if choice.kind is not self._chosen:
            self._chosen = choice.kind
            log.info("%.1f s left, %s: %s", grace_left, choice.kind.value, choice.why)
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
