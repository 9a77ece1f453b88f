"""Whether a SLURM job that has ended is to be queued again; by the fields of ``scontrol``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

RUN_AGAIN: Final = frozenset({75, 76})


@dataclass(frozen=True)
class Verdict:
    """What to do, and one sentence on why."""

    requeue: bool
    why: str


def judge(
    code: int, job: Mapping[str, str], restarts: int, requeue_exit: Collection[int]
) -> Verdict:
    """What becomes of a job whose step has ended with ``code``.

    A job that is preempted is RUNNING until its grace is over. One that SLURM has queued again
    already has one restart more than this run knows of. Anything else that is not RUNNING was ended
    by somebody, unless by its time limit.

    Args:
        code: what ``elastic-ckpt run`` ended with.
        job: fields of ``scontrol show job``.
        restarts: SLURM_RESTART_COUNT of this run.
        requeue_exit: exit codes on which SLURM queues a job again by itself.
    """
    state, reason = job.get("JobState", ""), job.get("Reason", "")
    if code not in RUN_AGAIN:
        return Verdict(False, f"it ended with {code}, which does not ask for another run")
    if int(job.get("Restarts") or 0) > restarts:
        return Verdict(False, "SLURM has queued it again")
    timed_out = state == "TIMEOUT" or reason == "TimeLimit"
    if state != "RUNNING" and not timed_out:
        return Verdict(False, f"somebody ended it ({state})")
    if code in requeue_exit:
        return Verdict(False, f"SLURM queues it again on {code} (RequeueExit)")
    return Verdict(True, "its time limit came" if timed_out else f"it ended with {code}")
