"""The thread that keeps replicas leaves to training what it had without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES
from elastic_ckpt.journal.node_events import Replicated
from elastic_ckpt.supervisor.saves import replicator
from tests.checkpoints import open_job
from tests.node_memories import NodeMemories
from tests.waiting import until


@pytest.mark.parametrize("steps_beside", [30, 6])
def test_a_copy_pauses_where_steps_come_slower_than_without_it(
    steps_beside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps a second without a copy; beside it ten, or two."""
    now, steps, pauses, made = 100.0, 0, [], []
    journal: Any = SimpleNamespace(write=made.append)
    nodes = NodeMemories(open_job(tmp_path / "job"), tmp_path, 2)

    def pass_by(seconds: float, count: int) -> None:
        nonlocal now, steps
        now, steps = now + seconds, steps + count
        keeper.serve(sealed=False)

    class Noted(replicator.Throttle):
        def pause(self, count: int, now: float, *, slowed: bool) -> float:
            pauses.append(super().pause(count, clock(), slowed=slowed))
            pass_by(0.0, 0)
            pass_by(3.0, steps_beside)
            return 0.0

    clock: Callable[[], float] = lambda: now  # noqa: E731
    monkeypatch.setattr(replicator, "Throttle", Noted)
    monkeypatch.setattr(
        replicator, "time", SimpleNamespace(monotonic=clock, thread_time=lambda: 0.0)
    )
    keeper = replicator.Replicator(
        nodes.tiers[0], journal, print, lambda: None, lambda: None, lambda: steps
    )
    try:
        pass_by(0.0, 0)
        pass_by(3.0, 30)
        nodes.save(1, size=2 * PIECE_BYTES)
        keeper.serve(sealed=True)
        until(lambda: keeper.serve(sealed=False) or made, "a replica")
    finally:
        keeper.close()
        nodes.close()
    assert isinstance(made[0], Replicated)
    assert len(pauses) > 1
    assert (sum(pauses) > 0) == (steps_beside < 30)
