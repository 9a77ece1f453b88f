"""Incarnations of the workers: the agent that launches them, and what follows when one ends."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.events import IncarnationEnded, WorkersLaunched
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.policy.restart import RestartAction
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import AgentEvent, Launch, Ready
from elastic_ckpt.protocol.run_state import Event, RunState
from elastic_ckpt.protocol.slot import SessionStage
from elastic_ckpt.supervisor.ports import AgentPort
from elastic_ckpt.supervisor.restarts import Restarts
from elastic_ckpt.supervisor.watch.budget_watch import BudgetWatch
from elastic_ckpt.supervisor.watch.group_watch import GroupWatch
from elastic_ckpt.supervisor.watch.hang_watch import HangWatch
from elastic_ckpt.supervisor.watch.process_watch import ProcessWatch
from elastic_ckpt.supervisor.watch.recovery_watch import RecoveryWatch
from elastic_ckpt.supervisor.watch.step_marks import StepMarks
from elastic_ckpt.supervisor.watch.stepless_watch import SteplessWatch
from elastic_ckpt.util.journald import warning

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

_FINAL_CODES: Final = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.UNAVAILABLE})
"""Exit codes of workers that mean the same for the whole job."""


class Incarnations:
    """Starts the agent and, through it, one incarnation of the workers after another.

    Attributes:
        agent: the running agent; None between two.
        is_launched: whether this node has workers.
        is_agent_ready: whether the agent takes commands.
        asked_to_save: a script that saves by itself was asked to in this incarnation.
        is_adopting: what a killed run left in memory is still being drained before the first.
        hangs: watches the ranks.
    """

    def __init__(self, run: Supervisor) -> None:
        ports, settings, node = run.ports, run.settings, run.record.node
        clock, board, journal = ports.clock, ports.board, ports.journal
        self.agent: AgentPort | None = None
        self.is_launched = self.is_agent_ready = False
        self.is_adopting = True
        self.asked_to_save = False
        self.hangs = HangWatch(board, journal, settings.hang_seconds, ports.host, clock)
        self._run = run
        self._ports = ports
        self._restarts = Restarts(
            settings.max_failures, clock, ports.directory, ports.memory, journal
        )
        self._recovery = RecoveryWatch(board, journal, node.last_recovery)
        self._marks = StepMarks(clock, board, journal)
        self._processes = ProcessWatch(board, ports.host, clock, run.record.say)
        self._stepless = SteplessWatch(clock, board, run.record)
        self._group = GroupWatch(board, run.record)
        newest = ports.directory.newest
        self._budget = BudgetWatch(self._restarts.policy, board, newest, run.record)
        self._hang: Hang | None = None
        self._failed_session = ""
        self._cleaning = self._is_own_verified = False
        node.failures_left = self._restarts.policy.left

    def carry_failures(self, count: int) -> None:
        """Begin with the failures in a row that the head before this one has seen."""
        policy = self._restarts.policy
        policy.carry_on(count, self._run.shutdown.newest_key())
        self._run.record.update(failures_left=policy.left)

    # -- starting ---------------------------------------------------------------------------------

    def start_agent(self) -> None:
        """Start an agent; it reports when it takes commands."""
        self.is_agent_ready = False
        self.agent = self._ports.start_agent(self._run.settings)
        self._run.record.update()

    @property
    def may_launch(self) -> bool:
        """Whether agent and memory tier are ready for an incarnation."""
        return self.is_agent_ready and (not self.is_adopting or self._ports.memory.over)

    def clean_up(self) -> bool:
        """Put in order what a killed run left, once before each launch; whether that is done."""
        directory, memory = self._ports.directory, self._ports.memory
        if not self._cleaning:
            self._cleaning, self.is_adopting = True, False
            memory.calm()
            directory.record_incarnation(self._run.incarnation + 1)
            directory.clean_up(lambda: self._run.leaves, memory.attempt)
            self._is_own_verified = False
        if not directory.cleaned:
            return False
        if not self._is_own_verified:  # not at the same time: both move what is torn
            self._is_own_verified = True
            self._ports.own.prepare(lambda: self._run.leaves)
        return self._ports.own.prepared

    def launch(self, nodes: int, without: tuple[str, ...] = ()) -> None:
        """Launch the next incarnation on at most this number of nodes, and none of ``without``;
        after :meth:`clean_up`."""
        if self.agent is None:
            return
        self._cleaning = False
        own = self._ports.own
        if own.is_finished:
            why = "nothing was launched: what --finished-when names is there"
            self._run.shutdown.finish(lambda: self._run.leaves, why)
            return
        if own.failed:
            self._run.shutdown.give_up(own.failed_code, own.failed)
            return
        if gone := self._run.shutdown.gone():
            self._run.shutdown.give_up(ExitCode.UNAVAILABLE, gone)
            return
        if self._restarts.policy.failures:
            self._restarts.policy.resumes_from(self._run.shutdown.newest_key())
        number = self._run.incarnation + 1
        self.begin(number, nodes)
        self.agent.send(Launch(number, nodes, own.arguments, without))

    def begin(self, number: int, nodes: int) -> None:
        """Note that this node's workers are about to be launched, with those of other nodes."""
        nproc, journal = self._run.settings.nproc, self._ports.journal
        self.is_launched, self._hang, self.asked_to_save = True, None, False
        self.hangs.begin()
        self._processes.begin()
        self._marks.begin()
        self._stepless.begin()
        self._group.begin()
        journal.incarnation = number
        journal.write(WorkersLaunched(incarnation=number, nproc=nproc, nodes=nodes))
        self._ports.own.launched(number)
        message = f"launching incarnation {number}"
        where = f" on each of {nodes} nodes" if nodes > 1 else ""
        self._run.record.say(f"{message}: {nproc} worker(s){where}")
        self._run.record.update(incarnation=number, message=message)

    def end_agent(self) -> None:
        """Kill the agent and its workers, if there are any; bounded."""
        if self.agent is not None:
            self.agent.end()
            self.agent = None

    # -- while one runs ---------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Journal progress, and a recovery that is complete."""
        if self._recovery.poll(self._run.incarnation):
            self._run.record.update(last_recovery=self._recovery.last)
        self._marks.poll(now)
        if self.is_watched and self.agent is not None:
            self._stepless.poll(now)
            self._budget.poll(now)
            if self._run.settings.endpoint:
                self._group.poll(now)
            self._processes.poll(self.agent.pid, urgent=self._run.state is RunState.DRAINING)
            if self._processes.suspended:
                self.hangs.excuse()

    def on_hang(self, hang: Hang) -> None:
        """Remember what hangs; its workers are being killed."""
        self._hang = hang
        self._run.record.say(warning(f"{hang.message}{hang.stacks}"))

    def retry(self, now: float) -> None:
        """Leave the back-off once it is over."""
        if not self._restarts.may_begin(now):
            return
        if not self._restarts.take_an_older_one(self._run.record, self._failed_session):
            return
        self._run.record.move(Event.RETRY)
        if self.agent is None:
            self.start_agent()

    def is_stepping(self) -> bool:
        """Return whether a rank of this incarnation, not of an earlier one, has begun a step."""
        board = self._ports.board
        slots = board.read_slots() if board.incarnation == self._run.incarnation else []
        runs = self._ports.own.is_on and all(slot.pid for slot in slots)
        return any(slot.first_entry for slot in slots) or (runs and bool(slots))

    @property
    def is_watched(self) -> bool:
        """Whether the board shows this node's workers, and not yet those of an earlier launch."""
        return self.is_launched and self._ports.board.incarnation == self._run.incarnation

    @property
    def newest_saved_step(self) -> int:
        """The newest step that a rank has seen sealed, in whichever tier; -1 for none."""
        return max(slot.saved_step for slot in self._ports.board.read_slots())

    @property
    def saves_itself(self) -> bool:
        """Whether workers run whose script saves by itself, and takes no part in the agreement."""
        slots = self._ports.board.read_slots() if self._ports.own.is_on else []
        return self.is_launched and bool(slots) and not any(slot.attached for slot in slots)

    @property
    def is_unsaved(self) -> bool:
        """Whether there may be steps of this incarnation that no checkpoint holds. Behind the last
        one, where the script evaluates or exports, a Session has saved everything."""
        slots = self._ports.board.read_slots()
        stepped = (slot for slot in slots if slot.first_entry)
        sealed = all(slot.session_stage is SessionStage.SEALED for slot in stepped)
        return not sealed or self.saves_itself

    @property
    def retry_at(self) -> float:
        """When the back-off is over, in monotonic seconds."""
        return self._restarts.retry_at

    @property
    def is_outdated(self) -> bool:
        """Whether the ranks were launched with another interval than now counts."""
        agent, steps = self.agent, self._run.settings.interval.worker_interval
        return agent is not None and agent.interval_steps != steps

    # -- what follows when one ends ---------------------------------------------------------------

    def on_event(self, event: AgentEvent) -> None:
        """Handle what an agent reports in every role."""
        match event:
            case Ready():
                self.is_agent_ready = True
                self._is_agent_intact()
            case Ended():
                self._on_ended(event)

    def _on_ended(self, ended: Ended) -> None:
        """An incarnation is over; do what follows."""
        self.is_launched = False
        self._recovery.poll(ended.incarnation)  # its first step may be its last
        self._marks.last()
        self._stepless.ended(ended)
        if ended.kind is EndKind.COMPLETED and not ended.attached:
            self._run.record.node.sessionless = True
        self._ports.journal.write(
            IncarnationEnded(
                incarnation=ended.incarnation,
                kind=ended.kind.value,
                rank=ended.rank,
                exit_code=ended.exit_code,
                message=ended.message,
                finished=ended.finished,
            )
        )
        draining = self._run.state is RunState.DRAINING
        left_well = ended.kind is EndKind.COMPLETED and not draining
        self._ports.own.ended(left_well=left_well)
        self._run.role.on_ended(self._run)
        if self.is_outdated or not self._is_agent_intact():
            self.end_agent()
        if not self._run.shutdown.is_decided:  # else what follows was decided when the notice came
            self._run.role.follow_up(self._run, ended)
        elif ended.kind is EndKind.COMPLETED and ended.attached:
            self._run.shutdown.work_is_done()

    def _is_agent_intact(self) -> bool:
        return self.agent is None or self.agent.is_intact

    def follow_up(self, ended: Ended) -> None:
        """Decide what follows the end of an incarnation."""
        draining = self._run.state is RunState.DRAINING
        if self._ports.own.is_on and not ended.attached:
            self._follow_up_own(ended, draining=draining)
        elif ended.kind is EndKind.COMPLETED and draining and not ended.attached:
            # It may have caught SLURM's own SIGTERM and left: without a Session nobody knows.
            detail = "the script ended during the notice, without a Session"
            self._run.shutdown.preempt(Event.STOPPED, detail)
        elif ended.kind is EndKind.COMPLETED:
            self._run.shutdown.finish(lambda: self._run.leaves, ended.message)
        elif draining and ended.failed:
            detail = f"during the notice {ended.what}"
            stepped = ended.stepped and not ended.sealed
            self._run.shutdown.preempt(Event.CRASH, detail, stepped=stepped)
        elif draining:
            stopped = not self._ports.own.is_on  # what the script writes is sealed by this process
            self._run.shutdown.preempt(
                Event.STOPPED, "all ranks left together", stopped=stopped, stepped=ended.stepped
            )
        elif not ended.failed:
            self._run.record.move(Event.REGROUP, f"stopped at step {ended.finished}, to restart")
        else:
            self._on_crash(ended)

    def _follow_up_own(self, ended: Ended, *, draining: bool) -> None:
        """Decide what follows where the script saves by itself: it leaves after a save that it was
        asked for, and whether it had finished it alone knows."""
        own, asked, shutdown = self._ports.own, self.asked_to_save, self._run.shutdown
        left = ended.kind is EndKind.COMPLETED
        if own.is_finished or (left and not own.has_sign and not draining and not asked):
            shutdown.finish(lambda: self._run.leaves, ended.message)
        elif draining:
            what = f"during the notice {ended.what}" if ended.what else "the script has left"
            saved = own.saved or not ended.failed
            event = Event.STOPPED if saved else Event.CRASH
            shutdown.preempt(event, "the script has saved" if own.saved else what)
        elif left and not asked:
            message = "it exited with code 0, but --finished-when says that work is left"
            self._on_crash(msgspec.structs.replace(ended, message=message))
        elif not ended.failed:
            why = "the script left after it was asked to save: starting again"
            self._run.record.move(Event.REGROUP, why)
        else:
            self._on_crash(ended)

    def _on_crash(self, ended: Ended) -> None:
        self._recovery.failed(ended.failed_at, ended.noticed_at, ended.gone_at)
        hang = self._hang
        # Of ranks that wait for the one to blame, the last lines would mislead.
        tail = ended.tail if hang is None or hang.rank == ended.rank else ()
        node = hang.node if hang else ended.node
        self._on_failure(
            Failure(
                rank=hang.rank if hang else ended.rank,
                exit_code=ended.exit_code,
                message=hang.message if hang else ended.message,
                hung=hang is not None,
                stepped=ended.stepped,
                lived=ended.lived,
                steps=ended.steps,
                step=ended.finished + 1 if ended.attached else 0,
                out_of_memory=ended.out_of_memory,
                lost=ended.lost,
                tail=tail,
                node=node,
                at=self._run.now,
                dispensable=self._run.role.is_dispensable(node),
            )
        )

    def _on_failure(self, failure: Failure) -> None:
        """A worker or the agent died outside a notice."""
        names = (slot.session for slot in self._ports.board.read_slots())
        self._failed_session = next((name for name in names if name), "")
        newest = self._run.shutdown.newest_key()
        failure = replace(failure, newest=newest)
        self._restarts.write_off(failure, self._run.record, newest[-1])
        decision, delay = self._restarts.decide(failure)
        why = decision.why or "within the budget"
        log.info("%s, %s: %s", failure.kind.value, decision.action.value, why)
        policy = self._restarts.policy
        self._run.record.update(failures=policy.total, failures_left=policy.left)
        culprit = f"rank {failure.rank} failed: " if failure.rank >= 0 else ""
        what = f"{culprit}{failure.message}"
        if decision.let_in:
            self._run.role.let_in(self._run, decision.let_in, "another node fails in the same way")
        if gone := self._run.shutdown.gone(newest):
            self._run.shutdown.give_up(ExitCode.UNAVAILABLE, f"{gone}; {what}")
        elif self._ports.directory.lost:
            return  # the next turn finds out whether this node joins the new owner
        elif failure.exit_code in _FINAL_CODES:
            self._run.shutdown.give_up(ExitCode(failure.exit_code), failure.message)
        elif decision.action is RestartAction.STOP:
            self._run.shutdown.give_up(ExitCode.FAILED, f"{decision.why}: {what}")
        else:
            if decision.action is RestartAction.LEAVE_OUT:
                self._run.role.leave_out(self._run, failure.node, f"{decision.why}: {what}")
            when = f" in {delay:.1f} s" if delay >= 0.1 else ""
            self._run.record.move(Event.CRASH, f"{what}: restarting{when}")

    def on_agent_lost(self) -> None:
        """The agent has died: start another one, unless the run ends."""
        self._run.role.on_agent_lost(self._run)
        noticed = self._ports.clock.monotonic_ns()
        self._recovery.poll(self._run.incarnation)
        slots = self._ports.board.read_slots()
        stepped = any(slot.first_entry for slot in slots)
        steps = max((slot.finished - slot.start_step for slot in slots if slot.attached), default=0)
        self.end_agent()
        self.is_launched = False
        self._ports.board.begin_incarnation(0)  # the slots are of workers that are gone
        if self._run.shutdown.is_decided:
            return  # the job is over, and needs no agent
        if self._run.state is RunState.DRAINING:
            self._run.shutdown.preempt(Event.CRASH, "the agent died", stepped=stepped)
        elif self._run.state is not RunState.BACKING_OFF:
            self._recovery.failed(noticed, noticed, self._ports.clock.monotonic_ns())
            self._on_failure(Failure(-1, -int(signal.SIGKILL), "the agent died", stepped, steps))
