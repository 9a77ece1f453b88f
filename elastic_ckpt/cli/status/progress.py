"""Progress in ``status``: how far, how fast, how much longer, and what is at risk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.checkpoint.memory.generation import SEAL_NAME
from elastic_ckpt.checkpoint.memory.tier import tier_of
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import StepMark
from elastic_ckpt.journal.time_account import TimeAccount
from elastic_ckpt.protocol.slot import Slot

RATE_SECONDS: Final = 300.0
"""The period of the rate, within the current incarnation; it includes saves."""

_MIN_SECONDS: Final = 0.5


class ProgressView(msgspec.Struct):
    """How far the training is; None for what is unknown.

    Attributes:
        step: optimizer steps finished.
        total_steps: optimizer steps of the whole training.
        steps_per_second: over the last five minutes, including saves.
        samples_per_second: of all ranks together.
        seconds_to_end: at the current rate.
    """

    step: int
    total_steps: int | None
    steps_per_second: float | None
    samples_per_second: float | None
    seconds_to_end: float | None


class AtRiskView(msgspec.Struct):
    """The work that would have to be repeated if the node died now: neither the disk nor another
    node's memory has it yet.

    Attributes:
        steps: None if the script restarts its count in each epoch, or if none was seen.
        seconds: of training.
    """

    steps: int | None
    seconds: float


def progress(
    step: int | None,
    slots: Sequence[Slot],
    marks: Sequence[tuple[float, StepMark]],
    *,
    running: bool,
) -> ProgressView | None:
    """Return the progress; None if the step is unknown.

    Args:
        slots: of the ranks whose board can be read here.
        marks: the step marks of the newest incarnation, each with its wall time.
    """
    if step is None:
        return None
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
    epoch: int,
    step: int,
    on_disk: CheckpointView | None,
    account: TimeAccount,
    now: float,
    *,
    copied: tuple[int, int] | None = None,
    copied_at: float = math.inf,
    stepless_since: float = 0.0,
) -> AtRiskView:
    """Return the work that is not in the newest checkpoint that outlives this node.

    Args:
        epoch, step: where the job is.
        now: seconds since the epoch.
        copied: (epoch, step) of the newest one in memory of which each node has a copy elsewhere.
        copied_at: when that one was sealed, if the journal here may not have its save.
        stepless_since: since when the script trains without a step that is seen; 0 if it does not.
    """
    if stepless_since:
        return AtRiskView(None, max(0.0, now - stepless_since))
    on_disk_at = (on_disk.epoch, on_disk.step) if on_disk is not None else None
    safe = max((one for one in (on_disk_at, copied) if one is not None), default=None)
    if safe is None:
        return AtRiskView(step, account.training_since(-math.inf, now))
    moment = account.moment_of(*safe)
    if moment is None and safe == copied and copied_at < now:
        moment = copied_at
    elif moment is None:
        moment = now - (on_disk.age_seconds or 0.0 if on_disk is not None else 0.0)
    ahead = step - safe[1]
    if ahead < 0:  # the count restarted with the epoch, or the board is older than the checkpoint
        same = epoch == safe[0]
        return AtRiskView(0 if same else None, account.training_since(moment, now))
    return AtRiskView(ahead, account.training_since(moment, now) if ahead else 0.0)


def copied_share(
    job: JobDirectory, record: NodeRecord | None, session: str
) -> tuple[tuple[int, int] | None, float]:
    """Return (epoch, step) of the newest save of this incarnation of which another node has a copy
    of this node's share, and when this one sealed that, as its own memory says; for a job in a
    bucket, whose other nodes' journals are not here. A node of an earlier incarnation may be gone.
    """
    if record is None or not record.bucket:
        return None, math.inf
    tier = tier_of(job, record.memory)
    now = (session, record.incarnation)
    for one in tier.sealed() if tier else ():
        is_now = (one.seal.session, one.seal.incarnation) == now
        if is_now and one.generation.is_copied(one.seal):
            with contextlib.suppress(OSError):
                return one.key, (one.generation.slot / SEAL_NAME).lstat().st_mtime
    return None, math.inf


def at_risk_of_own(
    record: NodeRecord | None,
    on_disk: CheckpointView | None,
    account: TimeAccount,
    now: float | None,
) -> AtRiskView | None:
    """Return what is at risk where the script saves by itself, and shows no steps; else None."""
    if record is None or not record.saves_itself or now is None:
        return None
    changed = on_disk.own.changed / 1e9 if on_disk and on_disk.own else -math.inf
    return AtRiskView(None, account.training_since(changed, now))


def _rate(slots: Sequence[Slot], marks: Sequence[tuple[float, StepMark]]) -> float | None:
    now = time.time()
    recent = [(wall, mark.step) for wall, mark in marks if now - wall < RATE_SECONDS]
    if recent:
        steps = [slot.shown_step for slot in slots if slot.attached]
        newest = (now, min(steps)) if steps else recent[-1]
        seconds, done = newest[0] - recent[0][0], newest[1] - recent[0][1]
        if seconds > _MIN_SECONDS and done > 0:
            return done / seconds
    step_ns = max((slot.step_ns for slot in slots), default=0)
    return 1e9 / step_ns if step_ns else None
