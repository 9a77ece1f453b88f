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
from collections.abc import Callable
from typing import Final

from elastic_ckpt.errors import ElasticCkptError, ExitCode
from elastic_ckpt.journal.events import JobFileReloaded, RunEnded
from elastic_ckpt.policy.deadline import EarlyWarning, Notice, Reload, StopNow, may_wait
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.messages import Ask, Kill
from elastic_ckpt.protocol.run_state import TERMINAL, Event, RunState
from elastic_ckpt.protocol.succession import Follow, Lead
from elastic_ckpt.supervisor.cluster.role import Role
from elastic_ckpt.supervisor.incarnations import Incarnations
from elastic_ckpt.supervisor.ports import AgentPort, Ports
from elastic_ckpt.supervisor.preemption import Preemption
from elastic_ckpt.supervisor.run_record import RunRecord, started
from elastic_ckpt.supervisor.saves.adviser import SaveAdviser
from elastic_ckpt.supervisor.saves.emergency import TURN_SECONDS, EmergencySave
from elastic_ckpt.supervisor.settings import RunSettings, reload
from elastic_ckpt.supervisor.shutdown import Shutdown
from elastic_ckpt.supervisor.watch.service_watch import report_turn

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25
CLOSE_SECONDS: Final = 2.0  # for the run's last writes to the storage
MIRROR_SECONDS: Final = 600.0  # for the last copy to the bucket, without a deadline


class Supervisor:
    """One ``elastic-ckpt run`` on one node. Its role says what it does besides with other nodes.

    :meth:`run` is the loop; the simulation calls :meth:`begin`, :meth:`turn` and :meth:`finish`.

    Attributes:
        settings: as given, or as the job file said at the last reload.
        goes_on: whom this node follows from now on, or that it leads: another supervisor in this
            process continues, with this one's agent. None if the run ends with this one.
        saves: advises when and how to save.
    """

    def __init__(
        self,
        settings: RunSettings,
        ports: Ports,
        record: RunRecord,
        role: Role,
        reread: Callable[[], RunSettings],
    ) -> None:
        """``reread`` reads the settings again; it raises UsageError if they are no longer right."""
        clock, board, journal = ports.clock, ports.board, ports.journal
        self.settings = settings
        self.ports = ports
        self.record = record
        self.role = role
        self.preemption = Preemption(settings.grace, clock, board, journal, record)
        self.shutdown = Shutdown(ports, record, self._patience)
        self._reread = reread
        self.incarnations = Incarnations(self)
        self.saves = SaveAdviser(settings, clock, ports.directory, journal)
        self._emergency = EmergencySave(ports.memory, self.saves)
        self._asked_anew: AgentPort | None = None  # to stop, for another interval
        self._saved_step = -1
        self.goes_on: Follow | Lead | None = None
        record.node.save_interval = self.saves.optimal_interval

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
        self.ports.memory.begin()
        self.ports.own.start()
        self.ports.mirror.start()
        self.ports.journal.write(started(self.record.node, self.settings))
        self.record.update()
        self.role.begin(self)
        self._start_when_calm(now)

    def turn(self) -> None:
        """Do what has become due since the last turn. Never blocks."""
        if self.state in TERMINAL:
            self.preemption.tighten(self.ports.listener)
            self.serve_agent()
            return
        if lost := self.ports.directory.lost or self.ports.mirror.lost:
            self._on_lost(lost)
            return
        self._serve_notices()
        self.serve_agent()
        self.ports.memory.serve()
        mirror = self.ports.mirror.serve(self.ports.directory.newest())
        if mirror != self.record.node.mirror:
            self.record.update(mirror=mirror)
        trouble = self.ports.own.trouble
        if trouble is not self.record.node.own_trouble:
            self.record.update(own_trouble=trouble)
        self.shutdown.serve()
        self._serve_clock()
        report_turn(self)
        if self.state in TERMINAL:
            self.role.announce_end(self)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, and the other nodes know; or another supervisor goes on."""
        has_ended = self.state in TERMINAL and self.role.has_left(self)
        return has_ended or self.goes_on is not None

    def finish(self) -> None:
        """Take everything down, but the agent if the run goes on; bounded."""
        moves = self.goes_on is not None
        if not moves:
            self.incarnations.end_agent()
        if self.settings.acknowledge and self.record.node.exit_code == ExitCode.PREEMPTED_SAVED:
            self.ports.listener.acknowledge()
        self.ports.directory.catch_up(self._patience(1.0))
        self.saves.close()
        self.ports.mirror.close(self._patience(CLOSE_SECONDS if moves else MIRROR_SECONDS))
        self.record.node.mirror = self.ports.mirror.serve(self.ports.directory.newest())
        self.record.node.own_trouble = self.ports.own.trouble
        end = self.record.node
        if not moves:
            self.ports.journal.write(
                RunEnded(state=end.state.value, exit_code=end.exit_code, message=end.message)
            )
        self.record.update()
        self.ports.memory.close(keep=moves, finished=end.exit_code == ExitCode.FINISHED)
        self.ports.own.close(self.preemption.patience(CLOSE_SECONDS))
        on = ", and goes on in another role" if moves else ""
        log.info("ended: %s, exit code %s%s", end.state.value, end.exit_code, on)
        self.ports.directory.close(self._patience(CLOSE_SECONDS))
        self.ports.mirror.close_history(self._patience(5.0))
        self.ports.listener.stop(hold=moves)
        self.ports.host.stop()

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self.ports.clock.monotonic()

    def next_due(self) -> float:
        """Return the seconds until a turn must come, by what is known beforehand."""
        now = self.now
        if self.state is RunState.DRAINING:
            left = max(0.0, self.preemption.left(now))
            return (
                min(left, TURN_SECONDS)
                if self._saves_or_drains and self._emergency.is_open
                else left
            )
        if self.state is RunState.BACKING_OFF and self.incarnations.retry_at > now:
            return self.incarnations.retry_at - now
        return self.role.seconds_to_leave(self) if self.state in TERMINAL else math.inf

    @property
    def _saves_or_drains(self) -> bool:
        return self.incarnations.is_launched and not self.shutdown.is_decided

    def _wait(self) -> None:
        agent = self.agent.fd if self.agent else None
        self.ports.host.wait((self.ports.memory.bell, agent), min(TICK_SECONDS, self.next_due()))

    def _serve_notices(self) -> None:
        def lead() -> float:
            return self.saves.lead_seconds(self.ports.board.read_slots())

        for event in self.ports.listener.take_in(self.now, lead):
            match event:
                case Notice():
                    self._on_notice(event)
                case EarlyWarning():
                    self._on_warning(event)
                case StopNow():
                    self.preemption.stops_at_once = True
                case Reload():
                    self._on_reload()

    def _patience(self, seconds: float, ends: bool = True) -> Callable[[], float]:
        return self.preemption.waiting(seconds, self.ports.listener, ends=ends)

    def serve_agent(self) -> None:
        """Take in what the agent has reported."""
        agent = self.agent
        if agent is None:
            return
        for event in agent.events():
            if not self.role.on_event(self, event):
                self.incarnations.on_event(event)
        if agent.gone and self.state not in TERMINAL and self.agent is agent:
            self.incarnations.on_agent_lost()

    def _serve_clock(self) -> None:
        now = self.now
        self.incarnations.poll(now)
        if self.state is RunState.DRAINING:
            if self.preemption.stops_at_once or self.preemption.left(now) <= 0:
                self._on_expired()
            elif self._saves_or_drains and self.agent is not None:
                self._choose_again(self.agent)
            return
        if self.shutdown.is_decided:
            return
        self.role.look_for_hang(self)
        if self.state is RunState.BACKING_OFF:
            self.incarnations.retry(now)
        self._start_when_calm(now)
        if self.state is RunState.STARTING and not self.incarnations.is_launched:
            self.role.serve_start(self, now)
        elif self.state is RunState.STARTING and self.incarnations.is_stepping():
            self._on_stepping(now)
        elif self.state is RunState.RUNNING:
            if self.saves.learn():
                self.record.update(save_interval=self.saves.optimal_interval)
            saved = self.incarnations.newest_saved_step
            if saved != self._saved_step:  # a notice must not wait for a scan
                self._saved_step = saved
                self.ports.directory.scan()
            self.role.serve_running(self, now)

    def _on_stepping(self, now: float) -> None:
        self.saves.begin(now)
        slots = self.ports.board.read_slots()
        # A script that counts steps in its own way has none to resume from.
        step = max(slot.start_step if slot.declares else -1 for slot in slots)
        resumed = f", from step {step}" if step > 0 else ""
        message = f"training, incarnation {self.incarnation}{resumed}"
        interval = self.saves.optimal_interval
        self.record.move(Event.STEPPING, message, step=step, save_interval=interval)

    def _start_when_calm(self, now: float) -> None:
        """Start, unless the node is about to go: a requeued run would only start the same again."""
        if self.agent is not None or not self.ports.listener.is_settled(now):
            return
        self._serve_notices()  # what arrived before the sources settled
        if self.state is RunState.STARTING and now >= self.preemption.held_until:
            self.incarnations.start_agent()

    def serve_saves(self, now: float) -> None:
        """Ask for the saves that do not follow from the step number."""
        if self.agent is None:
            return  # a request waits for the ranks that can serve it
        requested = self.ports.directory.take_save_request()
        if requested:
            self.ports.memory.hurry_once()  # it may be the step that is in memory already
            self.incarnations.asked_to_save = self.ports.own.is_on
        if self.incarnations.is_outdated:
            if self._asked_anew is not self.agent:
                self._asked_anew = self.agent
                self.agent.send(Ask(RequestKind.STOP))
            return
        if self.saves.due(now, self.ports.board.read_slots) or requested:
            self.agent.send(Ask(RequestKind.SAVE_NOW if requested else RequestKind.SAVE))

    # -- what happens ---------------------------------------------------------------------------

    def _on_notice(self, notice: Notice) -> None:
        """This node goes away: have the job saved and ended before the deadline.

        Nothing touches the disk before the deadline is on the board and the ask is on its way.
        """
        if may_wait(notice) and self._is_yet_to_start:
            self.preemption.hold(notice)
            return
        before = self.preemption.notice
        first = before is None
        self.role.before_notice(self, notice)
        if not self.preemption.take(notice):
            return
        drains = ""
        self.ports.mirror.hurry(lambda: self.preemption.left(self.now))
        if first:
            self.shutdown.notice_arrived(self.incarnations.newest_saved_step)
        if self._saves_or_drains and self.agent is not None:
            now, slots = self.now, self.ports.board.read_slots()
            act = self._emergency.begin if first else self._emergency.choose
            drains = act(self.agent, self.preemption.left(now), slots, now)
        if first:
            self.record.move(Event.NOTICE, self.preemption.said)
        else:
            known = before is not None and before.is_guess and not notice.is_guess
            if known and self.state is RunState.DRAINING:
                self.record.node.message = self.preemption.said
                self.record.say(self.record.node.message)
            self.record.update()
        if drains:
            self.record.say(drains)
            self.shutdown.preempt(Event.STOPPED, drains)
        elif first and not self.incarnations.is_launched and not self.shutdown.is_decided:
            self.shutdown.preempt(Event.STOPPED, "no worker was running", stepped=False)

    def _choose_again(self, agent: AgentPort) -> None:
        """Under a notice, drain the newest snapshot instead of a save that cannot be in time."""
        if self.incarnations.saves_itself and self.ports.own.saved:
            agent.send(Kill())
        now, slots = self.now, self.ports.board.read_slots()
        drains = self._emergency.choose(agent, self.preemption.left(now), slots, now)
        if drains:
            self.record.say(drains)
            self.shutdown.preempt(Event.STOPPED, drains)

    @property
    def leaves(self) -> bool:
        """Whether there is no time for what can wait; called while something takes long."""
        self.ports.service.alive(self.now)
        return self.ports.listener.pending or self.preemption.notice is not None

    @property
    def _is_yet_to_start(self) -> bool:
        waits = self.state is RunState.STARTING and self.preemption.notice is None
        return waits and self.agent is None and self.incarnations.is_adopting

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
            self.settings, said = reload(self.settings, self._reread())
        except (ElasticCkptError, OSError, ValueError, RuntimeError) as error:
            said = f"nothing changed: {error}"  # and the job trains on, whatever it was
        else:
            self.saves.change(self.settings, self.now)
            self.record.update(save_interval=self.saves.optimal_interval)
        self.ports.journal.write(JobFileReloaded(said=said))
        self.record.say(f"reload: {said}")
        self.ports.service.reloaded()

    def _on_lost(self, by: str) -> None:
        """Another run has taken the job over: stop the workers, and seal nothing."""
        self.incarnations.end_agent()
        if not self.role.gives_way(self):
            self.shutdown.lose(by)

    def _on_expired(self) -> None:
        """The deadline has come, or the user does not want to wait."""
        stepped = self.incarnations.is_unsaved
        if self.agent is not None:
            self.agent.send(Kill())
        at_once = self.preemption.stops_at_once
        why = "stopped at once" if at_once else "the deadline came before all had left"
        why += f"; the last save failed: {self.saves.failed}" if self.saves.failed else ""
        self.shutdown.preempt_now(Event.EXPIRED, why, stepped=stepped)

    # -- reporting ------------------------------------------------------------------------------

    @property
    def agent(self) -> AgentPort | None:
        """The running agent; None between two."""
        return self.incarnations.agent

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self.record.state

    @property
    def incarnation(self) -> int:
        """Number of the newest incarnation; 0 before the first."""
        return self.record.node.incarnation
