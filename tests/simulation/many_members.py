"""The nodes of a head with many members: their agents in a few lines, and no workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind
from elastic_ckpt.protocol.cluster import (
    BEAT_SECONDS,
    LOST_SECONDS,
    JobState,
    MemberState,
    NodeAnswer,
)
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.hub_lines import HeadLine, encode_member
from elastic_ckpt.supervisor.agent.launch import NodeRank
from tests.simulation.kernel import Violation
from tests.simulation.many_links import Line

if TYPE_CHECKING:
    from tests.simulation.many_nodes import ManyNodes

LINK_SECONDS = (0.0001, 0.002)
"""How long a line is on its way."""

RETRANSMITTED = (0.2, 0.6, 1.4, 3.0)
"""When TCP sends again what was lost, after the first time."""


class Workers:
    """The head's own part in an incarnation (``LocalWorkers``)."""

    busy = False
    is_warm = True
    answered = flagged = seen = 0

    def __init__(self, world: ManyNodes) -> None:
        self._world = world
        self._incarnation = 0

    def begin(self, node_rank: NodeRank) -> None:
        self.busy, self.answered, self.flagged, self.seen = True, 0, 0, 0
        self._incarnation = node_rank.number

    def flag(self, number: int) -> NodeAnswer:
        self.flagged = number
        return self._world.entered(self._incarnation, number)

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        self.answered = self.seen = answer.number
        self._world.learned(self._incarnation, answer.number, answer.step)
        if answer.kind is RequestKind.STOP:
            self._end(EndKind.STOPPED)

    def cut_short(self) -> None:
        self._end(EndKind.CUT_SHORT)

    def _end(self, kind: EndKind) -> None:
        if self.busy:
            self.busy = False
            self._world.end_head(Ended(incarnation=self._incarnation, kind=kind))


class Member:
    """A node that is not the head: its agent in a few lines, as ``benchmarks/hub.py`` has them."""

    def __init__(self, world: ManyNodes, name: str) -> None:
        self.world = world
        self.state = MemberState(node=name)
        self.line: Line | None = None
        self.number = -1
        self.is_gone = False  # vanished, or left
        self.silent_until = 0.0
        self._roster: frozenset[int] = frozenset()
        self._heard_at = self._sent_by = 0.0
        self.told_by = 0.0

    @property
    def is_there(self) -> bool:
        """Whether it is to be in the next incarnation."""
        return not self.is_gone and not self.state.leaving and self.silent_until < float("inf")

    def connect(self) -> None:
        self._heard_at = self.world.kernel.now
        self.line = Line(self.world, self)
        self.world.listener.waiting.append(self.line)
        self.world.ring(self.world.listener)
        self.say()
        self.world.kernel.after(self.world.kernel.between(0.0, BEAT_SECONDS), self._beat)

    def say(self) -> None:
        self._send(encode_member(self.state)[:-1])

    def _send(self, line: bytes) -> None:
        end, kernel = self.line, self.world.kernel
        if self.is_gone or end is None or self.silent_until == float("inf"):
            return
        self._sent_by = max(self._sent_by, kernel.now + self.link_seconds())
        kernel.after(self._sent_by - kernel.now, lambda: end.deliver(line))

    def link_seconds(self) -> float:
        """How long a line takes; what is lost on a link that is cut TCP sends again."""
        kernel = self.world.kernel
        again = (0.0, *RETRANSMITTED)
        waits = next(one for one in again if kernel.now + one >= self.silent_until)
        return waits + kernel.between(*LINK_SECONDS)

    def _beat(self) -> None:
        kernel = self.world.kernel
        if self.is_gone or self.silent_until == float("inf"):
            return
        if kernel.now >= self.silent_until and kernel.now - self._heard_at > LOST_SECONDS:
            raise Violation(f"{self.state.node} has not heard the head for {LOST_SECONDS} s")
        self._send(b"")
        kernel.after(BEAT_SECONDS, self._beat)

    def hear(self, found: HeadLine | None) -> None:
        """A line of the head's arrives; None is a beat."""
        self._heard_at = self.world.kernel.now
        if found is None or found.job is None or self.is_gone:
            return
        if found.number >= 0:
            self.number = found.number
        if found.roster is not None:
            self._roster = self.world.members_of(found.roster.numbers)
        self._follow(found.job)

    def _follow(self, job: JobState) -> None:
        mine, changed = self.state, False
        if mine.incarnation != job.incarnation:
            if self.number not in self._roster or mine.leaving:
                return
            mine.incarnation, mine.answers, mine.ended, mine.seen = job.incarnation, {}, None, 0
            changed = True
        for request in job.requests:
            if request.number not in mine.answers:
                entered = self.world.entered(mine.incarnation, request.number)
                mine.answers = {request.number: entered}
                changed = True
            if request.step is not None and mine.seen < request.number:
                mine.seen, changed = request.number, True
                self.world.learned(mine.incarnation, request.number, request.step)
                if request.kind is RequestKind.STOP:
                    self._end(EndKind.STOPPED)
        if job.over:
            self._end(EndKind.CUT_SHORT)
        if changed:
            self.world.kernel.after(0.001, self.say)

    def _end(self, kind: EndKind) -> None:
        """All ranks of this node are gone some moments later."""
        number = self.state.incarnation

        def ended() -> None:
            if self.state.ended is None and self.state.incarnation == number:
                self.state.ended = Ended(incarnation=number, kind=kind)
                self.say()

        if self.state.ended is None:
            self.world.kernel.after(self.world.kernel.between(0.01, 0.3), ended)

    # -- what happens to it -----------------------------------------------------------------------

    def vanish(self) -> None:
        """Its machine is killed, and the kernel closes the connection."""
        self.is_gone = True
        if self.line is not None:
            self.line.lost = "the other end has closed the connection"
            self.world.ring(self.line)

    def fall_silent(self, seconds: float = float("inf")) -> None:
        """Its link is cut, for some time."""
        self.silent_until = self.world.kernel.now + seconds

    def get_notice(self) -> None:
        """It saves with all others, and is not in the next incarnation."""
        self.state.leaving = True
        self.state.asks = {1: RequestKind.STOP}
        self.say()

    def closed(self, line: Line) -> None:
        """The head has closed the connection."""
        if self.line is line and not self.is_gone and self.silent_until < float("inf"):
            raise Violation(f"{self.state.node} is there, and the head has closed its connection")
