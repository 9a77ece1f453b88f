"""The supervisor: starts the job, hears notices, asks for saves, restarts, and says how it ended.

One thread, one loop. Signal handlers and notice sources only enqueue; agent and board are looked
at; everything that follows is done here, and the states are those of ``protocol/run_state.py``.

What happens on SIGTERM: ``_on_notice`` puts the deadline on the board and asks the agent for a
stop; the ranks agree, save, seal and leave; the agent reports; ``_on_ended`` hands over to
``ending.py``, which waits for what is in memory and not on the disk, and decides the code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import time
import uuid
from collections.abc import Callable
from typing import Final

from elastic_ckpt import __version__
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.job_lock import RunLocks
from elastic_ckpt.errors import ElasticCkptError, ExitCode
from elastic_ckpt.jobdir.node_record import IntervalRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog
from elastic_ckpt.jobdir.save_requests import ask_for_save, take_requests
from elastic_ckpt.jobdir.worker_logs import forget_old_logs
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices.platforms import make_sources
from elastic_ckpt.notices.signals import SignalSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice, may_wait
from elastic_ckpt.policy.emergency import ChoiceKind
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.policy.restart import RestartAction
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Kill, Launch, Ready
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.run_state import TERMINAL, Event, RunState
from elastic_ckpt.supervisor.agent_client import AgentProcess, worker_spec
from elastic_ckpt.supervisor.ending import Ending
from elastic_ckpt.supervisor.hang_watch import HangWatch
from elastic_ckpt.supervisor.heartbeat import Heart
from elastic_ckpt.supervisor.listener import Listener
from elastic_ckpt.supervisor.metrics.exporter import Metrics
from elastic_ckpt.supervisor.preemption import Preemption
from elastic_ckpt.supervisor.recovery_watch import RecoveryWatch
from elastic_ckpt.supervisor.restarts import Restarts
from elastic_ckpt.supervisor.run_record import Account, first_record
from elastic_ckpt.supervisor.saves.adviser import SaveAdviser
from elastic_ckpt.supervisor.saves.forecast import step_seconds
from elastic_ckpt.supervisor.saves.memory_keeper import MemoryKeeper
from elastic_ckpt.supervisor.settings import RunSettings, reload
from elastic_ckpt.supervisor.step_marks import StepMarks
from elastic_ckpt.supervisor.systemd import Service
from elastic_ckpt.util.processes import activity, become_subreaper, reap_strangers
from elastic_ckpt.util.progress import in_lines

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25

_FINAL_CODES: Final = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.UNAVAILABLE})
"""Exit codes of workers that mean the same for the whole job."""


class Supervisor:
    """One ``elastic-ckpt run``, on a node that is alone; head.py and member.py are of several."""

    def __init__(
        self,
        settings: RunSettings,
        say: Callable[[str], None],
        reread: Callable[[], RunSettings],
        rendezvous: Rendezvous | None = None,
    ) -> None:
        """Take the locks and put the directory in order.

        Args:
            say: shows one line to whoever started the run.
            reread: reads the settings again; raises UsageError if they are no longer right.
            rendezvous: where the nodes meet, for one of several.

        Raises:
            DirectoryUnusable: the directory cannot be used.
            LockHeld: another supervisor has it.
            UsageError: nobody can listen where metrics were asked for.
        """
        self._settings = settings
        self._reread = reread
        self._job = JobDirectory(settings.directory)
        self._job.prepare(group_access=settings.group_access)
        self._run_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
        self._rendezvous = rendezvous
        leads = rendezvous is None or rendezvous.leads
        self._locks = RunLocks(self._job, settings.node, self._run_id, leads=leads)
        self._journal = Journal(self._job, settings.node, follows=not leads, rotates=True)
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        self._board = Board.create(settings.nproc)
        self._hangs = HangWatch(self._board, self._journal, settings.hang_seconds, self._wake)
        self._hang: Hang | None = None
        record = self._job.node_record(settings.node)
        first = first_record(settings, self._job, self._run_id, self._board.path, leads=leads)
        self._account = Account(record, first, self._journal, say)
        self._log = ProcessLog.of_node(
            self._job, "supervisor", settings.node, lambda: {"incarnation": self._incarnation}
        ).begin()
        log.info("begins: %s, run %s, %d workers", settings.script, self._run_id, settings.nproc)
        self._metrics = Metrics(settings, self._job, self._board, self._account)
        self._memory = MemoryKeeper.open(
            settings, self._job, self._journal, self._account.say, self._wake
        )
        self._account.record.memory = self._memory.root
        self._restarts = Restarts(settings.max_failures, self._job, self._memory, self._journal)
        self._account.record.failures_left = self._restarts.policy.left
        self._ending = Ending(self._job, self._memory, self._account)
        self._service = Service()
        self._heart = Heart(self._job, settings.node, self._board)
        self._recovery = RecoveryWatch(self._board, self._journal, first.last_recovery)
        self._marks = StepMarks(self._board, self._journal)
        self._preemption = Preemption(settings.grace, self._board, self._journal, self._account)
        self._saves = SaveAdviser(settings, self._job, self._journal)
        self._account.record.save_interval = self._interval()
        self._agent: AgentProcess | None = None
        self._agent_ready = False
        self._launched = False
        self._adopting = True
        self._at_once = False
        self._asked_anew = False
        signals = SignalSource(
            settings.grace,
            is_guess="slurm" in settings.notice_sources,
            stop_at_once=self._stop_at_once,
            reload=self._reload,
        )
        others = make_sources(settings.notice_sources, settings.notice_file, settings.grace)
        self._listener = Listener(signals, others, self._journal, self._wake)

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> ExitCode:
        """Run the job to its end, or to this node's; returns the exit code."""
        become_subreaper()
        self._listener.start(time.monotonic())
        self._heart.start()
        self._metrics.start()
        previous = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._journal.write(
            "start",
            run_id=self._run_id,
            script=str(self._settings.script),
            nproc=self._settings.nproc,
            version=__version__,
            slurm_restarts=os.environ.get("SLURM_RESTART_COUNT"),
        )
        try:
            self._start_when_calm(time.monotonic())
            while self._state not in TERMINAL:
                self._wait()
                self._serve_notices()
                self._serve_agent()
                self._serve_memory()
                self._serve_clock()
                self._serve_outside()
            code = self._account.record.exit_code
            return ExitCode.FAILED if code is None else ExitCode(code)
        except BaseException:
            log.exception("the supervisor failed")
            raise
        finally:
            self._take_leave()
            self._end_agent()
            if self._settings.acknowledge and self._account.record.exit_code == 75:
                self._listener.acknowledge()
            self._saves.close()
            signal.set_wakeup_fd(previous)
            self._listener.stop()
            self._heart.stop()
            self._account.update()
            end = self._account.record
            self._journal.write(
                "end", state=end.state.value, exit_code=end.exit_code, message=end.message
            )
            self._metrics.stop()
            self._memory.close()
            log.info("ends: %s, exit code %s", end.state.value, end.exit_code)
            self._log.end()
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

    def _serve_notices(self) -> None:
        def lead() -> float:
            return self._saves.lead_seconds(self._board.read_slots())

        for word in self._listener.take_in(time.monotonic(), lead):
            match word:
                case Notice():
                    self._on_notice(word)
                case EarlyWarning():
                    self._on_warning(word)

    def _serve_agent(self) -> None:
        agent = self._agent
        if agent is None:
            return
        for event in agent.events():
            self._on_event(event)
        if agent.gone and self._state not in TERMINAL and self._agent is agent:
            self._on_agent_lost()

    def _serve_memory(self) -> None:
        self._memory.serve()
        self._ending.serve()

    def _serve_outside(self) -> None:
        """Beat, and tell systemd how it is; it waits for a save as long as that gets on."""
        now = time.monotonic()
        reap_strangers(self._agent.pid if self._agent else 0)
        self._heart.turn()
        self._service.serve(now, self._state, self._account.record.message)
        if self._state is RunState.DRAINING and self._service.is_there:
            slots = self._board.read_slots()
            seen = tuple(slot.beat for slot in slots), activity(slot.pid for slot in slots)
            step = max((step_seconds(slot) for slot in slots), default=0.0)
            self._service.stopping(now, seen, step)

    def _serve_clock(self) -> None:
        now = time.monotonic()
        if self._recovery.look(self._incarnation):
            self._account.update(last_recovery=self._recovery.last)
        self._marks.look(now)
        if self._state is RunState.DRAINING:
            if self._at_once or self._preemption.left(now) <= 0:
                self._on_expired()
            return
        if self._ending.is_decided:
            return
        self._look_for_hang()
        if self._state is RunState.BACKING_OFF and self._restarts.may_begin(now):
            self._retry()
        self._start_when_calm(now)
        if self._state is RunState.STARTING and not self._launched:
            self._serve_start(now)
        elif self._state is RunState.STARTING and self._stepping():
            self._saves.begin(now)
            step = self._first_step()
            goes_on = f", from step {step}" if step > 0 else ""
            message = f"training, incarnation {self._incarnation}{goes_on}"
            self._account.move(Event.STEPPING, message, step=step, save_interval=self._interval())
        elif self._state is RunState.RUNNING:
            if self._saves.learn(now):
                self._account.update(save_interval=self._interval())
            self._serve_running(now)

    def _start_when_calm(self, now: float) -> None:
        """Begin, unless the node is about to go: whoever runs us again would do so at once."""
        if self._agent is not None or not self._listener.is_settled(now):
            return
        self._serve_notices()  # what was told before they settled
        if self._state is RunState.STARTING and now >= self._preemption.held_until:
            self._start_agent()

    def _serve_start(self, now: float) -> None:
        """Launch, once agent and memory tier are ready."""
        if self._may_launch:
            self._launch(1)

    @property
    def _may_launch(self) -> bool:
        return self._agent_ready and (not self._adopting or self._memory.over)

    def _serve_running(self, now: float) -> None:
        """Ask for the saves that do not follow from the step number."""
        asked = False
        with contextlib.suppress(OSError):  # a disk that does not answer now
            asked = take_requests(self._job)
        if asked:
            self._memory.hurry_once()  # it may be the step that is in memory already
        if self._is_outdated and self._agent is not None:
            if not self._asked_anew:
                self._asked_anew = True
                self._agent.send(Ask(RequestKind.STOP))
            return
        due = self._saves.due(now)
        if (due or asked) and self._agent is not None:
            self._agent.send(Ask(RequestKind.SAVE_NOW if asked else RequestKind.SAVE))

    def _look_for_hang(self) -> None:
        if not self._launched or self._agent is None or self._hang is not None:
            return
        stuck = self._hangs.look()
        if stuck is not None:
            self._on_hang(Hang.of([stuck]))
            self._agent.send(Kill())

    def _on_hang(self, hang: Hang) -> None:
        self._hang = hang
        self._account.say(f"{hang.message}; stacks are in the journal")

    def _retry(self) -> None:
        self._restarts.take_an_older_one(self._account)
        self._account.move(Event.RETRY)
        if self._agent is None:
            self._start_agent()

    def _stepping(self) -> bool:
        """Whether a rank of this incarnation, not of the one before, has begun a step."""
        board = self._board
        return board.incarnation == self._incarnation and any(
            slot.first_entry for slot in board.read_slots()
        )

    def _first_step(self) -> int:
        """What the ranks go on from; -1 for a script that counts in its own way."""
        slots = self._board.read_slots()
        return max(slot.start_step if slot.declares else -1 for slot in slots)

    # -- what happens ---------------------------------------------------------------------------

    def _on_event(self, event: AgentEvent) -> None:
        match event:
            case Ready():
                self._agent_ready = True
            case Ended():
                self._on_ended(event)

    def _on_notice(self, notice: Notice) -> None:
        """This node goes away: have the job saved and ended before the deadline."""
        if may_wait(notice) and self._is_yet_to_begin:
            self._preemption.hold(notice)
            return
        first = self._preemption.notice is None
        if not self._preemption.heed(notice):
            return
        if first:
            self._ending.noticed()
            message = f"{notice.reason}: saving, {self._preemption.grace:.0f} s left"
            self._account.move(Event.NOTICE, message)
        else:
            self._account.update()
        if self._ending.is_decided:
            return
        if self._launched and self._agent is not None:
            self._save_or_drain(self._agent, first=first)
        elif first:
            self._ending.preempt(Event.STOPPED, "no worker was running", begun=False)

    @property
    def _leaves(self) -> bool:
        """Whether there is no time for what can wait; asked while something takes long."""
        self._service.alive(time.monotonic())
        return self._listener.pending or self._preemption.notice is not None

    @property
    def _is_outdated(self) -> bool:
        """Whether the ranks were told another interval than now counts."""
        agent, steps = self._agent, self._settings.interval.worker_interval
        return agent is not None and agent.interval_steps != steps

    @property
    def _is_yet_to_begin(self) -> bool:
        waits = self._agent is None and self._state is RunState.STARTING and self._adopting
        return waits and self._preemption.notice is None

    def _on_warning(self, warning: EarlyWarning) -> None:
        """This node may go away: be prepared, and train on."""
        what = f"{warning.source}: {warning.reason}"
        if self._settings.on_warning == "stop":
            deadline = time.monotonic() + self._settings.grace
            self._on_notice(Notice(warning.source, warning.reason, deadline))
        elif self._settings.on_warning == "save":
            self._account.say(f"{what}: saving early")
            with contextlib.suppress(OSError, ElasticCkptError):  # what is there already counts
                ask_for_save(self._job)

    def _save_or_drain(self, agent: AgentProcess, *, first: bool) -> None:
        """Have the ranks save and leave; if only the newest snapshot can be saved in time, that.

        Args:
            first: they were not asked yet; else there is less time than it seemed.
        """
        now = time.monotonic()
        left = self._preemption.left(now)
        kept = self._memory.not_on_disk()
        choice = self._saves.noticed(left, self._board.read_slots(), now, kept)
        log.info("%.1f s left, %s: %s", left, choice.kind.value, choice.why)
        if choice.kind is not ChoiceKind.DRAIN_NEWEST:
            # Even where nothing seems to fit: a save that is cut off costs nothing more.
            if first:
                self._memory.hold()
                agent.send(Ask(RequestKind.STOP, leaving=True))
            return
        agent.send(Kill())
        self._account.say(choice.why)
        self._ending.preempt(Event.STOPPED, choice.why)

    def _on_ended(self, ended: Ended) -> None:
        """An incarnation is over; say what follows."""
        self._launched = False
        self._recovery.look(ended.incarnation)  # its first step may be its last
        self._marks.last()
        if ended.kind is EndKind.COMPLETED and not ended.attached:
            self._account.record.sessionless = True
        self._journal.write(
            "ended",
            incarnation=ended.incarnation,
            kind=ended.kind.value,
            rank=ended.rank,
            exit_code=ended.exit_code,
            message=ended.message,
            finished=ended.finished,
        )
        if self._is_outdated:
            self._end_agent()
        if self._ending.is_decided:
            return  # what follows was decided when the notice came
        self._follow_up(ended)

    def _follow_up(self, ended: Ended) -> None:
        if ended.kind is EndKind.COMPLETED:
            self._ending.finish(lambda: self._leaves)
        elif self._state is RunState.DRAINING and ended.failed:
            detail = f"during the notice {ended.what}"
            self._ending.preempt(Event.CRASH, detail, begun=ended.stepped)
        elif self._state is RunState.DRAINING:
            self._ending.preempt(Event.STOPPED, "all ranks left together", stopped=True)
        elif not ended.failed:
            self._account.move(Event.REGROUP, f"stopped at step {ended.finished}, to begin again")
        else:
            self._recovery.failed(ended.failed_at, ended.noticed_at, ended.gone_at)
            hang = self._hang
            self._on_failure(
                Failure(
                    rank=hang.rank if hang else ended.rank,
                    exit_code=ended.exit_code,
                    message=hang.message if hang else ended.message,
                    hung=hang is not None,
                    stepped=ended.stepped,
                    steps=ended.steps,
                    step=ended.finished + 1 if ended.attached else 0,
                    out_of_memory=ended.out_of_memory,
                    lost=ended.lost,
                    tail=ended.tail,
                )
            )

    def _on_failure(self, failure: Failure) -> None:
        """A worker or the agent died outside a notice."""
        self._restarts.write_off(failure, self._account, self._ending.newest_key()[-1])
        decision, delay = self._restarts.decide(failure)
        why = decision.why or "within the budget"
        log.info("%s, %s: %s", failure.kind.value, decision.action.value, why)
        policy = self._restarts.policy
        self._account.update(failures=policy.total, failures_left=policy.left)
        culprit = f"rank {failure.rank} failed: " if failure.rank >= 0 else ""
        what = f"{culprit}{failure.message}"
        if failure.exit_code in _FINAL_CODES:
            self._ending.give_up(ExitCode(failure.exit_code), failure.message)
        elif decision.action is RestartAction.STOP:
            self._ending.give_up(ExitCode.FAILED, f"{decision.why}: {what}")
        else:
            when = f" in {delay:.1f} s" if delay >= 0.1 else ""
            self._account.move(Event.CRASH, f"{what}: restarting{when}")

    def _on_agent_lost(self) -> None:
        noticed = time.monotonic_ns()
        self._recovery.look(self._incarnation)
        slots = self._board.read_slots()
        stepped = any(slot.first_entry for slot in slots)
        steps = max((slot.finished - slot.start_step for slot in slots if slot.attached), default=0)
        self._end_agent()
        self._launched = False
        self._board.begin_incarnation(0)  # what stands there is of workers that are gone
        if self._ending.is_decided:
            return  # the job is over, and needs no agent
        if self._state is RunState.DRAINING:
            self._ending.preempt(Event.CRASH, "the agent died", begun=stepped)
        elif self._state is not RunState.BACKING_OFF:
            self._recovery.failed(noticed, noticed, time.monotonic_ns())
            self._on_failure(Failure(-1, -int(signal.SIGKILL), "the agent died", stepped, steps))

    def _on_expired(self) -> None:
        """The deadline has come, or a person does not want to wait."""
        begun = any(slot.first_entry for slot in self._board.read_slots())
        if self._agent is not None:
            self._agent.send(Kill())
        why = "stopped at once" if self._at_once else "the deadline came before all had left"
        self._ending.preempt_now(Event.EXPIRED, why, begun=begun)

    # -- doing ----------------------------------------------------------------------------------

    def _start_agent(self) -> None:
        settings = self._settings
        self._agent_ready = self._asked_anew = False
        self._agent = AgentProcess(
            worker_spec(
                settings,
                board=self._board.path,
                memory=self._memory.root,
                run_id=self._run_id,
                identity=self._identity(),
                rendezvous=self._rendezvous,
            )
        )
        self._account.update()

    def _launch(self, nodes: int) -> None:
        if self._agent is None:
            return
        self._adopting = False
        self._memory.calm()
        number = self._incarnation + 1
        self._locks.record(number)
        self._recover()
        forget_old_logs(self._job)
        self._begin_incarnation(number, nodes)
        self._agent.send(Launch(number, nodes))

    def _begin_incarnation(self, number: int, nodes: int) -> None:
        """This node's workers are about to be launched, beside those of other nodes."""
        nproc = self._settings.nproc
        self._launched, self._hang = True, None
        self._hangs.begin()
        self._marks.begin()
        self._journal.incarnation = number
        self._journal.write("launch", incarnation=number, nproc=nproc, nodes=nodes)
        message = f"launching incarnation {number}"
        where = f" on each of {nodes} nodes" if nodes > 1 else ""
        self._account.say(f"{message}: {nproc} worker(s){where}")
        self._account.update(incarnation=number, message=message)

    def _recover(self) -> None:
        """Seal what a killed run completed, remove what it did not."""
        watch = self._service.watched(in_lines(self._account.say))
        for path, what in recover(self._job, lambda: self._leaves, watch, self._memory.attempt):
            self._journal.write("recovered", path=str(path), what=what)

    def _stop_at_once(self) -> None:
        self._at_once = True

    def _reload(self) -> None:
        """Take over what the job file says by now, as far as a running job can."""
        self._service.reloading()
        try:
            found = reload(self._settings, self._reread())
        except (ElasticCkptError, OSError, ValueError, RuntimeError) as error:
            said = f"nothing changed: {error}"  # and the job trains on, whatever it was
        else:
            said, self._settings = found.said, found.settings
            self._saves.change(found.settings, time.monotonic())
            self._account.update(save_interval=self._interval())
        self._journal.write("reload", said=said)
        self._account.say(f"reload: {said}")
        self._service.reloaded()

    def _take_leave(self) -> None:
        """The run is over; whoever must know is told, bounded."""

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.end()
            self._agent = None

    # -- telling --------------------------------------------------------------------------------

    @property
    def _state(self) -> RunState:
        return self._account.state

    @property
    def _incarnation(self) -> int:
        return self._account.record.incarnation

    def _interval(self) -> IntervalRecord | None:
        found = self._saves.interval
        return None if found is None else IntervalRecord(found.seconds, found.why)

    def _identity(self) -> str:
        """What tells this job directory from others; only the head may make it."""
        with contextlib.suppress(OSError):
            return self._job.identity()
        return ""
