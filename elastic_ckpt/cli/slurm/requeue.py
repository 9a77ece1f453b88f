"""Whether to requeue a SLURM job, from the fields of ``scontrol``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

RUN_AGAIN: Final = frozenset({75, 76})

MAX_FRUITLESS: Final = 10
"""Consecutive runs without a checkpoint at which preemptions cannot be the only problem."""

_CLOCK_SECONDS: Final = 2.0
"""Tolerance for SLURM's times, which are whole seconds."""


@dataclass(frozen=True)
class RequeueDecision:
    """Whether to requeue, and one sentence on why.

    Attributes:
        gave_up: SLURM must not requeue it by itself either.
        cancelled: a person has ended it.
    """

    requeue: bool
    why: str
    gave_up: bool = False
    cancelled: bool = False


def decide_requeue(
    code: int,
    job: Mapping[str, str],
    *,
    restarts: int = 0,
    requeue_exit: Collection[int] = (),
    grace: float = 0.0,
    fruitless: int = 0,
) -> RequeueDecision:
    """Decide whether to requeue a job whose step ended with ``code``.

    A preempted job is RUNNING until its grace is over; if preemption cancels jobs, it then looks
    like a cancelled one, but not earlier. A job that SLURM has already requeued has one restart
    more than this run. Any other job that is not RUNNING was cancelled, or reached its time limit.

    Args:
        code: exit code of ``elastic-ckpt run``.
        job: fields of ``scontrol show job``, times in seconds since the epoch.
        restarts: SLURM_RESTART_COUNT of this run.
        requeue_exit: exit codes on which SLURM requeues a job by itself.
        grace: the partition's GraceTime in seconds.
        fruitless: consecutive runs without a checkpoint, including this one.
    """
    state, reason = job.get("JobState", ""), job.get("Reason", "")
    if code not in RUN_AGAIN:
        return RequeueDecision(False, f"exit code {code} does not ask for another run")
    if fruitless >= MAX_FRUITLESS:
        return RequeueDecision(
            False, f"{fruitless} consecutive runs made no checkpoint", gave_up=True
        )
    if int(job.get("Restarts") or 0) > restarts:
        return RequeueDecision(False, "SLURM has already requeued it")
    timed_out = state == "TIMEOUT" or reason == "TimeLimit"
    taken = _seconds(job, "PreemptTime")
    late = _seconds(job, "EndTime") - (taken + grace)
    preempted = taken > 0 and abs(late) <= _CLOCK_SECONDS
    if state != "RUNNING" and not (timed_out or preempted):
        return RequeueDecision(False, f"it was cancelled ({state})", cancelled=True)
    if code in requeue_exit and not preempted:  # a job cancelled by preemption has no exit code
        return RequeueDecision(False, f"SLURM itself requeues it on {code} (RequeueExit)")
    if state == "RUNNING":
        return RequeueDecision(True, f"exit code {code}")
    return RequeueDecision(True, "it reached its time limit" if timed_out else "it was preempted")


def _seconds(job: Mapping[str, str], name: str) -> float:
    """Parse a time; 0 for None and Unknown."""
    text = job.get(name, "")
    return float(text) if text.isdecimal() else 0.0
