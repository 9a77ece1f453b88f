"""What a supervisor does by its role: alone, the head of several nodes, or a member."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_ckpt.journal.node_events import NodeUnfit
from elastic_ckpt.policy.deadline import Notice
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    AllIdle,
    Checked,
    Explained,
    Idle,
    Kill,
    Ready,
)
from elastic_ckpt.protocol.succession import NO_PLACE
from elastic_ckpt.supervisor.watch.node_check import NodeCheck
from elastic_ckpt.util.journald import warning

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.supervisor import Supervisor


class Role:
    """The part of a node that is alone, and what the other roles have in common with it.

    Each method is called from the supervisor's loop and must not block; ``run`` is that supervisor.
    """

    def begin(self, run: Supervisor) -> None:
        """Report what this role waits for; called once, at the start of the run."""

    def on_event(self, run: Supervisor, event: AgentEvent) -> bool:
        """Handle an event of this role's alone; False leaves it to the supervisor."""
        return False

    def before_notice(self, run: Supervisor, notice: Notice) -> None:
        """Put on the board what the ranks have to know once they see this notice there."""

    def serve_start(self, run: Supervisor, now: float) -> None:
        """Launch once agent and memory tier are ready; called at each turn until then."""
        if run.incarnations.may_launch and run.incarnations.clean_up():
            run.incarnations.launch(1)

    def serve_running(self, run: Supervisor, now: float) -> None:
        """Ask for saves that are due; called at each turn while the ranks train."""
        run.serve_saves(now)

    def look_for_hang(self, run: Supervisor) -> None:
        """Kill workers that hang; called at each turn outside a notice."""
        if not run.incarnations.is_watched or run.agent is None:
            return
        stuck = run.incarnations.hangs.poll()
        if stuck is not None:
            hang = Hang.of([stuck])
            run.incarnations.on_hang(hang)
            run.agent.send(Kill(hung=hang.rank))

    def on_ended(self, run: Supervisor) -> None:
        """Note that an incarnation is over, before :meth:`follow_up`."""

    def follow_up(self, run: Supervisor, ended: Ended) -> None:
        """Decide what follows the end of an incarnation."""
        run.incarnations.follow_up(ended)

    def is_dispensable(self, node: str) -> bool:
        """Return whether the job has enough other nodes to continue without this one."""
        return False

    def leave_out(self, run: Supervisor, node: str, why: str) -> None:
        """Leave a node out of the next incarnations, as far as the minimum allows."""

    def let_in(self, run: Supervisor, node: str, why: str) -> None:
        """Let a node in again that was left out; nothing if it is not."""

    def on_agent_lost(self, run: Supervisor) -> None:
        """Note that the agent died; the supervisor starts another one."""

    def gives_way(self, run: Supervisor) -> bool:
        """Another run owns the job: return whether this node joins it, or still finds out; called
        at each turn until then."""
        return False

    def announce_end(self, run: Supervisor) -> None:
        """Tell the other nodes that the run is over; called once, in a terminal state."""

    def has_left(self, run: Supervisor) -> bool:
        """Return whether they know, or have had the time to."""
        return True

    def seconds_to_leave(self, run: Supervisor) -> float:
        """Return the seconds until :meth:`has_left` is true at the latest."""
        return 0.0


class AloneRole(Role):
    """A node that is alone."""


class ClusterRole(Role):
    """What head and members have in common: a hang takes the ranks of every node, and each node
    checks itself before it takes part, and once its ranks were the first to fail."""

    def __init__(self, check: NodeCheck | None = None) -> None:
        """Take the check of this node; None for a node that needs none."""
        self.is_passed_on = False  # the job, by the head that this node has followed
        self.place = NO_PLACE  # in the order of succession, once this node has lost the head
        self.check = check
        self._reported_idle = self._all_idle = False
        self._incarnation = 0

    def on_event(self, run: Supervisor, event: AgentEvent) -> bool:
        """Note that the ranks of all nodes are idle; check this node again if its ranks failed."""
        check = self.check
        match event:
            case AllIdle():
                self._all_idle = True
                return True
            case Ended(kind=EndKind.CRASHED, node=run.settings.node) if check is not None:
                check.begin(run.ports.host.aside, idle=False)  # the next ones are about to
            case Ready():
                self._report_check(run)
        return False

    def _serve_check(self, run: Supervisor) -> None:
        """Check this node if that is due, and report the result."""
        check = self.check
        if check is None:
            return
        if check.is_due(run.now):
            check.begin(run.ports.host.aside, idle=not run.incarnations.is_launched)
        before = check.unfit
        if not check.take(run.now):
            return
        self._report_check(run)
        if check.unfit and check.unfit != before:
            run.ports.journal.write(NodeUnfit(why=check.unfit))
            run.record.say(warning(f"this node failed its check: {check.unfit}"))
        elif before and not check.unfit:
            run.record.say("this node passes its check now")

    def _report_check(self, run: Supervisor) -> None:
        if run.agent is not None and self.check is not None and self.check.unfit is not None:
            run.agent.send(Checked(self.check.unfit))

    def look_for_hang(self, run: Supervisor) -> None:
        """Report when this node's ranks are idle; look at them when all nodes' are. Besides, check
        this node if that is due."""
        self._serve_check(run)
        if self._incarnation != run.incarnation:
            self._incarnation = run.incarnation
            self._reported_idle = self._all_idle = False
        if not run.incarnations.is_watched or run.agent is None:
            return
        stuck = run.incarnations.hangs.poll(alone=self._all_idle)
        if run.incarnations.hangs.idle is not self._reported_idle:
            self._reported_idle = run.incarnations.hangs.idle
            run.agent.send(Idle(self._reported_idle))
        if stuck is not None:
            run.agent.send(Explained(stuck))
