"""A multi-node job: the states that its nodes exchange, and the rules of the head.

One node, the head, hosts the hub that all members connect to, and leads. Every member, the head
included, reports a :class:`MemberState`, the head publishes the :class:`JobState`. Each is a whole
state, sent when it has changed; only the newest one matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from elastic_ckpt.policy.hang import StalledNode
from elastic_ckpt.protocol.agreement import RING, RequestKind, answer_step
from elastic_ckpt.protocol.ended import Ended, EndKind, merge

BEAT_SECONDS: Final = 1.0
"""Maximum time in which a node sends nothing; a change is sent at once."""

LOST_SECONDS: Final = 2.5
"""Silence after which a node counts as lost: longer than a pause of a process or a switch, and than
the time that TCP takes to send a beat again that was lost three times."""

STUCK_SECONDS: Final = 60.0
"""Maximum time for a node to end its workers."""

GATHER_SECONDS: Final = 3.0
"""Time to wait for more nodes once there are enough; later ones join a later incarnation."""


class NodeAnswer(msgspec.Struct, frozen=True):
    """A node's answer: the largest step that its ranks entered, and whether any of them began one
    in this incarnation."""

    step: int
    started: bool


class MemberState(msgspec.Struct, kw_only=True):
    """What a node reports about itself.

    Attributes:
        leaving: it has a notice, and does not take part in the next incarnation.
        asks: what it wants requested, by its own count; the newest few.
        incarnation: the one that it runs, or ran last.
        answers: its answers to that one's requests, by number.
        seen: the newest request that all of its ranks have seen.
        idle: whether all of its ranks have been silent for longer than is normal.
        stuck: the stacks of its ranks in a hang; None without one.
        ended: how its part of the incarnation ended; None while that runs.
        unfit: why its own check failed last; empty if it passed, None before the first.
    """

    node: str
    unfit: str | None = ""
    leaving: bool = False
    asks: dict[int, RequestKind] = {}
    incarnation: int = 0
    answers: dict[int, NodeAnswer] = {}
    seen: int = 0
    idle: bool = False
    stuck: StalledNode | None = None
    ended: Ended | None = None


class Request(msgspec.Struct):
    """A request to all ranks, as in ``protocol/agreement.py``; ``step`` is None until every node
    has answered. ``idle``: no rank of any node has begun a step, so there is nothing to save."""

    number: int
    kind: RequestKind
    step: int | None = None
    idle: bool = False


class JobEnd(msgspec.Struct, frozen=True):
    """The end of the job on every node; on the head alone if it is ``passed_on``."""

    exit_code: int
    message: str
    passed_on: bool = False


class JobState(msgspec.Struct, kw_only=True):
    """What the head publishes to all nodes.

    Attributes:
        run_id, job, identity: identify the run, the job by name, and the job directory.
        terms: the head's values of options that must be the same on all nodes, by name.
        incarnation: the newest; 0 before the first.
        roster: numbers of its members, in the order of their group ranks.
        port: where the workers' store listens, on the head.
        arguments: what the script gets after its own, in this incarnation.
        over: the incarnation is over; nodes kill workers that still run.
        hung: every rank of every node is idle.
        verdict: how the last incarnation that is over ended on all nodes; kept during the next.
        lost: numbers of lost members; such a node returns with a new number.
        left_out: nodes that take part only as far as MIN needs them, and why, by name.
        end: how the job ended; None while it runs.
    """

    run_id: str
    job: str
    identity: str
    head: str
    terms: dict[str, str] = {}
    incarnation: int = 0
    roster: tuple[int, ...] = ()
    port: int = 0
    arguments: tuple[str, ...] = ()
    requests: list[Request] = []
    over: bool = False
    hung: bool = False
    verdict: Ended | None = None
    lost: set[int] = set()
    left_out: dict[str, str] = {}
    end: JobEnd | None = None

    @property
    def is_over(self) -> bool:
        """Whether the newest incarnation has its verdict."""
        return self.verdict is not None and self.verdict.incarnation == self.incarnation


@dataclass(frozen=True)
class Seen:
    """A member's newest state, and when it was last alive, in the head's monotonic seconds. Once it
    is ``gone``, its connection is over, and it never uses this number again."""

    state: MemberState
    heard_at: float
    gone: bool = False


class HeadRules:
    """The rules of the head; pure, so that tests can apply any order of reports. The head publishes
    ``state``. Each rule looks at each member a constant number of times."""

    def __init__(self, state: JobState) -> None:
        self.state = state
        self._members: Mapping[int, Seen] = {}
        self._over_at = 0.0  # when the running incarnation was declared over
        self._taken: dict[int, int] = {}  # by member: the newest of its asks that was handled

    @property
    def running(self) -> bool:
        """Whether an incarnation runs."""
        return bool(self.state.roster) and not self.state.is_over

    def present(self) -> dict[int, str]:
        """Return the names of members that can take part in the next incarnation, by number."""
        return {
            number: seen.state.node
            for number, seen in sorted(self._members.items())
            if number not in self.state.lost and not seen.state.leaving
        }

    def unfit(self) -> dict[str, str]:
        """Return why the own checks of members failed, by name."""
        states = [self._members[number].state for number in self.present()]
        return {state.node: state.unfit for state in states if state.unfit}

    def running_names(self) -> tuple[str, ...]:
        """Return the names of the nodes that the running incarnation has; empty if none runs."""
        roster = self.state.roster if self.running else ()
        return tuple(self._members[number].state.node for number in roster)

    def stuck(self) -> tuple[tuple[StalledNode, ...], bool]:
        """Return the stacks that nodes reported in a hang, and whether all nodes have reported."""
        states = self._roster_states().values() if self.running else ()
        words = [state.stuck for state in states if state.ended is None]
        return tuple(word for word in words if word is not None), None not in words

    def launch(
        self,
        incarnation: int,
        most: int,
        port: int,
        arguments: tuple[str, ...] = (),
        without: Collection[str] = (),
    ) -> tuple[int, ...]:
        """Begin an incarnation with the present nodes, at most ``most`` and none of ``without``;
        return the roster. The script gets ``arguments`` after its own."""
        state = self.state
        state.arguments = arguments
        state.incarnation, state.port = incarnation, port
        state.requests, state.over, state.hung = [], False, False
        self._over_at = 0.0
        chosen = (number for number, name in self.present().items() if name not in without)
        state.roster = tuple(chosen)[:most]
        return state.roster

    def ask(self, kind: RequestKind) -> None:
        """Add a request to all ranks; a save only if they have seen the previous request."""
        requests = self.state.requests
        if not self.running or any(one.kind is RequestKind.STOP for one in requests):
            return
        number = requests[-1].number if requests else 0
        waiting = any(self._members[one].state.seen < number for one in self.state.roster)
        if kind is not RequestKind.STOP and waiting:
            return
        self.state.requests = [*requests[1 - RING :], Request(number + 1, kind)]

    def take_in(self, members: Mapping[int, Seen], now: float) -> None:
        """Update the job's state from the members' reports by number, which is never used twice;
        all were read at ``now``, in monotonic seconds."""
        self._members = members
        self._give_up(now)
        roster = set(self.state.roster)
        for number, seen in members.items():
            if not seen.state.asks:
                continue
            taken = self._taken.get(number, 0)
            new = sorted(count for count in seen.state.asks if count > taken)
            self._taken[number] = max(new, default=taken)
            if number in roster:
                for count in new:
                    self.ask(seen.state.asks[count])
        if self.running:
            self._answer()
            self._look_for_end(now)

    def _give_up(self, now: float) -> None:
        newest = {seen.state.node: number for number, seen in sorted(self._members.items())}
        for number, seen in self._members.items():
            silent = seen.gone or now - seen.heard_at > LOST_SECONDS
            if silent or newest[seen.state.node] != number:
                self.state.lost.add(number)

    def _roster_states(self) -> dict[int, MemberState]:
        """Return the states of roster members that report on this incarnation, by number."""
        found = {number: self._members[number].state for number in self.state.roster}
        current = self.state.incarnation
        return {number: one for number, one in found.items() if one.incarnation == current}

    def _answer(self) -> None:
        states = self._roster_states()
        if len(states) < len(self.state.roster):
            return
        for request in self.state.requests:
            # A node whose part is over begins no more steps.
            asked = [
                state
                for state in states.values()
                if state.ended is None or request.number in state.answers
            ]
            found = [one.answers[request.number] for one in asked if request.number in one.answers]
            if request.step is None and asked and len(found) == len(asked):
                request.step = answer_step(answer.step for answer in found)
                request.idle = request.kind is RequestKind.STOP and not any(
                    answer.started for answer in found
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
        if all(number in ended or number in state.lost for number in state.roster):
            verdicts = [ended[number] for number in state.roster if number in ended]
            names = tuple(self._members[number].state.node for number in gone)
            if verdicts:
                state.verdict = self._judge(merge(verdicts, names))

    def _judge(self, merged: Ended) -> Ended:
        """Return the verdict; a failure while all are stopped before a step is due to the stop."""
        stopped = any(request.idle for request in self.state.requests)
        if not stopped or merged.lost or merged.kind is not EndKind.CRASHED:
            return merged
        return msgspec.structs.replace(
            merged, kind=EndKind.NOT_BEGUN, rank=-1, exit_code=0, message="", tail=()
        )

    def _give_up_the_stuck(self, now: float) -> None:
        """Give up nodes whose workers cannot be killed, which would hold up all others."""
        state = self.state
        self._over_at = (self._over_at or now) if state.over else 0.0
        if state.over and now - self._over_at > STUCK_SECONDS:
            ended = {
                number for number, one in self._roster_states().items() if one.ended is not None
            }
            state.lost |= set(state.roster[1:]) - ended


def eligible(present: Sequence[str], left_out: Collection[str], least: int) -> tuple[str, ...]:
    """Return the nodes that may take part, in the order of ``present``, which begins with the head.

    Nodes that are left out take part only as far as the minimum needs them, the first ones first.
    If all are, none is: the cause is something that they share.
    """
    out = [name for name in present if name in left_out]
    fit = len(present) - len(out)
    if not out or not fit:
        return tuple(present)
    needed = set(out[: max(0, least - fit)])
    return tuple(name for name in present if name not in left_out or name in needed)


@dataclass
class Gathering:
    """Decides when an incarnation begins with the nodes that are present.

    Attributes:
        least, most: minimum and maximum number of nodes of an incarnation.
        expected: nodes of the last one without those that left or were lost; 0 before the first.
    """

    least: int
    most: int
    expected: int = 0
    _before: int = 0
    _changed_at: float = 0.0

    def may_launch(self, present: int, now: float) -> bool:
        """Whether to begin with the ``present`` number of nodes; ``now`` is monotonic seconds."""
        self._settle(present, now)
        if present < self.least:
            return False
        enough = min(self.most, self.expected or self.most)
        return present >= enough or now - self._changed_at >= GATHER_SECONDS

    def may_grow(self, present: int, running: int, now: float) -> bool:
        """Whether to stop an incarnation of ``running`` nodes for one with more."""
        self._settle(present, now)
        quiet = now - self._changed_at >= GATHER_SECONDS
        return min(present, self.most) > running and (quiet or present >= self.most)

    def may_replace(self, present: int, now: float) -> bool:
        """Whether to stop an incarnation for one without a node that is left out."""
        self._settle(present, now)
        return now - self._changed_at >= GATHER_SECONDS

    def _settle(self, present: int, now: float) -> None:
        if present != self._before or not self._changed_at:
            self._before, self._changed_at = present, now
