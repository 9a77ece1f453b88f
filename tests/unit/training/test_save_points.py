"""Where a session saves and stops, with everything else replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.training import save_points
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.save_points import LoopState, SavePoints
from elastic_ckpt.training.state import saver

HERE = Position(step=7)


class Left(Exception):
    """The ranks have left."""


class FakeSave:
    """A save that is made at once: in memory if it is due by the interval, else on disk."""

    under_way = False
    made: list[tuple[str, str]] = []

    def __init__(self, runtime: Any, engine: object, snapshot: Any) -> None:
        self.position, self.reason = snapshot.position, snapshot.reason
        self.parent, self._runtime = runtime.parent, runtime
        self.is_in_memory = self.reason == "interval"

    def begin(self, *, overlap: bool) -> None:
        self._runtime.parent = f"attempt {len(self.made)}"
        self.made.append((self.reason, self.parent))


def stopped_after_a_save(
    monkeypatch: pytest.MonkeyPatch, memory: MemoryTier
) -> list[tuple[str, str]]:
    """Save at a step by the interval, and stop there; return the saves: reason and parent."""
    monkeypatch.setattr(saver, "SaveOperation", FakeSave)
    monkeypatch.setattr(FakeSave, "made", [])
    monkeypatch.setattr(save_points, "meet", lambda *_: ())

    def leave(*, saved: bool) -> None:
        assert saved
        raise Left

    runtime: Any = SimpleNamespace(
        memory=memory, parent="loaded", leave=leave, peers=SimpleNamespace(world_size=1),
        steps=SimpleNamespace(enter=lambda *_: SimpleNamespace(kind=ActionKind.STOP)),
    )  # fmt: skip
    others: Any = SimpleNamespace(
        stepped=lambda: None, interrupted=lambda: None, hold=lambda: SimpleNamespace(),
        is_ready=lambda hurried: True, end=lambda step: None, values={},
        is_due=lambda step: False,
    )  # fmt: skip
    points = SavePoints(
        runtime, saver.Saver(runtime, others, None), others, others,
        LoopState(1, Consumption(), HERE), others, others, None, lambda: 0, others,
    )  # fmt: skip
    points._postponement = others
    points._is_due = True
    points.after_step()
    with pytest.raises(Left):
        points.before_step()
    return FakeSave.made


def test_stop_needs_no_second_save_where_the_supervisor_drains_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped_after_a_save(monkeypatch, MemoryTier(tmp_path)) == [("interval", "loaded")]


def test_node_that_leaves_does_not_take_the_only_copy_of_its_share_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of an interval was also the one to stop at, and counted as saved: in the memory of
    the nodes, one of which went. Both are the same checkpoint, so they have the same parent."""
    memory = NodesMemory(tmp_path, Share(0, 1), acts=True)
    saves = stopped_after_a_save(monkeypatch, memory)
    assert saves == [("interval", "loaded"), ("emergency", "loaded")]
