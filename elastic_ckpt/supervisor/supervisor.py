"""The supervisor: starts the job, hears notices, asks for saves, restarts, and says how it ended.

One thread, one loop. Signal handlers and notice sources only enqueue; agent and board are looked
at; everything that follows is done here, and the states are those of ``core/run_state.py``.

What happens on SIGTERM: ``_on_notice`` puts the deadline on the board and asks the agent for a
stop; the ranks agree, save, seal and leave; the agent reports; ``_on_ended`` has what is in the
memory tier brought to the disk (``_when_on_disk``), and ``_preempted`` decides the code.
"""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Final

from elastic_ckpt.board import Board
from elastic_ckpt.core.agreement import RequestKind
from elastic_ckpt.core.deadline import Notice, kill_time, tightest
from elastic_ckpt.core.emergency import ChoiceKind
from elastic_ckpt.core.progress import in_lines
from elastic_ckpt.core.restart import Failure, RestartBudget
from elastic_ckpt.core.run_state import TERMINAL, Event, RunState, advance
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.notices.signals import SignalSource
from elastic_ckpt.store.catalog import CheckpointView, newest_valid
from elastic_ckpt.store.journal import Journal
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.locks import RunLocks
from elastic_ckpt.store.memory import Sealed
from elastic_ckpt.store.records import (
    IntervalRecord,
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
    read_record,
)
from elastic_ckpt.store.recovery import recover
from elastic_ckpt.store.requests import take_requests
from elastic_ckpt.supervisor.agent_process import AgentProcess
from elastic_ckpt.supervisor.memory_keeper import NOTHING, MemoryKeeper
from elastic_ckpt.supervisor.messages import Ask, Ended, EndKind, Kill, Launch, Ready, WorkerSpec
from elastic_ckpt.supervisor.processes import become_subreaper
from elastic_ckpt.supervisor.recovery import RecoveryWatch
from elastic_ckpt.supervisor.save_adviser import SaveAdviser
from elastic_ckpt.supervisor.settings import RunSettings

TICK_SECONDS: Final = 0.25
_FINAL_CODES: Final = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.UNAVAILABLE})
"""Exit codes of workers that mean the same for the whole job."""


class Supervisor:
    """One ``elastic-ckpt run`` on one node."""

    def __init__(self, settings: RunSettings, say: Callable[[str], None]) -> None:
        """Take the locks and put the directory in order.

        Args:
            say: shows one line to whoever started the run.

        Raises:
            DirectoryUnusable: the directory cannot be used.
            LockHeld: another supervisor has it.
        """
        self._settings = settings
        self._listener = say
        self._job = JobDirectory(settings.directory)
        self._job.prepare(group_access=settings.group_access)
        self._run_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
        self._locks = RunLocks(self._job, settings.node, self._run_id)
        self._journal = Journal(self._job, settings.node)
        previous = read_record(self._job.node_record(settings.node))
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        self._memory = MemoryKeeper.open(settings, self._job, self._journal, self._say, self._wake)
        self._board = Board.create(settings.nproc)
        last = previous.last_recovery if previous else None
        self._recovery = RecoveryWatch(self._board, self._journal, last)
        self._state = RunState.STARTING
        self._incarnation = previous.incarnation if previous else 0
        self._preemptions = previous.preemptions if previous else 0
        self._budget = RestartBudget(settings.max_failures)
        self._jitter = random.Random()
        self._notices: deque[Notice] = deque()
        self._notice: Notice | None = None
        self._notice_grace = settings.grace
        self._before_notice = NOTHING
        self._retry_at = 0.0
        self._saves = SaveAdviser(settings, self._job, self._journal)
        self._exit_code: ExitCode | None = None
        self._message = "starting"
        self._sessionless = False
        self._since = time.time()
        self._agent: AgentProcess | None = None
        self._agent_ready = False
        self._launched = False
        self._adopting = True
        self._then: Callable[[], None] | None = None
        self._at_once = False
        self._signals = SignalSource(
            settings.grace, stop_at_once=self._stop_at_once, reload=self._reload
        )

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> ExitCode:
        """Run the job to its end, or to this node's; returns the exit code."""
        become_subreaper()
        self._signals.start(self._notices.append)
        previous = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._journal.write("start", run_id=self._run_id, script=str(self._settings.script))
        try:
            self._start_agent()
            while self._state not in TERMINAL:
                self._wait()
                self._signals.deliver()
                while self._notices:
                    self._on_notice(self._notices.popleft())
                self._serve_agent()
                self._serve_memory()
                self._serve_clock()
            return self._exit_code if self._exit_code is not None else ExitCode.FAILED
        finally:
            self._end_agent()
            self._saves.close()
            signal.set_wakeup_fd(previous)
            self._signals.stop()
            self._write_record()
            self._journal.write(
                "end", state=self._state.value, exit_code=self._exit_code, message=self._message
            )
            self._memory.close()
            self._locks.release()

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            agent = self._agent.fd if self._agent else None
            for fd in (self._wake_read, self._memory.bell, agent):
                if fd is not None:
                    selector.register(fd, selectors.EVENT_READ)
            selector.select(TICK_SECONDS)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: the run is over
            os.write(self._wake_write, b"x")

    def _serve_agent(self) -> None:
        agent = self._agent
        if agent is None:
            return
        for event in agent.events():
            match event:
                case Ready():
                    self._agent_ready = True
                case Ended():
                    self._on_ended(event)
        if agent.gone and self._state not in TERMINAL and self._agent is agent:
            self._on_agent_lost()

    def _serve_memory(self) -> None:
        self._memory.serve()
        if self._then is not None and self._memory.over:
            then, self._then = self._then, None
            then()

    def _serve_clock(self) -> None:
        now = time.monotonic()
        if self._recovery.look(self._incarnation):
            self._write_record()
        if self._state is RunState.DRAINING and self._notice is not None:
            if self._at_once or now >= kill_time(self._notice, self._notice_grace):
                self._on_expired()
            return
        if self._then is not None:
            return
        if self._state is RunState.BACKING_OFF and now >= self._retry_at:
            self._move(Event.RETRY, "restarting")
            if self._agent is None:
                self._start_agent()
        if self._state is RunState.STARTING and not self._launched:
            if self._agent_ready and (not self._adopting or self._memory.over):
                self._launch()
        elif self._state is RunState.STARTING and self._stepping():
            self._saves.begin(now)
            self._move(Event.STEPPING, f"training, incarnation {self._incarnation}")
        elif self._state is RunState.RUNNING:
            if self._saves.learn(now):
                self._write_record()
            self._ask_for_saves(now)

    def _stepping(self) -> bool:
        """Whether a rank of this incarnation, not of the one before, has begun a step."""
        board = self._board
        return board.incarnation == self._incarnation and any(
            slot.first_entry for slot in board.read_slots()
        )

    # -- what happens ---------------------------------------------------------------------------

    def _on_notice(self, notice: Notice) -> None:
        """This node goes away: have the job saved and ended before the deadline."""
        first = self._notice is None
        chosen = tightest(self._notice, notice)
        if chosen is self._notice:
            return
        self._notice = chosen
        self._notice_grace = max(0.0, chosen.deadline - time.monotonic())
        self._board.deadline = chosen.deadline
        self._journal.write(
            "notice", source=notice.source, reason=notice.reason, seconds=self._notice_grace
        )
        if not first:
            self._write_record()
            return
        self._before_notice = self._disk_key()
        message = f"{notice.reason}: saving, {self._notice_grace:.0f} s left"
        self._move(Event.NOTICE, message)
        if self._launched and self._agent is not None:
            self._save_or_drain(self._agent, chosen)
        elif self._then is None:  # else the job is over already
            what = "no worker was running"
            self._when_on_disk(lambda: self._preempted(Event.STOPPED, what, begun=False))

    def _save_or_drain(self, agent: AgentProcess, notice: Notice) -> None:
        """Have the ranks save and leave; if only the newest snapshot can be saved in time, that."""
        now = time.monotonic()
        left = kill_time(notice, self._notice_grace) - now
        kept = self._memory.not_on_disk()
        choice = self._saves.noticed(left, self._board.read_slots(), now, kept)
        if choice.kind is not ChoiceKind.DRAIN_NEWEST:
            # Even where nothing seems to fit: a save that is cut off costs nothing more.
            self._memory.hold()
            agent.send(Ask(RequestKind.STOP))
            return
        agent.send(Kill())
        self._say(choice.why)
        self._when_on_disk(lambda: self._preempted(Event.STOPPED, choice.why))

    def _on_ended(self, ended: Ended) -> None:
        """An incarnation is over; say what follows."""
        self._launched = False
        self._recovery.look(ended.incarnation)  # its first step may be its last
        self._sessionless = self._sessionless or (
            not ended.attached and ended.kind is EndKind.COMPLETED
        )
        self._journal.write(
            "ended",
            incarnation=ended.incarnation,
            kind=ended.kind.value,
            rank=ended.rank,
            exit_code=ended.exit_code,
            message=ended.message,
            finished=ended.finished,
        )
        if self._then is not None:
            return  # what follows was decided when the notice came
        if ended.kind is EndKind.COMPLETED:
            self._when_on_disk(self._finished)
        elif self._state is RunState.DRAINING:
            self._when_on_disk(lambda: self._on_drained(ended))
        else:
            self._recovery.failed(ended.failed_at, ended.noticed_at, ended.gone_at)
            self._on_failure(
                Failure(ended.rank, ended.exit_code, ended.message, ended.stepped, ended.steps)
            )

    def _on_drained(self, ended: Ended) -> None:
        if ended.kind is EndKind.CRASHED:
            detail = f"rank {ended.rank} failed during the notice: {ended.message}"
            self._preempted(Event.CRASH, detail, begun=ended.stepped)
        else:
            self._preempted(Event.STOPPED, "all ranks left together", stopped=True)

    def _when_on_disk(self, then: Callable[[], None]) -> None:
        """Go on when all that the memory tier holds is on the disk, or cannot get there."""
        self._then = then
        self._memory.hurry()
        if not self._memory.over:
            self._message = "bringing the newest checkpoint from memory to the disk"
            self._write_record()
        self._serve_memory()

    def _finished(self) -> None:
        kept = self._only_in_memory()
        if kept is not None:
            self._exit_code = ExitCode.FAILED
            why = f"{_where(kept)}: mend the storage and run again, on this node"
            self._move(Event.GIVE_UP, f"the work is done, but {why}")
            return
        self._memory.finish_pruning(lambda: self._signals.pending or self._notice is not None)
        self._exit_code = ExitCode.FINISHED
        self._move(Event.COMPLETED, "finished")

    def _on_failure(self, failure: Failure) -> None:
        """A worker or the agent died outside a notice."""
        self._write_off(failure)
        within_budget = self._budget.spend(failure)
        culprit = f"rank {failure.rank} failed: " if failure.rank >= 0 else ""
        what = f"{culprit}{failure.message}"
        if failure.exit_code in _FINAL_CODES:
            self._give_up(ExitCode(failure.exit_code), failure.message)
            return
        if not within_budget:
            count = self._budget.total
            why = f"{count} failure{'s' if count > 1 else ''}" if failure.retryable else "no retry"
            self._give_up(ExitCode.FAILED, f"{why}: {what}")
            return
        delay = self._budget.backoff_seconds(self._jitter)
        self._retry_at = time.monotonic() + delay
        self._move(Event.CRASH, f"{what}: restarting in {delay:.1f} s")

    def _on_agent_lost(self) -> None:
        noticed = time.monotonic_ns()
        self._recovery.look(self._incarnation)
        slots = self._board.read_slots()
        stepped = any(slot.first_entry for slot in slots)
        steps = max((slot.finished - slot.start_step for slot in slots if slot.attached), default=0)
        self._end_agent()
        self._launched = False
        self._board.begin_incarnation(0)  # what stands there is of workers that are gone
        if self._then is not None:
            return  # the job is over, and needs no agent
        if self._state is RunState.DRAINING:
            what = "the agent died"
            self._when_on_disk(lambda: self._preempted(Event.CRASH, what, begun=stepped))
        elif self._state is not RunState.BACKING_OFF:
            self._recovery.failed(noticed, noticed, time.monotonic_ns())
            self._on_failure(Failure(-1, -int(signal.SIGKILL), "the agent died", stepped, steps))

    def _on_expired(self) -> None:
        """The deadline has come, or a person does not want to wait."""
        self._then = None
        begun = any(slot.first_entry for slot in self._board.read_slots())
        if self._agent is not None:
            self._agent.send(Kill())
        self._end_agent()
        why = "stopped at once" if self._at_once else "the deadline came before all had left"
        self._preempted(Event.EXPIRED, why, begun=begun)

    # -- doing ----------------------------------------------------------------------------------

    def _start_agent(self) -> None:
        settings = self._settings
        self._agent_ready = False
        self._agent = AgentProcess(
            WorkerSpec(
                script=str(settings.script),
                args=list(settings.args),
                directory=str(settings.directory),
                job=settings.name,
                node=settings.node,
                board=self._board.path,
                nproc=settings.nproc,
                preload=list(settings.preload),
                learn_preload=settings.learn_preload,
                save_interval_steps=settings.interval.steps,
                retention=settings.retention,
                memory=self._memory.root,
            )
        )
        self._write_record()

    def _launch(self) -> None:
        if self._agent is None:
            return
        self._launched, self._adopting = True, False
        self._memory.calm()
        self._incarnation += 1
        self._locks.record(self._incarnation)
        self._recover()
        self._journal.write("launch", incarnation=self._incarnation, nproc=self._settings.nproc)
        self._message = f"launching incarnation {self._incarnation}"
        self._say(f"{self._message}: {self._settings.nproc} worker(s)")
        self._write_record()
        self._agent.send(Launch(self._incarnation))

    def _recover(self) -> None:
        """Seal what a killed run completed, remove what it did not."""
        hurry, watch = lambda: self._signals.pending, in_lines(self._say)
        for path, what in recover(self._job, hurry, watch, self._memory.attempt):
            self._journal.write("recovered", path=str(path), what=what)

    def _ask_for_saves(self, now: float) -> None:
        asked = False
        with contextlib.suppress(OSError):  # a disk that does not answer now
            asked = take_requests(self._job)
        if asked:
            self._memory.hurry_once()  # it may be the step that is in memory already
        due = self._saves.due(now)
        if (due or asked) and self._agent is not None:
            self._agent.send(Ask(RequestKind.SAVE_NOW if asked else RequestKind.SAVE))

    def _stop_at_once(self) -> None:
        self._at_once = True

    def _reload(self) -> None:
        self._journal.write("reload")

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.end()
            self._agent = None

    def _newest_key(self) -> tuple[int, int]:
        """(epoch, step) of what a restart would take, from either tier."""
        return max(self._disk_key(), self._memory.newest_key())

    def _only_in_memory(self) -> Sealed | None:
        """What would be lost with this machine: newer than all that the disk has."""
        kept = self._memory.not_on_disk()
        return kept if kept is not None and kept.key > self._disk_key() else None

    def _disk_key(self) -> tuple[int, int]:
        newest = self._newest()
        return (newest.epoch, newest.step) if newest else NOTHING

    def _newest(self) -> CheckpointView | None:
        """The newest on disk that is valid; None too if the disk does not answer now.

        That is no reason to take down a job which trains, or to miss its stop.
        """
        try:
            return newest_valid(self._job)
        except OSError:
            return None

    # -- telling --------------------------------------------------------------------------------

    def _preempted(
        self, event: Event, detail: str, *, stopped: bool = False, begun: bool = True
    ) -> None:
        """End the run on a notice, with 75 if what has been done is on the disk, else with 76.

        Args:
            stopped: the ranks left at the agreed step, where a checkpoint stands.
            begun: a step was begun since the ranks resumed; if not, the old checkpoint counts.
        """
        self._move(event, "")
        newest, kept = self._newest(), self._only_in_memory()
        new = self._disk_key() > self._before_notice
        saved = kept is None and (new or (newest is not None and (stopped or not begun)))
        self._preemptions += 1
        self._exit_code = ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED
        what = "preempted, saved" if saved else "preempted without a new checkpoint"
        step = f" (newest valid: step {newest.step})" if newest else ""
        self._message = f"{what}: {detail}{step}" + (f"; {_where(kept)}" if kept else "")
        self._say(self._message)
        self._write_record()

    def _give_up(self, code: ExitCode, message: str) -> None:
        def say_so() -> None:
            kept = self._only_in_memory()
            self._exit_code = code
            self._move(Event.GIVE_UP, message + (f"; {_where(kept)}" if kept else ""))

        self._when_on_disk(say_so)

    def _write_off(self, failure: Failure) -> None:
        """Journal a failure and the work that it cost."""
        self._journal.write(
            "crash",
            rank=failure.rank,
            exit_code=failure.exit_code,
            message=failure.message,
            restart_step=self._newest_key()[-1],
        )

    def _say(self, line: str) -> None:
        # Whoever started the run may be gone: a terminal that hung up, the end of a pipe.
        with contextlib.suppress(OSError):
            self._listener(line)

    def _move(self, event: Event, message: str) -> None:
        before = self._state
        self._state = advance(before, event)
        if message:
            self._message = message
            self._say(message)
        if self._state is not before:
            self._journal.write("state", state=self._state.value, message=self._message)
        self._write_record()

    def _write_record(self) -> None:
        notice, interval = self._notice, self._saves.interval
        record = NodeRecord(
            job=self._settings.name,
            run_id=self._run_id,
            node=self._settings.node,
            owner=ProcessIdentity.current(),
            since=self._since,
            state=self._state,
            incarnation=self._incarnation,
            board=self._board.path,
            exit_code=None if self._exit_code is None else int(self._exit_code),
            message=self._message,
            notice=None
            if notice is None
            else NoticeRecord(notice.source, notice.reason, notice.deadline),
            failures=self._budget.total,
            preemptions=self._preemptions,
            failures_left=self._budget.left,
            sessionless=self._sessionless,
            memory=self._memory.root,
            last_recovery=self._recovery.last,
            grace=self._settings.grace,
            save_interval=None
            if interval is None
            else IntervalRecord(interval.seconds, interval.why),
        )
        # The record is for people; a full disk must not keep the job from being saved.
        with contextlib.suppress(OSError):
            record.write(self._job.node_record(self._settings.node))


def _where(kept: Sealed) -> str:
    """What becomes of a checkpoint that did not get to the disk."""
    return f"step {kept.seal.step} is in memory only, in {kept.generation.slot}"
