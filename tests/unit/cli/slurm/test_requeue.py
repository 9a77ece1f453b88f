"""Which jobs are requeued; the fields are those of a real SLURM 22.05."""

from __future__ import annotations

import pytest

from elastic_ckpt.cli.slurm.requeue import decide_requeue

RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
PREEMPTED = RUNNING | {"PreemptTime": "1795600000", "EndTime": "1795600010"}
CANCELLED = RUNNING | {"JobState": "COMPLETING"}
CANCELLED_LATER = RUNNING | {"JobState": "CANCELLED"}
REQUEUED = RUNNING | {"JobState": "COMPLETING", "Restarts": "1"}
TAKEN = {"PreemptTime": "1795600000", "EndTime": "1795600000"}
TAKEN_AT_ONCE = CANCELLED | TAKEN  # preempted by cancellation, without a grace
TIMED_OUT = RUNNING | {"JobState": "COMPLETING", "Reason": "TimeLimit"}
TIMED_OUT_LATER = RUNNING | {"JobState": "TIMEOUT"}


@pytest.mark.parametrize(
    ("code", "job", "requeue", "why"),
    [
        (75, RUNNING, True, "exit code 75"),
        (76, RUNNING, True, "exit code 76"),
        (75, PREEMPTED, True, "exit code 75"),
        (75, TIMED_OUT, True, "it reached its time limit"),
        (75, TIMED_OUT_LATER, True, "it reached its time limit"),
        (75, TAKEN_AT_ONCE, True, "it was preempted"),
        (75, CANCELLED, False, "it was cancelled (COMPLETING)"),
        (75, CANCELLED_LATER, False, "it was cancelled (CANCELLED)"),
        (75, REQUEUED, False, "SLURM has already requeued it"),
        *[
            (code, RUNNING, False, f"exit code {code} does not ask for another run")
            for code in (0, 1, 64, 65, 70, 73, 137)
        ],
    ],
)
def test_a_job_is_requeued_if_it_asks_and_was_not_cancelled(code, job, requeue, why):
    decision = decide_requeue(code, job)
    assert (decision.requeue, decision.why) == (requeue, why)


def test_slurm_requeues_by_itself_on_its_requeue_exit_codes() -> None:
    decision = decide_requeue(75, RUNNING, requeue_exit={75, 76})
    assert (decision.requeue, decision.why) == (
        False,
        "SLURM itself requeues it on 75 (RequeueExit)",
    )


def test_restarts_of_earlier_runs_do_not_count() -> None:
    assert decide_requeue(75, RUNNING | {"Restarts": "3"}, restarts=3).requeue
    assert not decide_requeue(75, RUNNING | {"Restarts": "4"}, restarts=3).requeue


def test_a_job_cancelled_within_its_grace_stays_cancelled() -> None:
    def ends(after: int) -> bool:
        job = CANCELLED | {"PreemptTime": "1795600000", "EndTime": str(1795600000 + after)}
        return decide_requeue(75, job, grace=10.0).requeue

    assert [after for after in (0, 5, 7, 10, 12, 50) if ends(after)] == [10, 12]


def test_a_job_cancelled_by_preemption_is_requeued_despite_requeue_exit() -> None:
    assert decide_requeue(75, TAKEN_AT_ONCE, requeue_exit={75, 76}).requeue


def test_a_job_without_progress_is_not_requeued_forever() -> None:
    assert decide_requeue(76, RUNNING, fruitless=9).requeue
    decision = decide_requeue(76, RUNNING, fruitless=10, requeue_exit={76})
    assert (decision.requeue, decision.gave_up) == (False, True)
    assert decision.why == "10 consecutive runs made no checkpoint"
    assert not decide_requeue(70, RUNNING, fruitless=10).gave_up
