"""What a node replicates, and when; it leaves to training what it had without that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.memory.seal import Share, make_memory_seal
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES
from elastic_ckpt.journal.node_events import Replicated
from elastic_ckpt.supervisor.saves import replicator
from tests.checkpoints import make_header, open_job
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


def sealed(attempt: str, step: int, incarnation: int) -> Any:
    header = make_header(SimpleNamespace(identity=attempt, step=step), incarnation=incarnation)
    return SimpleNamespace(seal=make_memory_seal(header, (), guards=(Share(1, 1, attempt),)))


@pytest.mark.parametrize("step", [10, 8], ids=["the same step", "a lower step"])
def test_what_was_sealed_last_is_replicated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    """A job had gone back, and sealed step 10 again: the first one was replicated, from a node that
    had vanished, and the new one never."""
    tier: Any = SimpleNamespace(root=tmp_path, sealed=lambda: [sealed("former", 10, 1)])
    events: list[Replicated] = []
    monkeypatch.setattr(
        replicator, "replicate", lambda root, source, attempt, pause: tier.sealed()[0]
    )
    monkeypatch.setattr(replicator, "drop_strangers", lambda *_: None)
    journal: Any = SimpleNamespace(write=events.append)
    found = replicator.Replicator(tier, journal, print, lambda: None, lambda: None, lambda: 0)

    def replicated(count: int) -> bool:
        found.serve(sealed=False)
        return len(events) == count

    found.serve(sealed=True)
    until(lambda: replicated(1))
    tier.sealed = lambda: [sealed("former", 10, 1), sealed("new", step, 2)]
    found.serve(sealed=True)
    until(lambda: replicated(2))
    found.close()
    assert [one.host for one in events] == ["former", "new"]
