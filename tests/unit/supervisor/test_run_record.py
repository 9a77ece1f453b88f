"""The record of a run: what it keeps of the runs before it."""

from __future__ import annotations

import pytest

from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.run_record import _trained

OLD, NEW = RunCommand(("old",), "/"), RunCommand(("new",), "/", ("HOME",), {"torch": "2"}, "v1")


@pytest.mark.parametrize(
    ("code", "command", "kept"),
    [(75, NEW, "new"), (0, NEW, "new"), (70, NEW, "new"), (None, NEW, "new"),
     (65, NEW, "old"), (64, NEW, "old"), (75, None, None)],
)  # fmt: skip
def test_the_command_of_the_last_run_that_trained_is_kept(
    code: int | None, command: RunCommand | None, kept: str | None
) -> None:
    previous = NodeRecord(
        job="j", run_id="1", node="n", owner=ProcessIdentity.current(), since=0.0,
        state=RunState.FAILED, exit_code=code, command=command, trained=OLD,
    )  # fmt: skip
    assert _trained(previous) == (RunCommand((kept,), "/") if kept is not None else None)
    assert _trained(None) is None
