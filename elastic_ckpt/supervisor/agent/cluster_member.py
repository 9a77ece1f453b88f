"""This node as a member of a multi-node job: connects the head's rules to the node's workers.

Nothing here waits. Each turn of the agent's loop follows the job's newest state; the head's own
agent does so, too, and applies the head's rules before. If the head falls silent the workers are
killed, which are of no use alone, and this node reconnects until its supervisor gives up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import msgspec

from elastic_ckpt.protocol.agreement import RequestAnswer
from elastic_ckpt.protocol.cluster import (
    LOST_SECONDS,
    HeadRules,
    JobEnd,
    JobState,
    MemberState,
)
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    AllIdle,
    Ask,
    Checked,
    Command,
    Dismissed,
    Explained,
    Finish,
    HeadLost,
    Hung,
    Idle,
    JobOver,
    Joined,
    Kill,
    Launch,
    Launched,
    LeaveOut,
    LeftOut,
    Nodes,
)
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.succession import MAX_POSITION, position
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.supervisor.agent.launch import NodeRank
from elastic_ckpt.supervisor.agent.member_ports import Link, LocalWorkers, Network

log = logging.getLogger(__name__)

DISMISS_SECONDS: Final = 3.0
"""How long the head waits for other nodes to learn that the job is over."""

EXPLAIN_SECONDS: Final = 60.0
"""Time for all nodes to report the stacks of their ranks, after the first report."""

REDIAL_SECONDS: Final = 0.3
TURN_SECONDS: Final = 0.25
"""Maximum time between two turns of the agent's loop."""

UNSEEN_SECONDS: Final = 0.05
"""The same while ranks have yet to see a request, which they note on this node's board."""

AWAY_SECONDS: Final = 1.0
"""A longer pause between two turns means that this process was stopped, and reports not old."""


class Membership:
    """This node's membership; the agent calls :meth:`serve` at each turn of its loop."""

    def __init__(
        self,
        spec: WorkerSpec,
        rendezvous: Rendezvous,
        local: LocalWorkers,
        send: Callable[[AgentEvent], None],
        network: Network,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``send`` reports to this node's supervisor; the clock's seconds are monotonic."""
        self._rendezvous = rendezvous
        self._local = local
        self._send = send
        self._network = network
        self._clock = clock
        self._head: HeadRules | None = None
        if rendezvous.leads:
            about = JobState(
                run_id=spec.run_id, job=spec.job, identity=spec.identity, head=spec.node,
                terms=spec.terms,
            )  # fmt: skip
            self._head = HeadRules(about)
        self._mine = MemberState(node=spec.node, unfit=None if spec.is_checked else "")
        self._link: Link | None = None
        self._redial_at = 0.0
        self._joined, self._reported = False, True
        self._dismissed = False  # by a head that has left the job to this node and others
        self._all_idle = False
        self._left_out = ""  # as the head has said last
        self._nodes: Nodes | None = None
        self._workers_store: object = None
        self._dismiss_by = self._stuck_since = 0.0
        self._looked = self._back = self._clock()

    # -- events of the supervisor and the workers --------------------------------------------

    def obey(self, command: Command) -> None:
        """Obey this node's supervisor."""
        match command:
            case Launch() if self._head is not None:
                self._launch(self._head, command)
            case Ask():
                self._ask(command)
            case Idle():
                self._mine.idle = command.idle
            case Checked():
                self._mine.unfit = command.unfit
            case LeaveOut() if self._head is not None:
                self._head.state.left_out = command.nodes
            case Explained():
                self._mine.stuck = replace(command.stuck, node=self._mine.node)
            case Kill() if self._head is not None and self._head.running:
                self._head.state.over = True
            case Finish() if self._head is not None:
                end = JobEnd(command.exit_code, command.message, command.passed_on)
                self._head.state.end = end
                self._dismiss_by = self._clock() + DISMISS_SECONDS

    def _launch(self, head: HeadRules, command: Launch) -> None:
        store = self._network.host_workers(self._rendezvous.host)
        self._workers_store = store
        head.launch(
            command.incarnation, command.nodes, store.port, command.arguments, command.without
        )

    def _ask(self, command: Ask) -> None:
        """Add a request to this node's report; the head numbers it."""
        self._mine.leaving |= command.leaving
        count = max(self._mine.asks, default=0) + 1
        newest = dict(list(self._mine.asks.items())[-3:])
        self._mine.asks = {**newest, count: command.kind}

    def ended(self, verdict: Ended) -> None:
        """Report how this node's part of the incarnation ended."""
        if self._mine.leaving and verdict.kind is EndKind.CRASHED:
            verdict = msgspec.structs.replace(
                verdict, kind=EndKind.CUT_SHORT, lost=(self._mine.node,)
            )
        self._mine.ended = msgspec.structs.replace(verdict, node=self._mine.node)

    # -- at each turn -----------------------------------------------------------------------

    def serve(self) -> None:
        """Take in what has arrived, act on it, and report this node's state."""
        now = self._clock()
        if now - self._looked > AWAY_SECONDS:
            self._back = now
        self._looked = now
        link = self._link
        if link is None:
            self._dial(now)
            return
        silent = self._silence(link, now)
        if silent:
            self._hang_up(link, silent)
            return
        if self._head is not None:
            self._lead(self._head, link)
        job = self._head.state if self._head is not None else link.job
        if job is not None and link.number >= 0:
            self._follow(job, link.number)
        self._mine.seen = self._local.seen
        link.say(self._mine, self._head.state if self._head else None)

    def _dial(self, now: float) -> None:
        if self._local.busy:
            self._local.cut_short()  # also those that torch elastic started meanwhile
            return
        if now < self._redial_at:
            return
        if self._head is None and not self._is_ready:
            return  # the others would stop to go on with this node, and wait for it
        self._redial_at = now + REDIAL_SECONDS
        leaving = self._mine.leaving and not self._dismissed
        mine = MemberState(node=self._mine.node, leaving=leaving, unfit=self._mine.unfit)
        self._mine, self._joined, self._reported = mine, False, True
        job = self._head.state if self._head else None
        self._link = self._network.connect(self._rendezvous, mine, job)

    @property
    def _is_ready(self) -> bool:
        """Whether workers would start without a wait for imports, and the node has been checked."""
        return self._local.is_warm and self._mine.unfit is not None

    def patience(self) -> float:
        """Return the seconds after which to call :meth:`serve` again without an event."""
        link = self._link
        if self._local.busy and self._local.seen < self._local.flagged:
            return UNSEEN_SECONDS
        if link is None or link.job is None or self._head is not None:
            return TURN_SECONDS
        silent_at = max(link.heard_at, self._back) + LOST_SECONDS
        return min(TURN_SECONDS, max(0.01, silent_at - self._clock()))

    def _silence(self, link: Link, now: float) -> str:
        """Return why the link counts as lost; empty if it works."""
        if link.job is not None and link.number in link.job.lost:
            return "it has given up this node"
        if link.broken:
            return link.broken
        if link.job is None:
            return ""  # its connection has bounds of its own
        since = max(link.heard_at, self._back)
        return f"no report for {now - since:.1f} s" if now - since > LOST_SECONDS else ""

    def _hang_up(self, link: Link, why: str) -> None:
        if self._head is not None:  # its own hub: the supervisor starts another agent
            raise SystemExit(f"elastic-ckpt agent: the job's hub has failed: {why}")
        self._link = None
        self._local.cut_short()
        link.close()
        if self._mine.ended is not None and not self._reported:  # no head will judge it
            self._reported = True
            self._send(self._mine.ended)
        if self._joined:
            self._joined = False
            log.warning("the head is lost: %s", why)
            self._send(self._head_lost(why, link))

    def _head_lost(self, why: str, link: Link, *, passed_on: bool = False) -> HeadLost:
        job = link.job
        if job is None:
            return HeadLost(why)
        others = max(0, len(job.roster) - (2 if link.number in job.roster else 1))
        last = MAX_POSITION if self._mine.node in job.left_out else 0
        return HeadLost(why, position(job, link.number) + last, others, passed_on)

    def leave(self) -> None:
        """Leave the head without a report to the supervisor."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _lead(self, head: HeadRules, link: Link) -> None:
        members, heard_until = link.heard
        head.take_in(members, heard_until)
        running = len(head.state.roster) if head.running else 0
        lost = sum(number in head.state.lost for number in head.state.roster)
        nodes = Nodes(
            tuple(head.present().values()), running, lost, len(head.state.roster),
            head.unfit(), head.running_names(),
        )  # fmt: skip
        # Until this node itself can launch, nobody counts: the others come when they can, too.
        if nodes != self._nodes and (self._nodes is not None or self._is_ready):
            self._nodes = nodes
            log.info("nodes here: %s; running: %d", ", ".join(nodes.present), nodes.running)
            self._send(nodes)
        self._look_for_hang(head)
        if self._dismiss_by:
            others = [number for number in head.present() if number != link.number]
            if not others or self._clock() > self._dismiss_by:
                self._dismiss_by = 0.0
                self._send(Dismissed())

    def _look_for_hang(self, head: HeadRules) -> None:
        """End a hung incarnation once every node has reported stacks, or had time to."""
        (stuck, whole), state = head.stuck(), head.state
        if not stuck or state.over:
            self._stuck_since = 0.0
            return
        now = self._clock()
        self._stuck_since = self._stuck_since or now
        if whole or now - self._stuck_since > EXPLAIN_SECONDS:
            log.warning("incarnation %d hangs", state.incarnation)
            state.over = True
            self._send(Hung(stuck))

    def _follow(self, job: JobState, number: int) -> None:
        if not self._joined:
            self._joined = True
            log.info("joined %s, which %s leads, as member %d", job.job, job.head, number)
            self._send(Joined(job.run_id, job.job, job.identity, job.head, job.terms))
        left_out = job.left_out.get(self._mine.node, "")
        if left_out != self._left_out and self._head is None:
            self._left_out = left_out
            self._send(LeftOut(left_out))
        if job.end is not None and self._head is None and not self._mine.leaving:
            self._mine.leaving, self._dismissed = True, job.end.passed_on
            if job.end.passed_on and self._link is not None:
                self._send(self._head_lost(job.end.message, self._link, passed_on=True))
            else:
                self._send(JobOver(job.end.exit_code, job.end.message))
        mine = self._mine
        self._report(job)
        if number in job.roster and job.incarnation != mine.incarnation and not job.is_over:
            self._begin(job, number)
        if mine.incarnation != job.incarnation or number not in job.roster:
            return
        if mine.ended is None:
            self._serve_requests(job)
            if job.over:
                self._local.cut_short()
            if job.hung and not self._all_idle:
                self._send(AllIdle())
            self._all_idle = job.hung

    def _report(self, job: JobState) -> None:
        """Send the supervisor the head's verdict on this node's last incarnation. The next one may
        already run, without a node that leaves."""
        ended = self._mine.ended
        if self._reported or ended is None:
            return
        verdict = job.verdict
        if verdict is not None and verdict.incarnation == ended.incarnation:
            self._reported = True
            self._send(verdict)
        elif job.incarnation > ended.incarnation:  # this node missed the verdict
            self._reported = True
            self._send(ended)

    def _begin(self, job: JobState, number: int) -> None:
        mine = self._mine
        mine.incarnation, mine.answers, mine.ended, mine.idle = job.incarnation, {}, None, False
        mine.stuck = None
        self._reported = self._all_idle = False
        if mine.leaving or job.over:
            mine.ended = Ended(
                incarnation=job.incarnation, kind=EndKind.CUT_SHORT,
                lost=(mine.node,) if mine.leaving else (),
            )  # fmt: skip
            return
        rank, store = job.roster.index(number), self._workers_store
        if rank > 0:
            store = None
        node_rank = NodeRank(
            job.incarnation,
            rank,
            len(job.roster),
            self._rendezvous.host,
            job.port,
            store,
            job.arguments,
        )
        self._send(Launched(job.incarnation, len(job.roster), rank))
        self._local.begin(node_rank)

    def _serve_requests(self, job: JobState) -> None:
        known = {request.number for request in job.requests}
        answers = self._mine.answers
        self._mine.answers = {number: one for number, one in answers.items() if number in known}
        for request in job.requests:
            number = request.number
            if number > self._local.flagged:
                self._mine.answers = {**self._mine.answers, number: self._local.flag(number)}
            if request.step is not None and number > self._local.answered:
                agreed = RequestAnswer(number, request.kind, request.step)
                self._local.post(agreed, idle=request.idle)
