"""What is shown of the failure budget follows each new checkpoint, not only each failure."""

from __future__ import annotations

import pytest

from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import REFILL_STEPS, RestartPolicy
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.ports import Key
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.supervisor.watch.budget_watch import BudgetWatch


@pytest.mark.parametrize(
    ("newest", "finished", "left"),
    [
        pytest.param((0, 4, 100), 110, 0, id="nothing new"),
        pytest.param((0, 5, 150), 110, 1, id="a checkpoint of the script"),
        pytest.param((0, 4, 100), 100 + REFILL_STEPS, 1, id="a Session that saves seldom"),
    ],
)
def test_failures_left_are_published_when_the_budget_is_full_again(
    job: JobDirectory, newest: Key, finished: int, left: int
) -> None:
    board, published = Board.private(1), []
    slot = board.rank_slot(0)
    slot.launched(0, 100)
    slot.attach(100)
    slot.step(finished + 1, finished, 0, 0)
    first = NodeRecord(
        job="j", run_id="1", node="n", owner=ProcessIdentity.current(), since=0.0,
        state=RunState.RUNNING,
    )  # fmt: skip
    record = RunRecord(first, Journal(job, "n"), published.append, lambda line: None)
    policy = RestartPolicy(1)
    policy.decide(Failure(0, -9, "", stepped=True, newest=(0, 4, 100)))
    watch = BudgetWatch(policy, board, lambda: newest, record)
    for now in (10.0, 10.5, 11.5):
        watch.poll(now)
    assert record.node.failures_left == left
    assert [one.failures_left for one in published] == [left] * left
