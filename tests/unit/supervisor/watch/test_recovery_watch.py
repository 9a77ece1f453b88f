"""A recovery is written down once, when the last rank has finished its first step."""

from __future__ import annotations

import time

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.supervisor.watch.recovery_watch import RecoveryWatch


def start(board: Board, incarnation: int, *stepped: int, step: int = 40) -> None:
    """An incarnation's ranks begin; those named finish a step."""
    board.begin_incarnation(incarnation)
    for rank in range(board.slots):
        slot = board.rank_slot(rank)
        slot.launched(rank, 100 + rank)
        slot.loaded(Source.DISK if step else Source.NOTHING)
        slot.attach(step)
        if rank in stepped:
            slot.stepped()


def recoveries(job: JobDirectory) -> list[dict[str, object]]:
    return [event.data for event in read_journal(job) if event.name == "recovery"]


def test_it_ends_with_the_first_step_of_the_last_rank(job: JobDirectory) -> None:
    board = Board.private(2)
    watch = RecoveryWatch(board, Journal(job, "n"), None)
    start(board, 1, 0, 1)
    assert not watch.poll(1)  # nothing has failed
    now = time.monotonic_ns()
    watch.failed(now - 3, now - 2, now)
    assert not watch.poll(1)  # these steps are of the incarnation that failed
    start(board, 2, 0)
    assert not watch.poll(2)
    board.rank_slot(1).stepped()
    assert not watch.poll(3)  # the board shows another incarnation
    assert watch.poll(2)
    assert not watch.poll(2)
    (event,) = recoveries(job)
    assert watch.last is not None
    assert (event["incarnation"], event["step"], event["tier"]) == (2, 40, "disk")
    assert event["total"] == sum(watch.last.stages.values()) > 0


def test_a_failure_on_the_way_back_does_not_start_the_clock_again(job: JobDirectory) -> None:
    board = Board.private(1)
    watch = RecoveryWatch(board, Journal(job, "n"), None)
    first = time.monotonic_ns()
    watch.failed(first, first, first)
    start(board, 2)
    second = time.monotonic_ns()
    watch.failed(second, second, second)
    start(board, 3, 0, step=0)
    assert watch.poll(3)
    assert watch.last is not None
    assert watch.last.tier == "nothing"
    taken = board.read_slot(0).marks.stepped - first
    assert watch.last.total_seconds == pytest.approx(taken / 1e9)
