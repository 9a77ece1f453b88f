"""Who is queued again; the fields are those that a real SLURM 22.05 showed."""

from __future__ import annotations

import pytest

from elastic_ckpt.core.requeue import judge

RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
PREEMPTED = RUNNING | {"PreemptTime": "1795600000", "EndTime": "1795600010"}
CANCELLED = RUNNING | {"JobState": "COMPLETING"}
CANCELLED_LATER = RUNNING | {"JobState": "CANCELLED"}
REQUEUED = RUNNING | {"JobState": "COMPLETING", "Restarts": "1"}
TIMED_OUT = RUNNING | {"JobState": "COMPLETING", "Reason": "TimeLimit"}
TIMED_OUT_LATER = RUNNING | {"JobState": "TIMEOUT"}


@pytest.mark.parametrize(
    ("code", "job", "requeue", "why"),
    [
        (75, RUNNING, True, "it ended with 75"),
        (76, RUNNING, True, "it ended with 76"),
        (75, PREEMPTED, True, "it ended with 75"),
        (75, TIMED_OUT, True, "its time limit came"),
        (75, TIMED_OUT_LATER, True, "its time limit came"),
        (75, CANCELLED, False, "somebody ended it (COMPLETING)"),
        (75, CANCELLED_LATER, False, "somebody ended it (CANCELLED)"),
        (75, REQUEUED, False, "SLURM has queued it again"),
        *[
            (code, RUNNING, False, f"it ended with {code}, which does not ask for another run")
            for code in (0, 1, 64, 65, 70, 73, 137)
        ],
    ],
)
def test_a_job_is_queued_again_if_it_asks_for_it_and_nobody_ended_it(code, job, requeue, why):
    verdict = judge(code, job, 0, set())
    assert (verdict.requeue, verdict.why) == (requeue, why)


def test_slurm_does_it_itself_where_it_is_told_to() -> None:
    verdict = judge(75, RUNNING, 0, {75, 76})
    assert (verdict.requeue, verdict.why) == (False, "SLURM queues it again on 75 (RequeueExit)")


def test_restarts_of_earlier_runs_are_not_this_ones() -> None:
    assert judge(75, RUNNING | {"Restarts": "3"}, 3, set()).requeue
    assert not judge(75, RUNNING | {"Restarts": "4"}, 3, set()).requeue
