"""Ranks that reach the end of a stream together, and one that does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import UnequalSteps
from elastic_ckpt.training.departure import end_together


def runtime(*answers: tuple[int, bool]) -> Any:
    """Of rank 1 of 2, which finds this out about the meeting, one answer after the other."""
    found = iter(answers)
    peers = SimpleNamespace(
        rank=1, world_size=2, pause_seconds=0.0, arrive=lambda meeting: None,
        absent=lambda meeting, first: next(found),
    )  # fmt: skip
    return cast(Any, SimpleNamespace(peers=peers, job=SimpleNamespace(name="")))


def test_rank_that_came_and_has_gone_on_since_is_not_accused() -> None:
    end_together(runtime((0, True), (-1, False), (-1, False)), Position())


def test_rank_that_trains_on_is_named() -> None:
    with pytest.raises(UnequalSteps, match="rank 0 trains on"):
        end_together(runtime((0, True), (0, True)), Position())
