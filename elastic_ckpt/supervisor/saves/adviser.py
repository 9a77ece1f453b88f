"""Advises when the next save is due, and what to save on a notice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from elastic_ckpt.journal.events import EmergencyChosen, Saved, SaveFailure, SaveIntervalChanged
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.emergency import ChoiceKind, EmergencyChoice
from elastic_ckpt.policy.interval import OptimalInterval, SaveInterval
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
    """Advises one run. Times are monotonic seconds. ``failed``: why the last save failed, or ""."""

    def __init__(
        self, settings: RunSettings, clock: Clock, directory: DirectoryPort, journal: Journal
    ) -> None:
        """Start from what earlier runs learned; call it before this run's first event."""
        self._clock = clock
        self._directory = directory
        self._journal = journal
        self._wanted = False
        self._shown: OptimalInterval | None = None
        self._schedule = self._make_schedule(settings)
        self._forecast = SaveForecast(directory, journal, uploads=bool(settings.own_bucket))
        self._chosen: ChoiceKind | None = None
        self.failed = ""

    @property
    def optimal_interval(self) -> OptimalInterval | None:
        """The automatic interval and its reason; None if the user or the script gave one."""
        return self._schedule.optimal if self._wanted or not self._if_wanted else None

    def _make_schedule(self, settings: RunSettings) -> SaveSchedule:
        self._if_wanted = not settings.interval.is_given
        interval = SaveInterval(auto=True) if self._if_wanted else settings.interval
        history = self._directory.history() if interval.auto else ()
        return SaveSchedule(interval, settings.mtbf, history)

    def change(self, settings: RunSettings, now: float) -> None:
        """Use another interval from now on."""
        self._schedule = self._make_schedule(settings)
        self.begin(now)

    def begin(self, now: float) -> None:
        """Note that an incarnation has started to train."""
        before = self.optimal_interval
        self._take_in()
        self._schedule.begin(now, self._clock.wall())
        self._journal_change(before)

    def due(self, now: float, read_slots: Callable[[], Iterable[Slot]]) -> bool:
        """Return whether to ask for a save now; true once per interval. Without an interval of the
        user's, only if the script has none of its own."""
        if self._if_wanted:
            self._wanted = any(slot.wants_saves for slot in read_slots())
        return (self._wanted or not self._if_wanted) and self._schedule.due(now)

    def learn(self) -> bool:
        """Take in what the workers have journaled; return whether the interval changed."""
        before = self._shown
        self._take_in()
        self._journal_change(before)
        self._shown = self.optimal_interval
        return self._shown != before

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

    def hand_over_seconds(self, nodes: int, grace: float) -> float:
        """Return how long one of ``nodes`` nodes, which leaves, is held up at most if others keep
        what it has in memory; 0 if a save to the disk is better."""
        choice = self._forecast.of_a_node_that_leaves(nodes, grace)
        return choice.predicted_seconds or 0.0 if choice.kind is ChoiceKind.PEER else 0.0

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
            match event.event:
                case SaveFailure(error=error):
                    self.failed = error
                case Saved():
                    self.failed = ""
            self._forecast.learn(event)
            self._schedule.learn(event)
        self._forecast.keep()

    def _journal_change(self, before: OptimalInterval | None) -> None:
        after = self.optimal_interval
        if before is not None and after is not None and after.seconds != before.seconds:
            self._journal.write(SaveIntervalChanged(seconds=after.seconds, why=after.why))
