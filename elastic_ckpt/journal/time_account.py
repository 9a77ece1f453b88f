"""Where a job's time went: every second since its first start belongs to one category.

The journal is folded into consecutive spans. Training becomes lost work when a later incarnation
resumes from an older checkpoint; until one does, training after the newest save counts as lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import msgspec

from elastic_ckpt.journal.events import (
    CheckpointLoaded,
    Crashed,
    IncarnationEnded,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailure,
    StartHeld,
    StateChanged,
    StepMark,
    WorkersLaunched,
)
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.node_events import WaitingForNodes
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.run_state import RunState


class Category(Enum):
    """What a second was spent on; the values are the words of status, metrics and the report."""

    TRAINING = "training"  # steps that still count
    STALL = "stall"  # training stood still for a save
    LOST_WORK = "lost_work"  # steps that a failure threw away
    RECOVERY = "recovery"  # from a failure or a stop to the next first step, while a run lasts
    WAITING = "waiting"  # no run, or too few nodes
    SETUP = "setup"  # before the first step of the job, and after its last one


@dataclass(frozen=True)
class Span:
    """A stretch of the job's time, in seconds since the epoch."""

    category: Category
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.ended - self.began


class Goodput(msgspec.Struct, frozen=True, rename=lambda name: name.removesuffix("_seconds")):
    """Seconds since the job's first start by category; they add up to ``wall``."""

    wall_seconds: float
    training_seconds: float
    stall_seconds: float
    lost_work_seconds: float
    recovery_seconds: float
    waiting_seconds: float
    setup_seconds: float

    @property
    def fraction(self) -> float | None:
        """Training time over wall time; None before the first start."""
        return self.training_seconds / self.wall_seconds if self.wall_seconds > 0 else None

    def seconds(self, category: Category) -> float:
        """Return those of one category."""
        found: float = getattr(self, f"{category.value}_seconds")
        return found


_LEFT_WELL: Final = (EndKind.COMPLETED.value, EndKind.STOPPED.value, EndKind.NOT_BEGUN.value)
"""How an incarnation ends whose ranks left by themselves."""


SUPERVISED: Final = (
    RunStarted, WorkersLaunched, StateChanged, StepMark, IncarnationEnded, Crashed, RunEnded
)  # fmt: skip
"""What a supervisor writes. Where the time of a script without one went is unknown."""


class TimeAccount:
    """Folds a job's journal, entry by entry, in order of time."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._category = Category.SETUP
        self._since: float | None = None  # the open span's start
        self._last = 0.0  # the newest entry
        self._saves: dict[tuple[int, int], float] = {}  # (epoch, step): when its state was taken
        self._saved_at = -math.inf  # a restart from the newest loses nothing before this
        # As above, of the checkpoint that this incarnation resumed from.
        self._loaded: float | None = None
        self._trained = False
        self._unsettled = False  # an incarnation failed, and the next has not trained yet
        self._running = False  # the newest run has not ended, as far as the journal shows

    def observe(self, entry: JournalEntry) -> None:
        """Take the next entry into account, unless a node wrote it that does not lead."""
        wall, event = entry.wall, entry.event
        if event.follows or (self._since is None and not isinstance(event, SUPERVISED)):
            return
        self._since = wall if self._since is None else self._since
        match event:
            case RunStarted():
                self._start(wall)
            case WorkersLaunched():
                self._loaded = None
                if self._category is Category.WAITING:
                    self._turn_to(self._restart, wall)
            case CheckpointLoaded():
                key = event.epoch or 0, -1 if event.step is None else event.step
                self._loaded = self._saves.get(key, self._saved_at)
            case StateChanged(state=RunState.RUNNING.value):
                self._train(wall, event.step)
            case StepMark() if not (self._running or self._trained):
                # The journal starts in the middle of this incarnation.
                self._turn_to(Category.TRAINING, wall)
                self._trained = self._running = True
            case Saved() | SaveFailure():
                self._stand_still(wall, event)
            case WaitingForNodes() | StartHeld():
                self._turn_to(Category.WAITING, wall)
            case IncarnationEnded() | Crashed():
                self._stop(wall, event.kind)
            case RunEnded():
                self._stop(wall, "")
                self._turn_to(Category.WAITING, wall)
                self._running = False
        self._last = max(self._last, wall)

    def spans(self, now: float | None = None) -> list[Span]:
        """Return all spans, in order, without gaps.

        Args:
            now: seconds since the epoch if the job runs; None if its last entry is its end.
        """
        spans = list(self._spans)
        end = self._last if now is None else max(now, self._last)
        if self._since is not None and end > self._since:
            spans.append(Span(self._category, self._since, end))
        killed = self._running and now is None
        return list(_lost_from(spans, self._saved_at)) if self._unsettled or killed else spans

    def goodput(self, now: float | None = None) -> Goodput:
        """Return the seconds of each category; ``now`` as for :meth:`spans`."""
        return total(self.spans(now))

    def moment_of(self, epoch: int, step: int) -> float | None:
        """Return when a checkpoint's state was taken; None if its save is not in the journal."""
        return self._saves.get((epoch, step))

    def training_since(self, moment: float, now: float | None) -> float:
        """Return the seconds of training after ``moment``; ``now`` as for :meth:`spans`."""
        return sum(
            max(0.0, span.ended - max(span.began, moment))
            for span in self.spans(now)
            if span.category is Category.TRAINING
        )

    @property
    def _restart(self) -> Category:
        return Category.RECOVERY if self._trained else Category.SETUP

    def _turn_to(self, category: Category, wall: float) -> None:
        """End the open span at ``wall``, and start one of another category."""
        since = wall if self._since is None else self._since
        if wall > since:
            self._spans.append(Span(self._category, since, wall))
        self._since = max(since, wall)
        self._category = category

    def _start(self, wall: float) -> None:
        """Start a run. If the last one has no end, it was killed after its last entry."""
        if self._running:
            self._unsettled |= self._category is Category.TRAINING
            self._turn_to(Category.WAITING, self._last)
        self._turn_to(self._restart, wall)
        self._running = True

    def _train(self, wall: float, step: int | None) -> None:
        """Start the first step of an incarnation: training after its checkpoint is lost."""
        since = self._saved_at if self._loaded is None else self._loaded
        if self._loaded is None and step == 0:
            since = -math.inf  # from the start
        self._turn_to(Category.TRAINING, wall)
        keep = len(self._spans)
        while keep and self._spans[keep - 1].ended > since:
            keep -= 1
        self._spans[keep:] = list(_lost_from(self._spans[keep:], since))
        self._saved_at = since
        self._trained, self._unsettled = True, False

    def _stand_still(self, wall: float, event: Saved | SaveFailure) -> None:
        """End a save, for which training stood still."""
        if self._category is Category.TRAINING and self._since is not None:
            self._turn_to(Category.STALL, max(self._since, wall - (event.stall_seconds or 0.0)))
            self._turn_to(Category.TRAINING, wall)
        if isinstance(event, Saved):
            # A device may copy during the next step, which the checkpoint does not hold.
            moment = wall - event.seconds
            self._saves[event.epoch, event.step] = moment
            self._saved_at = max(self._saved_at, moment)

    def _stop(self, wall: float, kind: str) -> None:
        if self._category is Category.TRAINING:
            self._unsettled = kind not in _LEFT_WELL
        if kind == EndKind.STOPPED.value:  # nothing was trained since its last save
            self._category = Category.RECOVERY
        if kind == EndKind.COMPLETED.value:
            self._turn_to(Category.SETUP, wall)
        elif self._category is Category.TRAINING:
            self._turn_to(Category.RECOVERY, wall)


def _lost_from(spans: Iterable[Span], moment: float) -> Iterator[Span]:
    """Yield the same time, with training after ``moment`` as lost work."""
    for span in spans:
        if span.category is not Category.TRAINING or span.ended <= moment:
            yield span
            continue
        if span.began < moment:
            yield replace(span, ended=moment)
        yield Span(Category.LOST_WORK, max(span.began, moment), span.ended)


def total(spans: Iterable[Span]) -> Goodput:
    """Return the seconds of each category."""
    seconds = dict.fromkeys(Category, 0.0)
    for span in spans:
        seconds[span.category] += span.seconds
    named = {f"{category.value}_seconds": value for category, value in seconds.items()}
    return Goodput(wall_seconds=sum(seconds.values()), **named)
