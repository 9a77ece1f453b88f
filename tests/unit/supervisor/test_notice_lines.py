"""What a notice shows of the time that is left: only what is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from elastic_ckpt.policy.deadline import Notice
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.cluster.role import AloneRole
from elastic_ckpt.supervisor.preemption import Preemption
from elastic_ckpt.supervisor.supervisor import Supervisor


def lines(*notices: Notice) -> list[str]:
    """Return what a run says of these notices, one after the other, at second 100."""
    said: list[str] = []
    record: Any = SimpleNamespace(
        node=SimpleNamespace(notice=None, message=""), say=said.append, update=lambda: None,
        move=lambda event, message: said.append(message),
    )  # fmt: skip
    clock: Any = SimpleNamespace(monotonic=lambda: 100.0)
    other: Any = SimpleNamespace(deadline=None, note=lambda event: None)
    run: Any = SimpleNamespace(
        preemption=Preemption(30.0, clock, other, other, record), record=record,
        ports=SimpleNamespace(mirror=SimpleNamespace(hurry=lambda left: None)),
        shutdown=SimpleNamespace(notice_arrived=lambda step: None),
        incarnations=SimpleNamespace(newest_saved_step=0, is_launched=True),
        _saves_or_drains=False, agent=None, state=RunState.DRAINING, role=AloneRole(),
    )  # fmt: skip
    for notice in notices:
        Supervisor._on_notice(run, notice)
    return said


def test_a_guess_is_not_shown_and_the_answer_is() -> None:
    guess = Notice("signal", "SIGUSR1", 104.0, is_guess=True)
    known = Notice("slurm", "signal before the time limit", 165.0)
    tighter = Notice("slurm", "preempted", 110.0)
    assert lines(guess, known, tighter) == [
        "SIGUSR1: saving, and asking SLURM how long that may take",
        "signal before the time limit: saving, 65 s left",
    ]
    assert lines(Notice("signal", "SIGTERM", 130.0)) == ["SIGTERM: saving, 30 s left"]
