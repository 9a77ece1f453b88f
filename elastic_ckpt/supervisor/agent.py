"""The agent: the supervisor's child that hosts torch elastic and so launches the workers.

Torch elastic runs in a thread, one ``elastic_launch`` per incarnation; the main thread listens
to the supervisor, watches the workers' lives and is the watcher of the stop-step agreement. It
depends on no rank's progress. When the supervisor dies its pipe closes, and the agent takes
everything below it down.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.board import Board, Outcome, Slot
from elastic_ckpt.core.agreement import NOTHING_ENTERED, Answer, RequestKind, answer_step
from elastic_ckpt.supervisor import launch
from elastic_ckpt.supervisor.launch import Incarnation
from elastic_ckpt.supervisor.messages import (
    AgentEvent,
    Ask,
    Command,
    Ended,
    EndKind,
    Kill,
    Launch,
    LineReader,
    Ready,
    WorkerSpec,
    encode_line,
)
from elastic_ckpt.supervisor.processes import (
    become_subreaper,
    count_memory_kills,
    die_with_parent,
    kill_descendants,
    outlive_parent,
)
from elastic_ckpt.supervisor.template_process import Template
from elastic_ckpt.supervisor.workers import Workers

FENCE_SECONDS: Final = 0.001
"""Python has no store-load fence; by then every rank's store has long reached this process."""

_IGNORED: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


class Agent:
    """The main thread's loop."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands = LineReader(commands)
        self._events = events
        self._spec = msgspec.json.decode(self._first_line(), type=WorkerSpec)
        self._board = Board.open(self._spec.board)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._selector.register(commands, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._incarnation: Incarnation | None = None
        self._workers = Workers(self._board, self._selector)
        self._not_begun = False
        self._memory_kills = 0

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        self._send(Ready())
        while not self._commands.closed:
            launched = self._incarnation is not None
            self._selector.select(self._workers.patience() if launched else None)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            for line in self._commands.lines():
                self._obey(msgspec.json.decode(line, type=Command))
            if self._incarnation is None:
                continue
            self._workers.watch()
            if self._incarnation.over:
                self._finish(self._incarnation)

    # -- commands ---------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Launch():
                self._launch(command.incarnation)
            case Ask():
                self._ask(command.kind)
            case Kill():
                self._workers.kill()

    def _launch(self, number: int) -> None:
        self._board.begin_incarnation(number)
        self._not_begun = False
        self._memory_kills = count_memory_kills()
        # From this thread, which lives as long as the agent: see supervisor/processes.py.
        forkserver.ensure_running()
        self._incarnation = Incarnation(number, self._spec, self._wake_write)
        self._incarnation.start()

    def _ask(self, kind: RequestKind) -> None:
        """The watcher's part of the agreement; see ``core/agreement.py``."""
        if self._incarnation is None:
            return
        board = self._board
        waiting = any(slot.seen < board.flag for slot in board.read_slots())
        if kind is not RequestKind.STOP and waiting:
            return  # the ranks have not taken up the last request yet: that one serves
        number = board.flag + 1
        board.raise_flag(number)
        time.sleep(FENCE_SECONDS)
        step = answer_step(board.entered())
        board.post_answer(Answer(number, kind, step))
        if kind is RequestKind.STOP:
            self._hurry_idle(step)

    def _hurry_idle(self, step: int) -> None:
        """End at once what has nothing to save.

        With the flag up nobody begins a step any more. If none was begun in this incarnation the
        newest checkpoint is as good as a new one; a script that does not take part is told by
        the signal that it knows.
        """
        slots = self._board.read_slots()
        if any(slot.first_entry for slot in slots):
            return
        self._not_begun = True
        if any(slot.attached for slot in slots) or step != NOTHING_ENTERED:
            self._workers.kill()
            return
        self._workers.kill(signal.SIGTERM)

    # -- the end of an incarnation ------------------------------------------------------------

    def _finish(self, incarnation: Incarnation) -> None:
        incarnation.join(5.0)
        self._incarnation = None
        now = time.monotonic_ns()
        failed_at, noticed_at = self._workers.failed_at or now, self._workers.noticed_at or now
        verdict = self._verdict(incarnation, self._board.read_slots())
        self._workers.sweep()
        self._send(
            msgspec.structs.replace(
                verdict,
                failed_at=failed_at,
                noticed_at=noticed_at,
                gone_at=time.monotonic_ns(),
            )
        )

    def _verdict(self, incarnation: Incarnation, slots: list[Slot]) -> Ended:
        outcomes = {slot.outcome for slot in slots}
        failed = None
        if outcomes == {Outcome.COMPLETED}:
            kind = EndKind.COMPLETED
        elif outcomes <= {Outcome.STOPPED, Outcome.COMPLETED}:
            kind = EndKind.STOPPED
        elif self._not_begun or outcomes <= {Outcome.STOPPED_UNSAVED, Outcome.COMPLETED}:
            kind = EndKind.NOT_BEGUN
        else:
            kind = EndKind.CRASHED
            failed = self._workers.first_failed(slots)
        exit_code, message = 0, ""
        if failed is not None:
            exit_code, message = self._workers.explain(failed, incarnation.error)
        begun = [slot for slot in slots if slot.first_entry]
        finished = max((slot.finished for slot in slots if slot.attached), default=0)
        return Ended(
            incarnation=incarnation.number,
            kind=kind,
            rank=failed.rank if failed else -1,
            exit_code=exit_code,
            message=message,
            stepped=bool(begun),
            steps=max((slot.finished - slot.start_step for slot in begun), default=0),
            finished=finished,
            attached=any(slot.attached for slot in slots),
            out_of_memory=count_memory_kills() > self._memory_kills,
        )

    # -- plumbing -------------------------------------------------------------------------------

    def _first_line(self) -> bytes:
        limit = time.monotonic() + 30.0
        while time.monotonic() < limit and not self._commands.closed:
            for line in self._commands.lines():
                return line
            time.sleep(0.005)
        raise SystemExit("elastic-ckpt agent: the supervisor said nothing")

    def _send(self, event: AgentEvent) -> None:
        # A supervisor that is gone is noticed by the end of its commands.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._events, encode_line(event))


def main() -> None:
    """Entry point; commands come on standard input, events go to ELASTIC_CKPT_EVENTS."""
    die_with_parent()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    commands = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # Torch elastic and multiprocessing leave directories behind; the supervisor removes this one.
    tempfile.tempdir = scratch = os.environ.pop("ELASTIC_CKPT_SCRATCH")
    events = int(os.environ.pop("ELASTIC_CKPT_EVENTS"))
    os.set_inheritable(events, False)
    become_subreaper()
    agent = Agent(commands, events)
    template = Template(agent._spec, Path(scratch))
    template.start()
    launch.prepare()  # while the template imports too
    template.wait()
    outlive_parent()
    try:
        agent.run()
    finally:
        kill_descendants(spare_trackers=True)
        shutil.rmtree(scratch, ignore_errors=True)  # the supervisor may be gone
        sys.stdout.flush()
        os._exit(0)  # torch elastic's thread may still wait for workers that are gone
