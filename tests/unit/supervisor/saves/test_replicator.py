"""Of what a node replicates, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.memory.seal import Share, make_memory_seal
from elastic_ckpt.journal.node_events import Replicated
from elastic_ckpt.supervisor.saves import replicator
from elastic_ckpt.supervisor.saves.replicator import Replicator
from tests.checkpoints import make_header
from tests.waiting import until


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
    found = Replicator(tier, journal, print, lambda: None, lambda: None)

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
