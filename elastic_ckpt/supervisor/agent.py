"""The agent: the supervisor's child that hosts torch elastic and so launches the workers.

Torch elastic runs in a thread, one ``elastic_launch`` per incarnation; the main thread listens
to the supervisor, watches the workers' lives and is the watcher of the stop-step agreement. It
depends on no rank's progress. When the supervisor dies its pipe closes, and the agent takes
everything below it down.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import selectors
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver, resource_tracker
from typing import Any, Final

import msgspec

from elastic_ckpt.board import Board, Outcome, Slot
from elastic_ckpt.core.agreement import NOTHING_ENTERED, Answer, RequestKind, answer_step
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
    descendants,
    die_with_parent,
    is_resource_tracker,
    kill_all,
    kill_descendants,
    outlive_parent,
    reap,
)

WORKER_ENTRY: Final = "elastic_ckpt.training.worker"
"""Named, not imported: the worker is another process, on the other side of the board."""

FENCE_SECONDS: Final = 0.001
"""Python has no store-load fence; by then every rank's store has long reached this process."""

LEARN_SECONDS: Final = 0.02

LINGER_SECONDS: Final = 10.0
"""How long workers may take to exit once all of them have said how they left."""

MONITOR_SECONDS: Final = 0.05
_IGNORED: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


def enter_worker(module: str, spec: bytes) -> None:
    """What each forked worker runs; called by torch elastic."""
    from elastic_ckpt.supervisor import template

    template.quiet.__exit__(None, None, None)
    importlib.import_module(module).main(spec)


class Incarnation:
    """One launch of all workers of this node, in a thread of torch elastic."""

    def __init__(self, number: int, spec: WorkerSpec, wake: int) -> None:
        self.number = number
        self.error: BaseException | None = None
        self._spec = spec
        self._wake = wake
        self._over = False
        self._thread = threading.Thread(target=self._run, name="elastic", daemon=True)

    def start(self) -> None:
        """Launch; returns at once. ``wake`` gets a byte when all is over."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether torch elastic has returned."""
        return self._over

    def join(self, seconds: float) -> None:
        """Wait, bounded, for torch elastic."""
        self._thread.join(seconds)

    def _run(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._spec.nproc,
            run_id=f"{self._spec.job}.{self.number}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
            start_method="forkserver",
            local_addr="127.0.0.1",
        )
        try:
            payload = msgspec.json.encode(self._spec)
            elastic_launch(config, enter_worker)(WORKER_ENTRY, payload)
        except BaseException as error:  # every end of the launch is an end of the incarnation
            self.error = error
        finally:
            # Before the byte: whoever it wakes must find the incarnation over.
            self._over = True
            os.write(self._wake, b"x")


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
        self._known: set[int] = set()  # local ranks whose pid is known
        self._pidfds: dict[int, int] = {}  # local rank -> pidfd, while the worker lives
        self._processes: dict[int, Any] = {}  # pid -> torch elastic's handle of the worker
        self._culprit: Slot | None = None
        self._not_begun = False
        self._all_said_at: float | None = None

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        self._send(Ready())
        while not self._commands.closed:
            self._selector.select(self._timeout())
            for line in self._commands.lines():
                self._obey(msgspec.json.decode(line, type=Command))
            self._watch_workers()
            self._end_lingering()
            if self._incarnation is not None and self._incarnation.over:
                self._finish(self._incarnation)

    # -- commands ---------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Launch():
                self._launch(command.incarnation)
            case Ask():
                self._ask(command.kind)
            case Kill():
                self._kill_workers()

    def _launch(self, number: int) -> None:
        self._board.begin_incarnation(number)
        self._culprit, self._not_begun = None, False
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
        if kind is RequestKind.SAVE and waiting:
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
            self._kill_workers()
            return
        for process in descendants():
            if process.ppid() == _forkserver_pid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    # -- lives ------------------------------------------------------------------------------

    def _watch_workers(self) -> None:
        """Learn of new workers; on the first one that died without a word, kill the others.

        Torch elastic would send SIGTERM and wait 30 s for ranks that are stuck in a collective.
        """
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        if self._incarnation is None:
            return
        for slot in self._board.read_slots():
            if slot.pid and slot.local_rank not in self._known:
                self._follow(slot)
        exited = [local_rank for local_rank, pidfd in self._pidfds.items() if _exited(pidfd)]
        for local_rank in exited:
            pidfd = self._pidfds.pop(local_rank)
            self._selector.unregister(pidfd)
            os.close(pidfd)
        if exited:
            self._lost(exited)

    def _end_lingering(self) -> None:
        """A worker whose work is sealed must not use up the notice in its own clean-up.

        Nor may one that failed, but is kept by a thread of its own, keep the others waiting.
        """
        said = [slot.outcome for slot in self._board.read_slots()]
        over = Outcome.FAILED in said or Outcome.NONE not in said
        if self._incarnation is None or not over:
            self._all_said_at = None
        elif self._all_said_at is None:
            self._all_said_at = time.monotonic()
        elif time.monotonic() > self._all_said_at + LINGER_SECONDS:
            self._lost([])  # who failed is known before the others are killed
            self._kill_workers()

    def _follow(self, slot: Slot) -> None:
        self._known.add(slot.local_rank)
        self._remember_processes()
        try:
            pidfd = os.pidfd_open(slot.pid)
        except ProcessLookupError:
            self._lost([slot.local_rank])
            return
        self._pidfds[slot.local_rank] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _remember_processes(self) -> None:
        """Keep the handles of the workers, which alone know every one's exit code.

        They are asked when torch elastic has returned: two threads must not poll one of them.
        Torch elastic itself reports one worker, and not the one that was first.
        """
        children: Any = multiprocessing.process
        self._processes.update({process.pid: process for process in list(children._children)})

    def _lost(self, exited: list[int]) -> None:
        """Workers are gone; if one of them failed, find the first that did, and kill the rest.

        One that left without a word went before those that could say that they failed: they
        did so because it was gone.
        """
        if self._culprit is not None:
            return
        slots = self._board.read_slots()
        silent = [slots[rank] for rank in exited if slots[rank].outcome is Outcome.NONE]
        failed = [slot for slot in slots if slot.outcome is Outcome.FAILED]
        if not silent and not failed:
            return
        self._culprit = silent[0] if silent else min(failed, key=lambda slot: slot.left)
        self._remember_processes()
        self._board.abort(self._board.flag)
        self._kill_workers()

    def _kill_workers(self) -> None:
        parent = _forkserver_pid()
        for process in descendants():
            if process.ppid() == parent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _timeout(self) -> float | None:
        if self._incarnation is None:
            return None
        return LEARN_SECONDS if len(self._known) < self._spec.nproc else 1.0

    # -- the end of an incarnation ------------------------------------------------------------

    def _finish(self, incarnation: Incarnation) -> None:
        incarnation.join(5.0)
        self._incarnation = None
        slots = self._board.read_slots()
        verdict = self._verdict(incarnation, slots)
        self._forget_workers()
        self._sweep()
        self._send(verdict)

    def _forget_workers(self) -> None:
        for pidfd in self._pidfds.values():
            self._selector.unregister(pidfd)
            os.close(pidfd)
        self._pidfds.clear()
        self._known.clear()
        self._processes.clear()

    def _sweep(self) -> None:
        """Kill what the workers left behind: DataLoader children, user subprocesses."""
        keep = _forkserver_pid()
        kill_all(
            process
            for process in descendants()
            if process.pid != keep and not is_resource_tracker(process)
        )
        reap(keep)

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
            failed = self._culprit or next(
                (slot for slot in slots if slot.outcome is Outcome.FAILED), slots[0]
            )
        exit_code, message = 0, ""
        if failed is not None:
            process = self._processes.get(failed.pid)
            status = process.exitcode if process is not None else None
            exit_code, message = _explain(failed, status, incarnation.error)
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


def _explain(failed: Slot, status: int | None, error: BaseException | None) -> tuple[int, str]:
    """Exit code and one line for the worker that failed first.

    Args:
        status: how its process ended, if that is known; a negative number is a signal.
        error: what torch elastic raised; it names one worker, not always this one.
    """
    if failed.outcome is Outcome.FAILED:
        return failed.exit_code, failed.reason or f"exit code {failed.exit_code}"
    failures: dict[int, Any] = getattr(error, "failures", {})
    failure = failures.get(failed.rank)
    if not failed.pid:  # no worker came as far as the board: what torch elastic says is all
        failure = next(iter(failures.values()), None)
    if status is None and failure is not None:
        status = int(failure.exitcode)
    if status is None or status == 255:  # 255: its template process died with the exit status
        status = -int(signal.SIGKILL)
    if status < 0:
        return status, f"killed by {_signal_name(-status)}"
    if status == 0:
        return 0, "it left with exit code 0 before the script came to its end"
    return status, _said(failure) or f"exit code {status}"


def _said(failure: Any) -> str:
    """What torch elastic recorded of an exception before the script; empty if nothing."""
    record = getattr(failure, "error_file_data", {}).get("message", {})
    text = record.get("message", "") if isinstance(record, dict) else ""
    lines = str(text).strip().splitlines()
    return lines[0] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _exited(pidfd: int) -> bool:
    poll = selectors.PollSelector()
    try:
        poll.register(pidfd, selectors.EVENT_READ)
        return bool(poll.select(0))
    finally:
        poll.close()


def _forkserver_pid() -> int:
    # No public name; without it workers could not be told from other descendants.
    return getattr(forkserver._forkserver, "_forkserver_pid", None) or -1


def _prepare_template(preload: list[str]) -> None:
    """Start the process that workers are forked from, with its imports under way."""
    modules = ["elastic_ckpt.supervisor.template", "elastic_ckpt.supervisor.agent", WORKER_ENTRY]
    multiprocessing.set_forkserver_preload([*modules, *preload])
    # Semaphores that killed workers leave are its business, and no news for the user.
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()
    os.environ.pop("PYTHONWARNINGS")
    forkserver.ensure_running()


def main() -> None:
    """Entry point; commands come on standard input, events go to ELASTIC_CKPT_EVENTS."""
    die_with_parent()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    commands = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # Torch elastic and multiprocessing leave directories behind; the supervisor removes this one.
    tempfile.tempdir = os.environ.pop("ELASTIC_CKPT_SCRATCH")
    events = int(os.environ.pop("ELASTIC_CKPT_EVENTS"))
    os.set_inheritable(events, False)
    become_subreaper()
    agent = Agent(commands, events)
    _prepare_template(agent._spec.preload)
    import torch.distributed.launcher.api  # noqa: F401  # while the template imports too

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        # They announce, with tracebacks, what the supervisor says in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    outlive_parent()
    try:
        agent.run()
    finally:
        kill_descendants(spare_trackers=True)
        sys.stdout.flush()
        os._exit(0)  # torch elastic's thread may still wait for workers that are gone
