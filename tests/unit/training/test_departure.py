"""When a rank that leaves its Session with code 0 waits for the others, and when it fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.errors import UnequalSteps
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.training import departure
from elastic_ckpt.training.departure import is_exit, leave_together


class Clock:
    """Time that passes only in sleeps; ``then`` is called at each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.1)
        self.then()


class Ranks:
    """Rank 0 of two, and what it sees of rank 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, local: bool = True) -> None:
        self.clock = Clock()
        monkeypatch.setattr(departure, "time", self.clock)
        self.board = Board.private(2 if local else 1)
        self.other = self.board.rank_slot(1) if local else None
        for rank in range(self.board.slots):
            slot = self.board.rank_slot(rank)
            slot.launched(rank, os.getpid() if rank == 0 else 1)
            slot.step(8, 7, 0, 0)
        self.posted: set[int] = set()
        self.elsewhere = False
        self.said: list[str] = []

    def leave(self) -> None:
        peers = SimpleNamespace(
            rank=0, world_size=2, pause_seconds=0.01,
            arrive=lambda _: self.posted.add(0),
            absent=lambda _, first: (-1 if 1 in self.posted else 1, self.elsewhere),
        )  # fmt: skip
        made: Any = SimpleNamespace(peers=peers, board=self.board, name="job", say=self.said.append)
        leave_together(made, 7)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_ranks_that_all_leave_go_on_together(ranks: Ranks) -> None:
    ranks.clock.then = lambda: ranks.posted.add(1)
    ranks.leave()
    assert ranks.clock.now < 1.0
    assert ranks.said == []


def test_rank_that_begins_the_next_step_is_seen_at_once(ranks: Ranks) -> None:
    ranks.clock.then = lambda: ranks.other.step(9, 8, 0, 0)
    with pytest.raises(UnequalSteps, match="rank 0 left its Session with exit code 0 after step 7"):
        ranks.leave()
    assert ranks.clock.now < 1.0


def test_rank_in_another_exchange_is_seen_at_once(ranks: Ranks) -> None:
    ranks.elsewhere = True
    with pytest.raises(UnequalSteps, match="but rank 1 trains on"):
        ranks.leave()


@pytest.mark.parametrize(
    ("step_seconds", "phase", "limit"),
    [
        (0.01, Phase.TRAINING, 10),
        (5.0, Phase.TRAINING, 50),
        (0.0, Phase.TRAINING, 60),
        (0.01, Phase.EVALUATING, 1800),
    ],
)
def test_silent_rank_is_named_and_then_given_up(
    ranks: Ranks, step_seconds: float, phase: Phase, limit: float
) -> None:
    ranks.other.pace(0, int(step_seconds * 1e9))
    ranks.other.phase(phase)
    with pytest.raises(UnequalSteps, match="but rank 1 did not"):
        ranks.leave()
    assert limit <= ranks.clock.now < limit + 1
    [line] = ranks.said
    assert line.endswith("waiting for rank 1 to leave its own")


def test_rank_of_another_node_has_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, local=False)
    ranks.board.rank_slot(0).pace(0, 10**7)
    with pytest.raises(UnequalSteps):
        ranks.leave()
    assert 60 <= ranks.clock.now < 61


@pytest.mark.parametrize(
    ("error", "leaves"),
    [
        (SystemExit(0), True), (SystemExit(), True), (SystemExit(1), False),
        (SystemExit("why"), False), (ValueError(), False), (None, False),
    ],
)  # fmt: skip
def test_only_code_0_is_a_way_to_finish(error: BaseException | None, leaves: bool) -> None:
    assert is_exit(error) is leaves
