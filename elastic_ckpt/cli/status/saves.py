"""The past in ``status``: the newest save, the last one on a notice, the last interruption."""

from __future__ import annotations

import msgspec

from elastic_ckpt.journal.history import History


class LastSaveView(msgspec.Struct):
    """The newest save, in seconds; ``error`` is empty unless it failed."""

    reason: str
    predicted_seconds: float | None
    actual_seconds: float
    stall_seconds: float
    error: str = ""


class EmergencySaveView(msgspec.Struct):
    """The last save on a notice: seconds from the notice until it was on the disk.

    ``predicted_seconds`` is None without earlier measurements.
    """

    predicted_seconds: float | None
    actual_seconds: float


class InterruptionView(msgspec.Struct):
    """The last time that training stopped before its end.

    Attributes:
        cause: one of ``Cause``: ``failure``, ``killed``, ``gave up``, ``preemption``,
            ``regrouping``.
        kind: a failure's class, or a preemption's source; may be empty.
        rank: the first that failed; -1 if none did.
        stacks: of a hang, where each rank was, a line for each frame.
    """

    cause: str
    kind: str
    rank: int
    message: str
    age_seconds: float
    stacks: tuple[str, ...]


class AuditView(msgspec.Struct):
    """The last ``replay`` of a part of the job: the steps after ``first`` up to ``last`` on
    ``ranks`` ranks. ``different`` is where the first difference is, and empty for none."""

    first: int
    last: int
    ranks: int
    different: str
    bounds: str
    age_seconds: float


def last_audit(history: History, now: float) -> AuditView | None:
    """Return the newest replay of a job; None without one."""
    if history.audit is None:
        return None
    at, event = history.audit
    return AuditView(
        event.first, event.last, event.ranks, event.different, event.bounds, max(0.0, now - at)
    )


def last_save(history: History) -> LastSaveView | None:
    """Return the newest save of a job; None without one."""
    if not history.saves:
        return None
    save = history.saves[-1]
    error = save.error
    if not error and save.drain_error:
        error = f"in memory only: {save.drain_error}"
    return LastSaveView(
        save.reason, save.predicted_seconds, save.seconds, save.stall_seconds, error
    )


def last_emergency_save(history: History) -> EmergencySaveView | None:
    """Return the newest emergency save of a job; None without one."""
    found = history.last_emergency
    if found is None:
        return None
    return EmergencySaveView(found.predicted_seconds, found.actual_seconds)


def last_interruption(history: History, now: float) -> InterruptionView | None:
    """Return the newest interruption of a job; None without one."""
    if not history.interruptions:
        return None
    last = history.interruptions[-1]
    age = max(0.0, now - last.at)
    return InterruptionView(last.cause.value, last.kind, last.rank, last.message, age, last.stacks)
