"""What ``status`` shows of the way: how far, how fast, how long still, and what is at risk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.journal.events import StepMark, WorkersLaunched
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.time_account import Category, Goodput, TimeAccount
from elastic_ckpt.protocol.slot import Slot

RATE_SECONDS: Final = 300.0
"""The rate is that of the last minutes, of the incarnation that runs, saves included."""

_LEAST_SECONDS: Final = 0.5


class ProgressView(msgspec.Struct):
    """How far the training is; None for what nobody knows.

    Attributes:
        step: optimizer steps finished.
        total_steps: at which the script will be done.
        steps_per_second: over the last minutes, with saves.
        samples_per_second: of all ranks together.
        seconds_to_end: at that rate.
    """

    step: int
    total_steps: int | None
    steps_per_second: float | None
    samples_per_second: float | None
    seconds_to_end: float | None


class AtRiskView(msgspec.Struct):
    """What would have to be done again if the node died now: what the disk does not hold yet.

    Attributes:
        steps: None where the script counts them anew in each epoch.
        seconds: of training.
    """

    steps: int | None
    seconds: float


class TimeView(msgspec.Struct):
    """Seconds since the job's first start by what they were spent on; they add up to ``wall``."""

    wall: float
    training: float
    stall: float
    lost_work: float
    recovery: float
    waiting: float
    setup: float


def time_view(found: Goodput) -> TimeView:
    """The same, with the words that the JSON has."""
    seconds = {one.value: found.seconds(one) for one in Category}
    return TimeView(wall=found.wall_seconds, **seconds)


def progress(
    step: int | None, slots: Sequence[Slot], events: Sequence[JournalEntry], *, running: bool
) -> ProgressView | None:
    """How far and how fast.

    Args:
        step: where the job is; None if nobody knows.
        slots: of the ranks that can be seen here.
        events: the journal.
    """
    if step is None:
        return None
    marks = _marks(events)
    last = marks[-1][1] if marks else None
    per_step = max((slot.samples_per_step for slot in slots), default=0)
    per_step = per_step or (last.samples_per_step if last else 0)
    total = max((slot.total_steps for slot in slots), default=0)
    total = total or (last.total_steps if last else 0)
    rate = _rate(slots, marks) if running else None
    return ProgressView(
        step=step,
        total_steps=total if total >= step and total else None,
        steps_per_second=rate,
        samples_per_second=rate * per_step if rate and per_step else None,
        seconds_to_end=(total - step) / rate if rate and total >= step else None,
    )


def at_risk(
    epoch: int, step: int, on_disk: CheckpointView | None, account: TimeAccount, now: float
) -> AtRiskView:
    """What the newest checkpoint on the disk does not hold.

    Args:
        epoch, step: where the job is.
        now: seconds since the epoch.
    """
    if on_disk is None:
        return AtRiskView(step, account.training_since(-math.inf, now))
    moment = account.moment_of(on_disk.epoch, on_disk.step)
    if moment is None:
        moment = now - (on_disk.age_seconds or 0.0)
    ahead = step - on_disk.step
    if ahead < 0:  # counted anew in each epoch, or the checkpoint is newer than what we saw
        same = epoch == on_disk.epoch
        return AtRiskView(0 if same else None, account.training_since(moment, now))
    return AtRiskView(ahead, account.training_since(moment, now) if ahead else 0.0)


def _marks(entries: Iterable[JournalEntry]) -> list[tuple[float, StepMark]]:
    """The step marks of the newest incarnation, and when each was written."""
    found: list[tuple[float, StepMark]] = []
    for entry in entries:
        match entry.event:
            case WorkersLaunched():
                found.clear()
            case StepMark(follows=False) as mark:
                found.append((entry.wall, mark))
    return found


def _rate(slots: Sequence[Slot], marks: Sequence[tuple[float, StepMark]]) -> float | None:
    now = time.time()
    recent = [(wall, mark.step) for wall, mark in marks if now - wall < RATE_SECONDS]
    if recent:
        steps = [slot.shown_step for slot in slots if slot.attached]
        newest = (now, min(steps)) if steps else recent[-1]
        seconds, done = newest[0] - recent[0][0], newest[1] - recent[0][1]
        if seconds > _LEAST_SECONDS and done > 0:
            return done / seconds
    step_ns = max((slot.step_ns for slot in slots), default=0)
    return 1e9 / step_ns if step_ns else None
