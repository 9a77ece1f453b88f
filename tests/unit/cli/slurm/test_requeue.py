"""Who is queued again; the fields are those that a real SLURM 22.05 showed."""

from __future__ import annotations

import pytest

from elastic_ckpt.cli.slurm.requeue import judge

RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
PREEMPTED = RUNNING | {"PreemptTime": "1795600000", "EndTime": "1795600010"}
CANCELLED = RUNNING | {"JobState": "COMPLETING"}
CANCELLED_LATER = RUNNING | {"JobState": "CANCELLED"}
REQUEUED = RUNNING | {"JobState": "COMPLETING", "Restarts": "1"}
TAKEN = {"PreemptTime": "1795600000", "EndTime": "1795600000"}
TAKEN_AT_ONCE = CANCELLED | TAKEN  # where preemption cancels, without a grace
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
        (75, TAKEN_AT_ONCE, True, "it was preempted"),
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
    verdict = judge(code, job)
    assert (verdict.requeue, verdict.why) == (requeue, why)


def test_slurm_does_it_itself_where_it_is_told_to() -> None:
    verdict = judge(75, RUNNING, requeue_exit={75, 76})
    assert (verdict.requeue, verdict.why) == (False, "SLURM queues it again on 75 (RequeueExit)")


def test_restarts_of_earlier_runs_are_not_this_ones() -> None:
    assert judge(75, RUNNING | {"Restarts": "3"}, restarts=3).requeue
    assert not judge(75, RUNNING | {"Restarts": "4"}, restarts=3).requeue


def test_one_that_is_cancelled_within_its_grace_stays_cancelled() -> None:
    def ends(after: int) -> bool:
        job = CANCELLED | {"PreemptTime": "1795600000", "EndTime": str(1795600000 + after)}
        return judge(75, job, grace=10.0).requeue

    assert [after for after in (0, 5, 7, 10, 12, 50) if ends(after)] == [10, 12]


def test_preemption_that_cancels_leaves_no_exit_code_for_slurm_to_act_on() -> None:
    assert judge(75, TAKEN_AT_ONCE, requeue_exit={75, 76}).requeue


def test_a_job_that_gets_nowhere_is_not_queued_again_all_night() -> None:
    assert judge(76, RUNNING, fruitless=9).requeue
    verdict = judge(76, RUNNING, fruitless=10, requeue_exit={76})
    assert (verdict.requeue, verdict.gave_up) == (False, True)
    assert verdict.why == "10 runs in a row have made no checkpoint"
    assert not judge(70, RUNNING, fruitless=10).gave_up
