"""The role of the node that leads: who takes part, and when it is over for all nodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from elastic_ckpt.journal.failure_streak import failures_in_a_row
from elastic_ckpt.journal.node_events import (
    HeadNodeLost,
    HeadTakenOver,
    NodeJoined,
    NodeLeft,
    WaitingForNodes,
)
from elastic_ckpt.policy.deadline import Notice, is_by_hand
from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import Gathering
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Dismissed, Finish, Hung, Nodes
from elastic_ckpt.protocol.run_state import Event, RunState
from elastic_ckpt.protocol.succession import Follow, Leader, RosterPlace
from elastic_ckpt.supervisor.cluster.role import ClusterRole
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
        self, nodes: tuple[int, int], expected: int = 0, taken: Leader | None = None
    ) -> None:
        """Take the minimum and the maximum of an incarnation.

        Args:
            expected: nodes that come from the head before this one; 0 for the first.
            taken: that one's run; None for the first.
        """
        super().__init__()
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
        """Report it if saves do not go to the nodes' memory first, and whose place this node has
        taken."""
        url = run.settings.shared_url
        if url:
            run.record.say(f"no memory tier on several nodes: saves go to {url}")
        taken, endpoint = self._taken, run.settings.endpoint
        if taken is not None:
            number = taken.number + 1
            event = HeadTakenOver(before=taken.node, run=number, endpoint=endpoint)
            run.ports.journal.write(event)
            message = f"leads from now on, in place of {taken.node}, at {endpoint}"
            run.record.say(message)
            run.record.update(message=message, took_over_from=taken.node)
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
        self._gathering.expected = len(self._nodes.present)

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
        present = len(self._nodes.present)
        if self._gathering.may_launch(present, now):
            self._waiting_since = 0.0
            if run.incarnations.clean_up():  # which may take a while; nodes may leave meanwhile
                self._growing = False
                run.incarnations.launch(min(present, self._max))
        elif not self._waiting_since:
            self._waiting_since = now
            limit = human_duration(run.settings.gather_seconds)
            run.record.say(
                f"waiting up to {limit} for nodes: {present} of at least {self._min} are here"
            )
            run.ports.journal.write(WaitingForNodes(present=present, needed=self._min))
            run.record.update(message=f"waiting for nodes: at least {self._min} are needed")
        elif now - self._waiting_since > run.settings.gather_seconds:
            waited = f"fewer than {self._min} nodes for {run.settings.gather_seconds:.0f} s"
            run.shutdown.preempt_now(Event.ABANDONED, waited, stepped=False)

    def serve_running(self, run: Supervisor, now: float) -> None:
        """Besides saves, have the ranks stop for an incarnation with the nodes that joined, and let
        them know what is best when a node leaves."""
        super().serve_running(run, now)
        present, running = len(self._nodes.present), self._nodes.running
        run.ports.board.hand_over_seconds = (
            run.saves.hand_over_seconds(running, run.settings.grace) if running > 1 else 0.0
        )
        if self._growing or not running or run.agent is None:
            return
        if self._gathering.may_grow(present, running, now):
            self._growing = True
            run.record.say(f"{present} nodes are here: saving, to continue with them")
            run.agent.send(Ask(RequestKind.STOP))

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
        """Return whether only this node leaves: a platform takes it, and enough others stay."""
        notice = run.preemption.notice
        if notice is None or run.state is not RunState.PREEMPTED or is_by_hand(notice):
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
