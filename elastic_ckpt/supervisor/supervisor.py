"""The supervisor: starts the job, serves notices, asks for saves, restarts, decides how it ends.

One thread, one loop. Signal handlers and notice sources only enqueue; agent and board are polled;
everything that follows is done here, and the states are those of ``protocol/run_state.py``. The
world is behind ``ports.py``: ``wiring.py`` has the real one, ``tests/simulation`` another.

What happens on SIGTERM: ``_on_notice`` puts the deadline on the board and asks the agent for a
stop, and only then accounts for it; the ranks agree, save, seal and leave; the agent reports;
``_on_ended`` hands over to ``shutdown.py``, which waits until what is in memory is on the disk,
and decides the exit code.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable
from typing import Final

from elastic_ckpt import __version__
from elastic_ckpt.errors import ElasticCkptError, ExitCode
from elastic_ckpt.jobdir.node_record import IntervalRecord
from elastic_ckpt.journal.events import (
    IncarnationEnded,
    JobFileReloaded,
    RunEnded,
    RunStarted,
    WorkersLaunched,
)
from elastic_ckpt.policy.deadline import EarlyWarning, Notice, Reload, StopNow, may_wait
from elastic_ckpt.policy.emergency import ChoiceKind
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.policy.restart import RestartAction
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Kill, Launch, Ready
from elastic_ckpt.protocol.run_state import TERMINAL, Event, RunState
from elastic_ckpt.supervisor.cluster.role import Role
from elastic_ckpt.supervisor.ports import AgentPort, Ports
from elastic_ckpt.supervisor.preemption import Preemption
from elastic_ckpt.supervisor.restarts import Restarts
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.supervisor.saves.adviser import SaveAdviser
from elastic_ckpt.supervisor.saves.forecast import step_seconds
from elastic_ckpt.supervisor.settings import RunSettings, reload
from elastic_ckpt.supervisor.shutdown import Shutdown
from elastic_ckpt.supervisor.watch.hang_watch import HangWatch
from elastic_ckpt.supervisor.watch.recovery_watch import RecoveryWatch
from elastic_ckpt.supervisor.watch.step_marks import StepMarks

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25

CLOSE_SECONDS: Final = 2.0
"""How long the storage may take for the run's last writes."""

_FINAL_CODES: Final = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.UNAVAILABLE})
"""Exit codes of workers that mean the same for the whole job."""


class Supervisor:
    """One ``elastic-ckpt run`` on one node. Its role says what it does besides with other nodes.

    :meth:`run` is the loop; the simulation calls :meth:`begin`, :meth:`turn` and :meth:`finish`.

    Attributes:
        settings: as given, or as the job file said at the last reload.
        record: what the run reports about itself.
        agent: the running agent; None between two.
        is_launched: whether this node has workers.
    """

    def __init__(
        self,
        settings: RunSettings,
        ports: Ports,
        record: RunRecord,
        role: Role,
        reread: Callable[[], RunSettings],
    ) -> None:
        """
        Args:
            reread: reads the settings again; raises UsageError if they are no longer right.
        """
        clock, board, journal, memory = ports.clock, ports.board, ports.journal, ports.memory
        self.settings = settings
        self.ports = ports
        self.record = record
        self.role = role
        self.agent: AgentPort | None = None
        self.is_launched = False
        self.hangs = HangWatch(board, journal, settings.hang_seconds, ports.host, clock)
        self.preemption = Preemption(settings.grace, clock, board, journal, record)
        self.shutdown = Shutdown(ports.directory, memory, record, self.preemption.patience)
        self._reread = reread
        self._restarts = Restarts(settings.max_failures, clock, ports.directory, memory, journal)
        self._recovery = RecoveryWatch(board, journal, record.node.last_recovery)
        self._marks = StepMarks(clock, board, journal)
        self._saves = SaveAdviser(settings, clock, ports.directory, journal)
        self._hang: Hang | None = None
        self._agent_ready = False
        self._adopting = True  # what a killed run left in memory is being drained
        self._cleaning = False
        self._stop_now = False
        self._asked_anew = False
        self._saved_step = -1
        record.node.failures_left = self._restarts.policy.left
        record.node.save_interval = self._interval()

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> ExitCode:
        """Run the job to its end, or to this node's; return the exit code."""
        try:
            self.begin()
            while not self.is_over:
                self._wait()
                self.turn()
        except BaseException:
            log.exception("the supervisor failed")
            raise
        finally:
            self.finish()
        code = self.record.node.exit_code
        return ExitCode.FAILED if code is None else ExitCode(code)

    def begin(self) -> None:
        """Start listening, and the job unless a notice is pending."""
        now = self.now
        self.ports.listener.start(now)
        self.ports.host.start()
        self.ports.journal.write(
            RunStarted(
                run_id=self.record.node.run_id,
                script=str(self.settings.script),
                nproc=self.settings.nproc,
                version=__version__,
                slurm_restarts=os.environ.get("SLURM_RESTART_COUNT"),
            )
        )
        self.record.update()
        self.role.begin(self)
        self._start_when_calm(now)

    def turn(self) -> None:
        """Do what has become due since the last turn. Never blocks."""
        if self.state in TERMINAL:
            self.serve_agent()
            return
        self._serve_notices()
        self.serve_agent()
        self.ports.memory.serve()
        self.shutdown.serve()
        self._serve_clock()
        self._serve_watchers()
        if self.state in TERMINAL:
            self.role.announce_end(self)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, and the other nodes know."""
        return self.state in TERMINAL and self.role.has_left(self)

    def finish(self) -> None:
        """Take everything down; bounded."""
        self._end_agent()
        if self.settings.acknowledge and self.record.node.exit_code == ExitCode.PREEMPTED_SAVED:
            self.ports.listener.acknowledge()
        self.ports.directory.catch_up(self.preemption.patience(1.0))
        self._saves.close()
        self.ports.listener.stop()
        end = self.record.node
        self.ports.journal.write(
            RunEnded(
                state=end.state.value,
                exit_code=end.exit_code,
                message=end.message,
            )
        )
        self.record.update()
        self.ports.memory.close()
        log.info("ended: %s, exit code %s", end.state.value, end.exit_code)
        self.ports.directory.close(self.preemption.patience(CLOSE_SECONDS))
        self.ports.host.stop()

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self.ports.clock.monotonic()

    def next_due(self) -> float:
        """Return the seconds until a turn must come, by what is known beforehand."""
        now = self.now
        if self.state is RunState.DRAINING:
            return max(0.0, self.preemption.left(now))
        if self.state is RunState.BACKING_OFF and self._restarts.next_at > now:
            return self._restarts.next_at - now
        return self.role.seconds_to_leave(self) if self.state in TERMINAL else math.inf

    def _wait(self) -> None:
        agent = self.agent.fd if self.agent else None
        self.ports.host.wait((self.ports.memory.bell, agent), min(TICK_SECONDS, self.next_due()))

    def _serve_notices(self) -> None:
        def lead() -> float:
            return self._saves.lead_seconds(self.ports.board.read_slots())

        for word in self.ports.listener.take_in(self.now, lead):
            match word:
                case Notice():
                    self._on_notice(word)
                case EarlyWarning():
                    self._on_warning(word)
                case StopNow():
                    self._stop_now = True
                case Reload():
                    self._on_reload()

    def serve_agent(self) -> None:
        """Take in what the agent has reported."""
        agent = self.agent
        if agent is None:
            return
        for event in agent.events():
            if not self.role.on_event(self, event):
                self._on_event(event)
        if agent.gone and self.state not in TERMINAL and self.agent is agent:
            self._on_agent_lost()

    def _serve_watchers(self) -> None:
        """Beat, and report to systemd, which waits for a save as long as it makes progress."""
        now, service, board = self.now, self.ports.service, self.ports.board
        self.ports.host.turn(self.agent.pid if self.agent else 0)
        service.serve(now, self.state, self.record.node.message)
        if self.state is RunState.DRAINING and service.is_there:
            slots = board.read_slots()
            active = self.ports.host.activity(slot.pid for slot in slots)
            step = max((step_seconds(slot) for slot in slots), default=0.0)
            service.stopping(now, (tuple(slot.beat for slot in slots), active), step)

    def _serve_clock(self) -> None:
        now = self.now
        if self._recovery.poll(self.incarnation):
            self.record.update(last_recovery=self._recovery.last)
        self._marks.poll(now)
        if self.state is RunState.DRAINING:
            if self._stop_now or self.preemption.left(now) <= 0:
                self._on_expired()
            return
        if self.shutdown.is_decided:
            return
        self.role.look_for_hang(self)
        if self.state is RunState.BACKING_OFF and self._restarts.may_begin(now):
            self._retry()
        self._start_when_calm(now)
        if self.state is RunState.STARTING and not self.is_launched:
            self.role.serve_start(self, now)
        elif self.state is RunState.STARTING and self._is_stepping():
            self._on_stepping(now)
        elif self.state is RunState.RUNNING:
            if self._saves.learn():
                self.record.update(save_interval=self._interval())
            self._note_saves()
            self.role.serve_running(self, now)

    def _on_stepping(self, now: float) -> None:
        self._saves.begin(now)
        slots = self.ports.board.read_slots()
        # A script that counts steps in its own way has none to resume from.
        step = max(slot.start_step if slot.declares else -1 for slot in slots)
        resumed = f", from step {step}" if step > 0 else ""
        message = f"training, incarnation {self.incarnation}{resumed}"
        self.record.move(Event.STEPPING, message, step=step, save_interval=self._interval())

    def _note_saves(self) -> None:
        """Have the disk scanned when the ranks have saved: a notice must not wait for a scan."""
        saved = self._newest_saved_step()
        if saved != self._saved_step:
            self._saved_step = saved
            self.ports.directory.scan()

    def _newest_saved_step(self) -> int:
        return max(slot.saved_step for slot in self.ports.board.read_slots())

    def _start_when_calm(self, now: float) -> None:
        """Start, unless the node is about to go: a requeued run would only start the same again."""
        if self.agent is not None or not self.ports.listener.is_settled(now):
            return
        self._serve_notices()  # what arrived before the sources settled
        if self.state is RunState.STARTING and now >= self.preemption.held_until:
            self._start_agent()

    def serve_saves(self, now: float) -> None:
        """Ask for the saves that do not follow from the step number."""
        asked = self.ports.directory.take_save_request()
        if asked:
            self.ports.memory.hurry_once()  # it may be the step that is in memory already
        if self.agent is None:
            return
        if self._is_outdated:
            if not self._asked_anew:
                self._asked_anew = True
                self.agent.send(Ask(RequestKind.STOP))
            return
        if self._saves.due(now) or asked:
            self.agent.send(Ask(RequestKind.SAVE_NOW if asked else RequestKind.SAVE))

    def on_hang(self, hang: Hang) -> None:
        """Remember what hangs; its workers are being killed."""
        self._hang = hang
        self.record.say(f"{hang.message}; stacks are in the journal")

    def _retry(self) -> None:
        self._restarts.take_an_older_one(self.record)
        self.record.move(Event.RETRY)
        if self.agent is None:
            self._start_agent()

    def _is_stepping(self) -> bool:
        """Return whether a rank of this incarnation, not of an earlier one, has begun a step."""
        board = self.ports.board
        return board.incarnation == self.incarnation and any(
            slot.first_entry for slot in board.read_slots()
        )

    # -- what happens ---------------------------------------------------------------------------

    def _on_event(self, event: AgentEvent) -> None:
        match event:
            case Ready():
                self._agent_ready = True
            case Ended():
                self._on_ended(event)

    def _on_notice(self, notice: Notice) -> None:
        """This node goes away: have the job saved and ended before the deadline.

        Nothing touches the disk before the deadline is on the board and the ask is on its way.
        """
        if may_wait(notice) and self._is_yet_to_start:
            self.preemption.hold(notice)
            return
        first = self.preemption.notice is None
        if not self.preemption.take(notice):
            return
        drains = ""
        if first:
            self.shutdown.notice_arrived(self._newest_saved_step())
        if self.is_launched and self.agent is not None and not self.shutdown.is_decided:
            drains = self._save_or_drain(self.agent, first=first)
        if first:
            message = f"{notice.reason}: saving, {self.preemption.grace:.0f} s left"
            self.record.move(Event.NOTICE, message)
        else:
            self.record.update()
        if drains:
            self.record.say(drains)
            self.shutdown.preempt(Event.STOPPED, drains)
        elif first and not self.is_launched and not self.shutdown.is_decided:
            self.shutdown.preempt(Event.STOPPED, "no worker was running", stepped=False)

    def _save_or_drain(self, agent: AgentPort, *, first: bool) -> str:
        """Have the ranks save and leave; if only the newest snapshot can be saved in time, that.

        Args:
            first: they were not asked yet; else there is less time than it seemed.

        Returns:
            Why the newest snapshot is drained instead, the ranks being killed; else empty.
        """
        now = self.now
        left = self.preemption.left(now)
        kept = self.ports.memory.not_on_disk()
        choice = self._saves.noticed(left, self.ports.board.read_slots(), now, kept)
        log.info("%.1f s left, %s: %s", left, choice.kind.value, choice.why)
        if choice.kind is ChoiceKind.DRAIN_NEWEST:
            agent.send(Kill())
            return choice.why
        # Even where nothing seems to fit: a save that is cut off costs nothing more.
        if first:
            self.ports.memory.hold()
            agent.send(Ask(RequestKind.STOP, leaving=True))
        return ""

    @property
    def leaves(self) -> bool:
        """Whether there is no time for what can wait; called while something takes long."""
        self.ports.service.alive(self.now)
        return self.ports.listener.pending or self.preemption.notice is not None

    @property
    def _is_outdated(self) -> bool:
        """Whether the ranks were launched with another interval than now counts."""
        agent, steps = self.agent, self.settings.interval.worker_interval
        return agent is not None and agent.interval_steps != steps

    @property
    def _is_yet_to_start(self) -> bool:
        waits = self.agent is None and self.state is RunState.STARTING and self._adopting
        return waits and self.preemption.notice is None

    def _on_warning(self, warning: EarlyWarning) -> None:
        """This node may go away: be prepared, and train on."""
        what = f"{warning.source}: {warning.reason}"
        if self.settings.on_warning == "stop":
            deadline = self.now + self.settings.grace
            self._on_notice(Notice(warning.source, warning.reason, deadline))
        elif self.settings.on_warning == "save":
            self.ports.directory.request_save()
            self.record.say(f"{what}: saving early")

    def _on_reload(self) -> None:
        """Take over what the job file says by now, as far as a running job can."""
        self.ports.service.reloading()
        try:
            found = reload(self.settings, self._reread())
        except (ElasticCkptError, OSError, ValueError, RuntimeError) as error:
            said = f"nothing changed: {error}"  # and the job trains on, whatever it was
        else:
            said, self.settings = found.said, found.settings
            self._saves.change(found.settings, self.now)
            self.record.update(save_interval=self._interval())
        self.ports.journal.write(JobFileReloaded(said=said))
        self.record.say(f"reload: {said}")
        self.ports.service.reloaded()

    def _on_ended(self, ended: Ended) -> None:
        """An incarnation is over; do what follows."""
        self.is_launched = False
        self._recovery.poll(ended.incarnation)  # its first step may be its last
        self._marks.last()
        if ended.kind is EndKind.COMPLETED and not ended.attached:
            self.record.node.sessionless = True
        self.ports.journal.write(
            IncarnationEnded(
                incarnation=ended.incarnation,
                kind=ended.kind.value,
                rank=ended.rank,
                exit_code=ended.exit_code,
                message=ended.message,
                finished=ended.finished,
            )
        )
        self.role.on_ended(self)
        if self._is_outdated:
            self._end_agent()
        if not self.shutdown.is_decided:  # else what follows was decided when the notice came
            self.role.follow_up(self, ended)

    def follow_up(self, ended: Ended) -> None:
        """Decide what follows the end of an incarnation."""
        if ended.kind is EndKind.COMPLETED:
            self.shutdown.finish(lambda: self.leaves)
        elif self.state is RunState.DRAINING and ended.failed:
            detail = f"during the notice {ended.what}"
            self.shutdown.preempt(Event.CRASH, detail, stepped=ended.stepped)
        elif self.state is RunState.DRAINING:
            self.shutdown.preempt(Event.STOPPED, "all ranks left together", stopped=True)
        elif not ended.failed:
            self.record.move(Event.REGROUP, f"stopped at step {ended.finished}, to restart")
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
        self._restarts.write_off(failure, self.record, self.shutdown.newest_key()[-1])
        decision, delay = self._restarts.decide(failure)
        why = decision.why or "within the budget"
        log.info("%s, %s: %s", failure.kind.value, decision.action.value, why)
        policy = self._restarts.policy
        self.record.update(failures=policy.total, failures_left=policy.left)
        culprit = f"rank {failure.rank} failed: " if failure.rank >= 0 else ""
        what = f"{culprit}{failure.message}"
        if failure.exit_code in _FINAL_CODES:
            self.shutdown.give_up(ExitCode(failure.exit_code), failure.message)
        elif decision.action is RestartAction.STOP:
            self.shutdown.give_up(ExitCode.FAILED, f"{decision.why}: {what}")
        else:
            when = f" in {delay:.1f} s" if delay >= 0.1 else ""
            self.record.move(Event.CRASH, f"{what}: restarting{when}")

    def _on_agent_lost(self) -> None:
        self.role.on_agent_lost(self)
        noticed = self.ports.clock.monotonic_ns()
        self._recovery.poll(self.incarnation)
        slots = self.ports.board.read_slots()
        stepped = any(slot.first_entry for slot in slots)
        steps = max((slot.finished - slot.start_step for slot in slots if slot.attached), default=0)
        self._end_agent()
        self.is_launched = False
        self.ports.board.begin_incarnation(0)  # the slots are of workers that are gone
        if self.shutdown.is_decided:
            return  # the job is over, and needs no agent
        if self.state is RunState.DRAINING:
            self.shutdown.preempt(Event.CRASH, "the agent died", stepped=stepped)
        elif self.state is not RunState.BACKING_OFF:
            self._recovery.failed(noticed, noticed, self.ports.clock.monotonic_ns())
            self._on_failure(Failure(-1, -int(signal.SIGKILL), "the agent died", stepped, steps))

    def _on_expired(self) -> None:
        """The deadline has come, or the user does not want to wait."""
        stepped = any(slot.first_entry for slot in self.ports.board.read_slots())
        if self.agent is not None:
            self.agent.send(Kill())
        why = "stopped at once" if self._stop_now else "the deadline came before all had left"
        self.shutdown.preempt_now(Event.EXPIRED, why, stepped=stepped)

    # -- doing ----------------------------------------------------------------------------------

    def _start_agent(self) -> None:
        self._agent_ready = self._asked_anew = False
        self.agent = self.ports.start_agent(self.settings)
        self.record.update()

    @property
    def is_agent_ready(self) -> bool:
        """Whether the agent takes commands."""
        return self._agent_ready

    @property
    def may_launch(self) -> bool:
        """Whether agent and memory tier are ready for an incarnation."""
        return self._agent_ready and (not self._adopting or self.ports.memory.over)

    def clean_up(self) -> bool:
        """Put in order what a killed run left, once before each launch; whether that is done."""
        directory, memory = self.ports.directory, self.ports.memory
        if not self._cleaning:
            self._cleaning, self._adopting = True, False
            memory.calm()
            directory.record_incarnation(self.incarnation + 1)
            directory.clean_up(lambda: self.leaves, memory.attempt)
        return directory.cleaned

    def launch(self, nodes: int) -> None:
        """Launch the next incarnation on at most this number of nodes; after :meth:`clean_up`."""
        if self.agent is None:
            return
        self._cleaning = False
        number = self.incarnation + 1
        self.begin_incarnation(number, nodes)
        self.agent.send(Launch(number, nodes))

    def begin_incarnation(self, number: int, nodes: int) -> None:
        """Note that this node's workers are about to be launched, with those of other nodes."""
        nproc, journal = self.settings.nproc, self.ports.journal
        self.is_launched, self._hang = True, None
        self._saved_step = -1
        self.hangs.begin()
        self._marks.begin()
        journal.incarnation = number
        journal.write(WorkersLaunched(incarnation=number, nproc=nproc, nodes=nodes))
        message = f"launching incarnation {number}"
        where = f" on each of {nodes} nodes" if nodes > 1 else ""
        self.record.say(f"{message}: {nproc} worker(s){where}")
        self.record.update(incarnation=number, message=message)

    def _end_agent(self) -> None:
        if self.agent is not None:
            self.agent.end()
            self.agent = None

    # -- reporting ------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self.record.state

    @property
    def incarnation(self) -> int:
        """Number of the newest incarnation; 0 before the first."""
        return self.record.node.incarnation

    @property
    def stops_at_once(self) -> bool:
        """Whether the user does not want to wait."""
        return self._stop_now

    def _interval(self) -> IntervalRecord | None:
        found = self._saves.interval
        return None if found is None else IntervalRecord(found.seconds, found.why)
