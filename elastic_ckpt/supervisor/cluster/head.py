"""The role of the node that leads: who takes part, and when it is over for all nodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from elastic_ckpt.jobdir.left_out import LeftOutNode
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.journal.failure_streak import failures_in_a_row
from elastic_ckpt.journal.node_events import (
    HeadNodeLost,
    HeadTakenOver,
    NodeJoined,
    NodeLeft,
    NodeLeftOut,
    NodeLetIn,
    WaitingForNodes,
)
from elastic_ckpt.policy.deadline import Notice, is_by_hand
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import Gathering, eligible
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    Ask,
    Dismissed,
    Finish,
    Hung,
    LeaveOut,
    Nodes,
    Ready,
)
from elastic_ckpt.protocol.run_state import Event, RunState
from elastic_ckpt.protocol.succession import MAX_POSITION, Follow, Leader, RosterPlace
from elastic_ckpt.supervisor.cluster.left_out import LeftOutNodes
from elastic_ckpt.supervisor.cluster.role import ClusterRole
from elastic_ckpt.supervisor.watch.node_check import NodeCheck
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.units import human_duration

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.supervisor import Supervisor

DISMISS_SECONDS: Final = 5.0
"""How long the agent may take to inform the other nodes that the job is over."""

GIVE_WAY_SECONDS: Final = 5.0
"""How long the storage may take to report who has taken the job over."""

HURRIED_SECONDS: Final = 0.5
"""The same where the user does not want to wait."""

_NO_NODES: Final = Nodes((), 0)


class HeadRole(ClusterRole):
    """Launches with the nodes that are there, and lets others join."""

    def __init__(
        self,
        nodes: tuple[int, int],
        expected: int = 0,
        taken: Leader | None = None,
        check: NodeCheck | None = None,
        left_out: LeftOutNodes | None = None,
    ) -> None:
        """Take the minimum and the maximum of an incarnation.

        Args:
            expected: nodes that come from the head before this one; 0 for the first.
            taken: that one's run; None for the first.
            check: this node's own; None if it needs none.
            left_out: nodes that take part only as far as the minimum needs them.
        """
        super().__init__(check)
        self._left_out = left_out or LeftOutNodes()
        self._published: dict[str, str] = {}  # to the other nodes, of those
        self._forced: set[str] = set()  # let in by command, although their checks fail
        self._taken = taken
        self._min, self._max = nodes
        self._gathering = Gathering(*nodes, expected=expected)
        self._gives_way_by = 0.0
        self._nodes = _NO_NODES
        self._waiting_since = 0.0
        self._growing = False
        self._dismissed = True
        self._leave_by = 0.0
        self._notice: Notice | None = None

    def begin(self, run: Supervisor) -> None:
        """Report whose place this node has taken."""
        taken, endpoint = self._taken, run.settings.endpoint
        if taken is not None:
            number = taken.number + 1
            event = HeadTakenOver(before=taken.node, run=number, endpoint=endpoint)
            run.ports.journal.write(event)
            message = f"leads from now on, in place of {taken.node}, at {endpoint}"
            run.record.say(message)
            run.record.update(message=message, took_over_from=taken.node)
            kept = run.ports.memory.not_on_disk()
            if kept is not None and not kept.seal.is_whole:  # the ranks load it meanwhile
                run.incarnations.is_adopting = False
            failures = failures_in_a_row(
                run.ports.directory.history(), run.settings.node, os.getpid()
            )
            if failures:
                run.incarnations.carry_failures(failures)

    def on_event(self, run: Supervisor, event: AgentEvent) -> bool:
        """Handle what concerns all nodes."""
        match event:
            case Nodes():
                self._on_nodes(run, event)
            case Hung():
                run.incarnations.on_hang(Hang.of(event.nodes))
            case Dismissed():
                self._dismissed = True
            case Ready():
                self._published = {}
                return super().on_event(run, event)
            case _:
                return super().on_event(run, event)
        return True

    def _on_nodes(self, run: Supervisor, nodes: Nodes) -> None:
        before, self._nodes = self._nodes, nodes
        for name in sorted(set(nodes.present) ^ set(before.present)):
            joined = name in nodes.present
            event, what = (NodeJoined, "joined") if joined else (NodeLeft, "left")
            run.ports.journal.write(event(name=name))
            run.record.say(f"node {name} {what}: {len(nodes.present)} here")
        run.record.update(present=nodes.present)

    def on_ended(self, run: Supervisor) -> None:
        """Expect the nodes that are still here for the next incarnation."""
        self._gathering.expected = len(self._eligible())

    def on_agent_lost(self, run: Supervisor) -> None:
        """Forget the nodes: they will join the next agent."""
        self._nodes = _NO_NODES

    def gives_way(self, run: Supervisor) -> bool:
        """Join the run that has taken the job over, if it is one of several nodes as well."""
        self._gives_way_by = self._gives_way_by or run.now + GIVE_WAY_SECONDS
        if not run.ports.directory.lost or run.preemption.notice is not None:
            return False
        leader = run.ports.directory.leader()
        if leader is None:
            return run.now < self._gives_way_by
        if leader.ended or not leader.endpoint:
            return False
        run.record.say(f"{leader.node} leads now, at {leader.endpoint}: joining it")
        run.goes_on = Follow(leader)
        return True

    # -- nodes that are left out ----------------------------------------------------------------

    def _eligible(self) -> tuple[str, ...]:
        return eligible(self._nodes.present, self._left_out.nodes, self._min)

    def is_dispensable(self, node: str) -> bool:
        """Return whether the minimum can be met without this node."""
        present, others = self._nodes.present, {*self._left_out.nodes, node}
        return node in present and node not in eligible(present, others, self._min)

    def leave_out(
        self, run: Supervisor, node: str, why: str, *, failed_check: bool = False
    ) -> None:
        """Leave a node out from the next incarnation on."""
        place = run.settings.shared_url or run.settings.directory
        note = LeftOutNode(node, why, run.ports.clock.wall(), failed_check, run.settings.shared_url)
        self._left_out.add(note)
        run.ports.journal.write(NodeLeftOut(name=node, why=why))
        let_in = command_line("nodes", place, "--let-in", node)
        run.record.say(warning(f"node {node} is left out: {why}; to let it in again: {let_in}"))

    def look_for_hang(self, run: Supervisor) -> None:
        """Besides hangs, look which nodes are to be left out, and which are let in again."""
        super().look_for_hang(run)
        nodes, unfit = self._left_out.nodes, self._nodes.unfit
        for one in self._left_out.take_removed(run.now):
            self._forced |= {one.node} & unfit.keys()
            self._report_let_in(run, one.node, "by command")
        passing = [name for name in self._nodes.present if name not in unfit]
        self._forced -= set(passing)
        for name in passing:
            if name in nodes and nodes[name].failed_check:
                self.let_in(run, name, "it passes its check now")
        for name, why in unfit.items():
            if name not in nodes and name not in self._forced:
                self.leave_out(run, name, f"its check failed: {why}", failed_check=True)
        published = {name: one.why for name, one in nodes.items()}
        if published != self._published and run.agent is not None:
            self._published = published
            run.agent.send(LeaveOut(published))

    def let_in(self, run: Supervisor, node: str, why: str) -> None:
        """Let a node in from the next incarnation on."""
        if node in self._left_out.nodes:
            self._left_out.remove(node)
            self._report_let_in(run, node, why)

    def _report_let_in(self, run: Supervisor, node: str, why: str) -> None:
        run.ports.journal.write(NodeLetIn(name=node, why=why))
        run.record.say(f"node {node} is let in again: {why}")

    def _pass_on_to_fit_nodes(self, run: Supervisor) -> None:
        """Leave the job to the others, of which there are enough: this node is left out, and a head
        takes part. It joins the next head, and takes the job back if none of them leads."""
        run.record.say("this node is left out, and enough others are here: letting one lead")
        run.ports.directory.pass_on()
        self.place = RosterPlace(MAX_POSITION, len(self._nodes.present) - 2)
        run.goes_on = Follow(Leader(0, run.settings.node, run.settings.endpoint))

    def _let_others_lead(self, run: Supervisor) -> bool:
        """Leave the job to the nodes that this one has lost, if these are most of the roster: this
        node may be the one that is cut off. Without them it takes the job back."""
        nodes = self._nodes
        if 2 * nodes.lost <= nodes.roster or 2 * len(nodes.present) >= nodes.roster:
            return False
        why = f"{nodes.lost} of {nodes.roster} nodes do not answer: letting one of them lead"
        run.record.say(why)
        run.ports.journal.write(HeadNodeLost(head=run.settings.node, why=why))
        run.incarnations.end_agent()
        run.ports.directory.pass_on()
        self.place = RosterPlace(nodes.roster, nodes.lost - 1)
        run.goes_on = Follow(Leader(0, run.settings.node, run.settings.endpoint))
        return True

    def serve_start(self, run: Supervisor, now: float) -> None:
        """Launch once there are enough nodes; wait for them, bounded."""
        if not run.incarnations.may_launch or self._let_others_lead(run):
            return
        chosen = self._eligible()
        present = len(chosen)
        if self._left_out.is_read and self._gathering.may_launch(present, now):
            self._waiting_since = 0.0
            if run.settings.node not in chosen:
                self._pass_on_to_fit_nodes(run)
            elif run.incarnations.clean_up():  # which may take a while; nodes may leave meanwhile
                self._growing = False
                self._launch(run, chosen)
        elif not self._waiting_since:
            self._waiting_since = now
            limit = human_duration(run.settings.gather_seconds)
            run.record.say(
                f"waiting up to {limit} for nodes: {present} of at least {self._min} are here"
            )
            run.ports.journal.write(WaitingForNodes(present=present, needed=self._min))
            run.record.update(message=f"waiting for nodes: at least {self._min} are needed")
        elif run.settings.node not in self._nodes.present:
            self._waiting_since = now  # its own imports take a while, which is bounded
        elif now - self._waiting_since > run.settings.gather_seconds:
            waited = f"fewer than {self._min} nodes for {run.settings.gather_seconds:.0f} s"
            run.shutdown.preempt_now(Event.ABANDONED, waited, stepped=False)

    def _launch(self, run: Supervisor, chosen: tuple[str, ...]) -> None:
        needed = ", ".join(name for name in chosen if name in self._left_out.nodes)
        if needed:
            fit = sum(name not in self._left_out.nodes for name in chosen)
            why = f"the job needs at least {self._min} nodes and has {fit} without"
            why = why if fit else "no other node is fit"
            run.record.say(f"continuing with {needed}, although left out: {why}")
        without = tuple(set(self._nodes.present) - set(chosen))
        run.incarnations.launch(min(len(chosen), self._max), without)

    def serve_running(self, run: Supervisor, now: float) -> None:
        """Besides saves, let the ranks know what is best when a node leaves, and have them stop for
        an incarnation with the nodes that joined, or without those that are left out and no longer
        needed."""
        super().serve_running(run, now)
        chosen, running = self._eligible(), self._nodes.running
        run.ports.board.hand_over_seconds = (
            run.saves.hand_over_seconds(running, run.settings.grace) if running > 1 else 0.0
        )
        if self._growing or not running or run.agent is None:
            return
        left_out = [one for one in self._nodes.taking_part if one in self._left_out.nodes]
        unwanted = ", ".join(one for one in left_out if one not in chosen)
        if self._gathering.may_grow(len(chosen), running, now):
            what = f"{len(chosen)} nodes are here: saving, to continue with them"
        elif unwanted and self._gathering.may_replace(len(chosen), now):
            what = f"saving, to continue without {unwanted}"
        else:
            return
        self._growing = True
        run.record.say(what)
        run.agent.send(Ask(RequestKind.STOP))

    def before_notice(self, run: Supervisor, notice: Notice) -> None:
        """Have the ranks save to the disk if the job ends with this node, or may: SLURM takes all
        nodes of a job, one after the other."""
        in_slurm = "slurm" in run.settings.notice_sources
        if in_slurm or not self._lets_others_continue(run, notice):
            run.ports.board.hand_over_seconds = 0.0

    def announce_end(self, run: Supervisor) -> None:
        """Tell the other nodes that the job is over; they would look for the head."""
        if run.ports.directory.lost:
            run.incarnations.end_agent()  # it is not: they find the new head
            return
        code = run.record.node.exit_code
        if code is None or run.agent is None:
            return
        passes_on = self._may_pass_on(run)
        if passes_on:
            run.ports.directory.pass_on()
            run.record.say(f"{', '.join(self._nodes.present)}: continue without this node")
        run.agent.send(Finish(code, run.record.node.message, passes_on))
        self._dismissed, self._notice = False, run.preemption.notice
        seconds = HURRIED_SECONDS if run.preemption.stops_at_once else DISMISS_SECONDS
        self._leave_by = run.now + run.preemption.patience(seconds)

    def _may_pass_on(self, run: Supervisor) -> bool:
        """Return whether only this node leaves; it does if others keep what it had in memory."""
        notice = run.preemption.notice
        if notice is None or run.state is not RunState.PREEMPTED:
            return False
        is_kept = run.ports.memory.kept_by_peer() is not None
        return is_kept or self._lets_others_continue(run, notice)

    def _lets_others_continue(self, run: Supervisor, notice: Notice) -> bool:
        """Return whether a platform takes only this node, and enough others stay."""
        if is_by_hand(notice):
            return False
        is_for_all = run.settings.started_others and notice.source == "signal"
        others = set(self._nodes.present) - {run.settings.node}
        return len(others) >= self._min and not is_for_all

    def has_left(self, run: Supervisor) -> bool:
        """Return whether all nodes know, or it is too late for them."""
        gone = run.agent is None or run.agent.gone
        return self._dismissed or gone or self.seconds_to_leave(run) <= 0

    def seconds_to_leave(self, run: Supervisor) -> float:
        """Return the seconds until the other nodes have had the time to learn of the end."""
        notice = run.preemption.notice
        if notice is not self._notice:  # one with less time has arrived
            self._notice = notice
            self._leave_by = min(self._leave_by, run.now + run.preemption.patience(DISMISS_SECONDS))
        return max(0.0, self._leave_by - run.now)
