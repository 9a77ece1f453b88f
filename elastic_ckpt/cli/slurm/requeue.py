"""Whether a SLURM job that has ended is to be queued again; by the fields of ``scontrol``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

RUN_AGAIN: Final = frozenset({75, 76})

MAX_FRUITLESS: Final = 10
"""Runs in a row without a checkpoint: something else is wrong than machines that are taken away."""

_CLOCK_SECONDS: Final = 2.0
"""What SLURM's whole seconds may be apart."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and one sentence on why.

    Attributes:
        gave_up: nobody else must queue it again either.
    """

    requeue: bool
    why: str
    gave_up: bool = False


def judge(
    code: int,
    job: Mapping[str, str],
    *,
    restarts: int = 0,
    requeue_exit: Collection[int] = (),
    grace: float = 0.0,
    fruitless: int = 0,
) -> Verdict:
    """What becomes of a job whose step has ended with ``code``.

    A job that is preempted is RUNNING until its grace is over, and where preemption cancels jobs it
    then ends as one that is cancelled does, but not before. One that SLURM has queued again already
    has one restart more than this run knows of. Anything else that is not RUNNING was ended by
    somebody, unless by its time limit.

    Args:
        code: what ``elastic-ckpt run`` ended with.
        job: fields of ``scontrol show job``, times in seconds since the epoch.
        restarts: SLURM_RESTART_COUNT of this run.
        requeue_exit: exit codes on which SLURM queues a job again by itself.
        grace: the partition's GraceTime in seconds.
        fruitless: runs in a row that have made no checkpoint, this one among them.
    """
    state, reason = job.get("JobState", ""), job.get("Reason", "")
    if code not in RUN_AGAIN:
        return Verdict(False, f"it ended with {code}, which does not ask for another run")
    if fruitless >= MAX_FRUITLESS:
        return Verdict(False, f"{fruitless} runs in a row have made no checkpoint", gave_up=True)
    if int(job.get("Restarts") or 0) > restarts:
        return Verdict(False, "SLURM has queued it again")
    timed_out = state == "TIMEOUT" or reason == "TimeLimit"
    taken = _seconds(job, "PreemptTime")
    late = _seconds(job, "EndTime") - (taken + grace)
    preempted = taken > 0 and abs(late) <= _CLOCK_SECONDS
    if state != "RUNNING" and not (timed_out or preempted):
        return Verdict(False, f"somebody ended it ({state})")
    if code in requeue_exit and not preempted:  # a job that preemption cancels has no exit code
        return Verdict(False, f"SLURM queues it again on {code} (RequeueExit)")
    if state == "RUNNING":
        return Verdict(True, f"it ended with {code}")
    return Verdict(True, "its time limit came" if timed_out else "it was preempted")


def _seconds(job: Mapping[str, str], name: str) -> float:
    """A time; 0 for None and Unknown."""
    text = job.get(name, "")
    return float(text) if text.isdecimal() else 0.0
