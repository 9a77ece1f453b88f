"""Ranks that wait long for the process group are reported, once an incarnation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.protocol.start_marks import Marks
from elastic_ckpt.supervisor.watch.group_watch import GROUP_SECONDS, GroupWatch

BEGAN = int(100e9)


@pytest.mark.parametrize(
    ("marks", "after", "ranks"),
    [
        ((Marks(), Marks()), 999.0, None),  # still importing, or a script without a group
        ((Marks(group_began=BEGAN), Marks()), GROUP_SECONDS - 9, None),
        ((Marks(group_began=BEGAN), Marks()), GROUP_SECONDS + 1, "0"),
        ((Marks(group_began=BEGAN), Marks(group_began=BEGAN)), GROUP_SECONDS + 1, "0, 1"),
        ((Marks(group_began=BEGAN, group_ended=BEGAN + 1),) * 2, 999.0, None),
    ],
)
def test_ranks_that_wait_are_named_once(
    marks: tuple[Marks, ...], after: float, ranks: str | None
) -> None:
    said: list[str] = []
    shown: list[str] = []
    slots = [SimpleNamespace(rank=rank, marks=one) for rank, one in enumerate(marks)]
    board: Any = SimpleNamespace(read_slots=lambda: slots)
    record: Any = SimpleNamespace(say=said.append, update=lambda message: shown.append(message))
    watch = GroupWatch(board, record)
    for later in (0.0, 5.0):
        watch.poll(100.0 + after + later)
    assert said == shown and len(said) == (ranks is not None)
    if ranks is not None:
        assert said[0].startswith(f"rank {ranks} of this node: {after:.0f} s in the start of")
        watch.begin()
        watch.poll(100.0 + after + 10.0)
        assert len(said) == 2
