"""Several nodes as one job: what they tell each other, and the rules of the one that leads.

One node hosts the job's store and leads: it is the head. Every member, the head included, says
how it stands in a :class:`MemberState`; the head says what is to be done in a :class:`JobState`.
Both are said again and again, whole: a word that was missed is made up for by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from elastic_ckpt.policy.hang import StalledNode
from elastic_ckpt.protocol.agreement import RING, RequestKind, answer_step
from elastic_ckpt.protocol.ended import Ended, EndKind, merge

BEAT_SECONDS: Final = 0.05
"""Between two words of a node at the most."""

LOST_SECONDS: Final = 2.5
"""Silence after which a node is given up: no pause of a process or a switch lasts as long."""

STUCK_SECONDS: Final = 60.0
"""How long a node may take to be rid of its workers."""

GATHER_SECONDS: Final = 3.0
"""How long to wait for more nodes once there are enough; those that come later join later."""


class NodeAnswer(msgspec.Struct, frozen=True):
    """A node's word on a request: the largest step that its ranks entered, and if any began one."""

    step: int
    started: bool


class MemberState(msgspec.Struct, kw_only=True):
    """What a node says of itself.

    Attributes:
        node: its name.
        leaving: it has a notice, and takes no part in the next incarnation.
        asks: requests by a count of its own; the newest few.
        incarnation: the one that it runs, or ran last.
        words: on that one's requests, by number.
        seen: the newest request that all of its ranks have taken up.
        idle: whether all of its ranks are silent for longer than they ever are.
        stuck: what was seen of them in a hang; None while there is none.
        ended: its verdict; None while its part of the incarnation runs.
    """

    node: str
    leaving: bool = False
    asks: dict[int, RequestKind] = {}
    incarnation: int = 0
    answers: dict[int, NodeAnswer] = {}
    seen: int = 0
    idle: bool = False
    stuck: StalledNode | None = None
    ended: Ended | None = None


class Request(msgspec.Struct):
    """A request to all ranks, as in ``protocol/agreement.py``.

    Attributes:
        step: the answer; None until every node has said its word.
        idle: no rank of any node has begun a step: there is nothing to save.
    """

    number: int
    kind: RequestKind
    step: int | None = None
    idle: bool = False


class JobEnd(msgspec.Struct, frozen=True):
    """The job is over for every node."""

    exit_code: int
    message: str


class JobState(msgspec.Struct, kw_only=True):
    """What the head says to all nodes.

    Attributes:
        run_id, job, identity: of the run, its name, and what tells the job directory from others.
        head: the head's name.
        terms: what it was told that all nodes must be told alike, by option.
        incarnation: the newest; 0 for none yet.
        roster: numbers of its members, in the order of their group ranks.
        port: where the workers' store listens, on the head.
        requests: of this incarnation.
        over: whoever still runs workers of it kills them.
        hung: every rank of every node is idle.
        verdict: how the newest that is over ended, on all nodes; also while the next one runs.
        lost: numbers of members that were given up; such a node comes back under another one.
        end: the job is over.
    """

    run_id: str
    job: str
    identity: str
    head: str
    terms: dict[str, str] = {}
    incarnation: int = 0
    roster: tuple[int, ...] = ()
    port: int = 0
    requests: list[Request] = []
    over: bool = False
    hung: bool = False
    verdict: Ended | None = None
    lost: set[int] = set()
    end: JobEnd | None = None

    @property
    def is_over(self) -> bool:
        """Whether the newest incarnation has its verdict."""
        return self.verdict is not None and self.verdict.incarnation == self.incarnation


@dataclass(frozen=True)
class Seen:
    """A member as the head sees it; ``heard_at`` is monotonic seconds."""

    state: MemberState
    heard_at: float


class HeadRules:
    """The rules of the head; pure, so that they can be tried in any order of words.

    Attributes:
        state: what it tells.
    """

    def __init__(self, state: JobState) -> None:
        self.state = state
        self._members: Mapping[int, Seen] = {}
        self._over_at = 0.0  # when the incarnation that runs was found to be
        self._taken: dict[int, int] = {}  # by member: how many of its asks were looked at

    @property
    def running(self) -> bool:
        """Whether an incarnation is under way."""
        return bool(self.state.roster) and not self.state.is_over

    def present(self) -> dict[int, str]:
        """Members that can take part in the next incarnation, and their names."""
        return {
            number: seen.state.node
            for number, seen in sorted(self._members.items())
            if number not in self.state.lost and not seen.state.leaving
        }

    def stuck(self) -> tuple[tuple[StalledNode, ...], bool]:
        """What nodes saw of their ranks in a hang, and whether all have looked that run any."""
        states = self._roster_states().values() if self.running else ()
        words = [state.stuck for state in states if state.ended is None]
        return tuple(word for word in words if word is not None), None not in words

    def launch(self, incarnation: int, most: int, port: int) -> tuple[int, ...]:
        """Begin an incarnation with who is present; the roster."""
        state = self.state
        state.incarnation, state.port = incarnation, port
        state.requests, state.over, state.hung = [], False, False
        self._over_at = 0.0
        state.roster = tuple(self.present())[:most]
        return state.roster

    def ask(self, kind: RequestKind) -> None:
        """Ask all ranks for something; a save only when the one before has been taken up."""
        requests = self.state.requests
        if not self.running or any(one.kind is RequestKind.STOP for one in requests):
            return
        number = requests[-1].number if requests else 0
        waiting = any(self._members[one].state.seen < number for one in self.state.roster)
        if kind is not RequestKind.STOP and waiting:
            return
        self.state.requests = [*requests[1 - RING :], Request(number + 1, kind)]

    def take_in(self, members: Mapping[int, Seen], now: float) -> None:
        """Draw the consequences of what the members say.

        Args:
            members: by number; a number is never used again.
        """
        self._members = members
        self._give_up(now)
        for number, seen in members.items():
            new = {count for count in seen.state.asks if count > self._taken.get(number, 0)}
            self._taken[number] = max(new, default=self._taken.get(number, 0))
            if number in self.state.roster:
                for count in sorted(new):
                    self.ask(seen.state.asks[count])
        if self.running:
            self._answer()
            self._look_for_end(now)

    def _give_up(self, now: float) -> None:
        newest = {seen.state.node: number for number, seen in sorted(self._members.items())}
        for number, seen in self._members.items():
            if now - seen.heard_at > LOST_SECONDS or newest[seen.state.node] != number:
                self.state.lost.add(number)

    def _roster_states(self) -> dict[int, MemberState]:
        """Of those that speak of this incarnation."""
        found = {number: self._members[number].state for number in self.state.roster}
        current = self.state.incarnation
        return {number: one for number, one in found.items() if one.incarnation == current}

    def _answer(self) -> None:
        states = self._roster_states()
        if len(states) < len(self.state.roster):
            return
        for request in self.state.requests:
            # A node that is done begins no step any more.
            asked = [
                state
                for state in states.values()
                if state.ended is None or request.number in state.answers
            ]
            said = [one.answers[request.number] for one in asked if request.number in one.answers]
            if request.step is None and asked and len(said) == len(asked):
                request.step = answer_step(word.step for word in said)
                request.idle = request.kind is RequestKind.STOP and not any(
                    word.started for word in said
                )
        busy = [state for state in states.values() if state.ended is None]
        self.state.hung = bool(busy) and all(state.idle for state in busy)

    def _look_for_end(self, now: float) -> None:
        state = self.state
        self._give_up_the_stuck(now)
        states = self._roster_states()
        gone = [number for number in state.roster if number in state.lost]
        ended = {number: one.ended for number, one in states.items() if one.ended is not None}
        if gone or any(one.failed for one in ended.values()):
            state.over = True
        if all(number in ended or number in gone for number in state.roster):
            verdicts = [ended[number] for number in state.roster if number in ended]
            names = tuple(self._members[number].state.node for number in gone)
            if verdicts:
                state.verdict = self._judge(merge(verdicts, names))

    def _judge(self, merged: Ended) -> Ended:
        """Where all were stopped before a step, what one failed of follows from that."""
        stopped = any(request.idle for request in self.state.requests)
        if not stopped or merged.lost or merged.kind is not EndKind.CRASHED:
            return merged
        return msgspec.structs.replace(
            merged, kind=EndKind.NOT_BEGUN, rank=-1, exit_code=0, message="", tail=()
        )

    def _give_up_the_stuck(self, now: float) -> None:
        """A node whose workers cannot be killed must not hold up all others for ever."""
        state = self.state
        self._over_at = (self._over_at or now) if state.over else 0.0
        if state.over and now - self._over_at > STUCK_SECONDS:
            ended = {
                number for number, one in self._roster_states().items() if one.ended is not None
            }
            state.lost |= set(state.roster[1:]) - ended


@dataclass
class Gathering:
    """How many nodes a job takes, and when it begins with those that are there.

    Attributes:
        least, most: nodes of an incarnation.
        expected: that of the last one less those that left or were lost; 0 before the first.
    """

    least: int
    most: int
    expected: int = 0
    _before: int = 0
    _changed_at: float = 0.0

    def may_launch(self, present: int, now: float) -> bool:
        """Whether to begin with so many nodes.

        Args:
            now: monotonic seconds.
        """
        self._settle(present, now)
        if present < self.least:
            return False
        enough = min(self.most, self.expected or self.most)
        return present >= enough or now - self._changed_at >= GATHER_SECONDS

    def may_grow(self, present: int, running: int, now: float) -> bool:
        """Whether to stop the incarnation of so many nodes for one with more."""
        self._settle(present, now)
        quiet = now - self._changed_at >= GATHER_SECONDS
        return min(present, self.most) > running and (quiet or present >= self.most)

    def _settle(self, present: int, now: float) -> None:
        if present != self._before or not self._changed_at:
            self._before, self._changed_at = present, now
