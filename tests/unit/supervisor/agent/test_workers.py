"""Workers as processes: one that SIGKILL does not end."""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from elastic_ckpt.policy.failure import Failure, FailureClass
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.supervisor.agent import workers as module
from elastic_ckpt.supervisor.agent.launch import WorkerProcess
from elastic_ckpt.supervisor.agent.verdict import still_there, summarize
from elastic_ckpt.supervisor.agent.workers import STUCK_SECONDS, WARN_SECONDS, Workers


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_worker_that_sigkill_does_not_end_is_named_and_ends_the_run(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in state D takes the signal only when its system call returns."""
    board, now, said = Board.create(1), [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "print_error", said.append)
    monkeypatch.setattr(module, "process_state", lambda pid: "D")
    immortal = SimpleNamespace(pid=child.pid, send_signal=lambda number: True, is_there=True)
    monkeypatch.setattr(WorkerProcess, "started", [immortal])
    board.rank_slot(0).launched(0, child.pid)
    workers = Workers(board, selectors.DefaultSelector())
    workers.watch()
    workers.kill()
    workers.watch()
    assert workers.stuck() == [] and said == []
    now[0] += WARN_SECONDS
    workers.watch()
    workers.watch()
    [line] = said
    assert f"rank 0 (process {child.pid}, state D) is still there" in line
    now[0] += STUCK_SECONDS
    [stuck] = workers.stuck()
    ended = still_there(summarize(1, EndKind.CUT_SHORT, board.read_slots()), stuck, STUCK_SECONDS)
    assert ended.kind is EndKind.CRASHED and str(stuck) in ended.message
    failure = Failure(ended.rank, ended.exit_code, ended.message, stepped=True, hung=True)
    assert failure.kind is FailureClass.LAUNCH  # which is not retried
    child.kill()
    child.wait()
    monkeypatch.setattr(module, "_exit_status", lambda pid, patience=0.0: -9)
    workers.watch()
    assert workers.stuck() == []


@pytest.mark.parametrize(("hung", "first"), [(-1, 0), (1, 1), (7, 0)])
def test_of_workers_killed_in_a_hang_the_one_to_blame_failed_first(
    monkeypatch: pytest.MonkeyPatch, hung: int, first: int
) -> None:
    monkeypatch.setattr(WorkerProcess, "started", [])
    board = Board.create(2)
    for rank in (0, 1):
        board.rank_slot(rank).launched(rank, os.getpid())
    workers = Workers(board, selectors.DefaultSelector())
    workers.kill(hung=hung)
    assert workers.first_failed(board.read_slots()).rank == first


@pytest.mark.parametrize(
    ("status", "killed", "says"),
    [(-9, False, "killed by SIGKILL, by the kernel (out of memory?) or somebody (see dmesg)"),
     (-9, True, "killed by SIGKILL"), (-15, False, "killed by SIGTERM"), (1, False, "exit code 1")],
)  # fmt: skip
def test_a_sigkill_that_was_not_sent_from_here_says_who_may_have(
    monkeypatch: pytest.MonkeyPatch, status: int, killed: bool, says: str
) -> None:
    monkeypatch.setattr(module, "_exit_status", lambda pid: status)
    board = Board.create(1)
    board.rank_slot(0).launched(0, os.getpid())
    sent = SimpleNamespace(pid=1, send_signal=lambda number: True, is_there=True)
    monkeypatch.setattr(WorkerProcess, "started", [sent])
    workers = Workers(board, selectors.DefaultSelector())
    if killed:
        workers.kill()
    assert workers.explain(board.read_slots()[0], {}) == (status, says)


@pytest.mark.parametrize(
    ("command", "says"), [("true", []), ("./no-such.sh 2>&-", ["exit code 127"]), ("kill -9 $$",
     ["killed by SIGKILL"])],
)  # fmt: skip
def test_a_command_that_should_ask_the_script_and_fails_is_said(
    command: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "print_error", said.append)
    board = Board.create(1)
    workers = Workers(board, selectors.DefaultSelector())
    workers.ask_to_save(f"command:{command}")
    assert not [one for one in threading.enumerate() if one.name == "asks"]  # nobody is there
    board.rank_slot(0).launched(0, os.getpid())
    workers.ask_to_save(f"command:{command}")
    for one in threading.enumerate():
        if one.name == "asks":
            one.join(20)
    assert len(said) == len(says)
    assert all(word in line and command in line for word, line in zip(says, said, strict=True))
