"""A model of the stop-step agreement, its judge, and an explorer of all its interleavings.

Ranks and watchers take one atomic action at a time: a rank writes ``entered``, reads the flag,
reads the answers, begins, finishes, rewinds ``entered`` before a save, acknowledges; a watcher
raises the flag, reads one word of one rank, posts, publishes the maximum over the nodes. Between
any two of them anybody else may go on. The decisions are the real ones: ``Agenda.decide`` for the
ranks, ``answer_step`` for the watchers. ``test_agreement_model.py`` also holds the order of the
model's actions against that of ``StepProtocol`` and of the watchers.

Ranks are coupled as synchronous training couples them: none finishes a step before all of them
have begun it, and a save is over only when all of them have arrived at the same one. Ranks that
save at different steps therefore show as a deadlock.

Memory is sequentially consistent here: a write is seen by whatever is read later. Python has no
store-load fence, and the real watcher waits 1 ms between raising the flag and reading instead,
which is far longer than a processor holds a store back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elastic_ckpt.protocol.agreement import (
    NOTHING_ENTERED,
    ActionKind,
    Agenda,
    RequestAnswer,
    RequestKind,
    answer_step,
)

SAVE, STOP = RequestKind.SAVE, RequestKind.STOP

# -- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is run, and by which rules; the defaults are those of a ``Session``.

    Attributes:
        nodes: ranks on each node.
        steps: optimizer steps in the data.
        start: the step that was resumed from.
        requests: what is asked for, in this order; each at any time, also when all is over.
        interval: steps between the saves that follow from the step number.
        deaths: ranks that may die, each in any state.
        node_deaths: nodes that may vanish, with their watchers and ranks.
        flag_first: the watcher raises the flag before it reads; else afterwards.
        entered_first: a rank writes ``entered`` before it reads the flag; else afterwards.
        maximum: the answer is the maximum over the nodes; else each node takes its own.
        rewinds: a rank sets ``entered`` back before it saves.
        loop: the script calls ``should_save`` once after every step, including the last, and
            does not return to the boundary after a save; else it is a ``Session``, which checks
            before each step, and again after a save.
        gives_up: a watcher that learns of a death aborts; else it waits on.
        watcher_waits: the watcher posts only when every rank has come to a boundary.
        ranks_vote: no watcher answers: each rank posts what it has finished and waits for all.
    """

    nodes: tuple[int, ...] = (2,)  # largest first
    steps: int = 3
    start: int = 0
    requests: tuple[RequestKind, ...] = (STOP,)
    interval: int = 0
    deaths: int = 0
    node_deaths: int = 0
    flag_first: bool = True
    entered_first: bool = True
    maximum: bool = True
    rewinds: bool = True
    loop: bool = False
    gives_up: bool = True
    watcher_waits: bool = False
    ranks_vote: bool = False

    @property
    def first_boundary(self) -> int:
        """The step after which a rank checks first."""
        return self.start + self.loop

    @property
    def last_boundary(self) -> int:
        """The step after which a rank checks last."""
        return self.steps if self.loop else self.steps - 1


class Rank(NamedTuple):
    """A rank: where it is in its program, its words on the board, its agenda.

    ``at`` names the action that it takes next; ``then`` where it goes after a save. ``flag`` is
    what it read last. ``saves`` holds the steps of all saves that it has arrived at.
    """

    at: str
    finished: int
    begun: int
    entered: int = NOTHING_ENTERED
    acknowledged: int = 0
    seen: int = 0
    open: tuple[RequestAnswer, ...] = ()
    flag: int = 0
    then: str = ""
    saves: tuple[int, ...] = ()
    left: bool = False
    vote: int | None = None


class Node(NamedTuple):
    """A node's board and its watcher; ``served`` counts the requests taken up."""

    at: str = "idle"
    flag: int = 0
    answers: tuple[RequestAnswer, ...] = ()
    aborted: int = 0
    served: int = 0
    kind: RequestKind = STOP
    words: tuple[int, ...] = ()
    posts: tuple[int, ...] = ()
    gave_up: bool = False


ENDS = frozenset({"stopped", "completed", "released", "dead"})
"""Where a rank takes no further action."""

COUPLED = frozenset({"finish", "saving", "leaving"})
"""Where a rank waits for ranks; a supervisor kills ranks that are stuck here after a death."""

State = tuple[tuple[int, ...], tuple[int, ...]]
"""Ranks and nodes, by their numbers in ``Model.things``."""


def put(numbers: tuple[int, ...], index: int, number: int) -> tuple[int, ...]:
    """The tuple with one element replaced."""
    return (*numbers[:index], number, *numbers[index + 1 :])


class Model:
    """The transitions of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.home = [node for node, size in enumerate(job.nodes) for _ in range(size)]
        self.things: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._rank_steps: dict[tuple[int, int, int | None], int | None] = {}

    def initial(self) -> State:
        """All ranks have loaded; none has posted it on the board."""
        # The first call of should_save comes when a step is over.
        at = "begin" if self.job.loop else "attach"
        rank = self._number(Rank(at, self.job.start, self.job.start))
        node = self._number(Node())
        return (rank,) * len(self.home), (node,) * len(self.job.nodes)

    def decode(self, state: State) -> tuple[list[Rank], list[Node]]:
        """The ranks and nodes of a state."""
        things = self.things
        return [things[number] for number in state[0]], [things[number] for number in state[1]]

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """Every action that can be taken now, and where it leads."""
        rank_numbers, node_numbers = state
        ranks, nodes = self.decode(state)
        for index, rank in enumerate(ranks):
            word = self._word(rank, ranks)
            key = (rank_numbers[index], node_numbers[self.home[index]], word)
            if key not in self._rank_steps:
                moved = self.rank_step(rank, nodes[self.home[index]], word)
                self._rank_steps[key] = None if moved is None else self._number(moved)
            number = self._rank_steps[key]
            if number is not None:
                yield self._label(index, rank), (put(rank_numbers, index, number), node_numbers)
        for index, node in enumerate(nodes):
            for moved in self.node_steps(index, ranks, nodes):
                after = put(node_numbers, index, self._number(moved))
                yield f"watcher {index}: {node.at}", (rank_numbers, after)
        yield from self._deaths(state, ranks, nodes)

    def canonical(self, state: State) -> State:
        """One of all states that differ only in which rank, or which node, is which.

        Ranks of a node are alike, but for those that the watcher has read and those that it has
        not; nodes of one size are alike.
        """
        groups = []
        first = 0
        for size, number in zip(self.job.nodes, state[1], strict=True):
            read = first + len(self.things[number].words)
            end = first + size
            ranks = (*sorted(state[0][first:read]), *sorted(state[0][read:end]))
            groups.append((-size, number, ranks))
            first = end
        groups.sort()
        return (
            tuple(rank for _, _, ranks in groups for rank in ranks),
            tuple(number for _, number, _ in groups),
        )

    def _label(self, index: int, rank: Rank) -> str:
        return f"node {self.home[index]}, a rank after step {rank.finished}: {rank.at}"

    def _number(self, thing: Rank | Node) -> int:
        number = self._numbers.setdefault(thing, len(self.things))
        if number == len(self.things):
            self.things.append(thing)
        return number

    # -- a rank -----------------------------------------------------------------------------------

    def _word(self, rank: Rank, ranks: list[Rank]) -> int | None:
        """What a rank takes from the other ranks; None while it has to wait for them."""
        match rank.at:
            case "finish":
                ready = all(peer.begun >= rank.begun for peer in ranks)
            case "saving":
                index = len(rank.saves) - 1
                ready = all(peer.saves[index : index + 1] == rank.saves[-1:] for peer in ranks)
            case "leaving":
                ready = all(peer.left for peer in ranks)
            case "count":
                votes = [peer.vote for peer in ranks]
                return None if None in votes else answer_step(votes)
            case _:
                ready = True
        return 0 if ready else None

    def rank_step(self, rank: Rank, node: Node, word: int | None) -> Rank | None:
        """Return the rank after its next action; None if it cannot take it now."""
        job = self.job
        if rank.at in ENDS or word is None:
            return None
        match rank.at:
            case "attach":
                return self._boundary(rank._replace(entered=job.start))
            case "enter":
                at = "look" if job.entered_first else "begin"
                return rank._replace(entered=rank.finished + 1, at=at)
            case "look":
                return self._look(rank, node)
            case "look again":
                return rank._replace(flag=node.flag, at="answers")
            case "answers":
                return self._decide(rank, {answer.number: answer for answer in node.answers})
            case "aborted":
                return rank._replace(at="released" if node.aborted > rank.seen else "wait")
            case "wait":
                news = node.flag != rank.flag or node.aborted > rank.seen
                news = news or any(answer.number == rank.seen + 1 for answer in node.answers)
                return rank._replace(at="look again") if news else None
            case "vote":
                return rank._replace(vote=rank.finished, flag=node.flag, at="count")
            case "count":
                return self._decide(rank, {1: RequestAnswer(1, STOP, word)})
            case "rewind":
                return rank._replace(entered=rank.finished, at="acknowledge")
            case "acknowledge":
                rank = rank._replace(acknowledged=rank.seen)
                return self._go(rank) if rank.then == "go" else self._save(rank)
            case "arrive":
                return rank._replace(saves=(*rank.saves, rank.finished), at="saving")
            case "saving":
                return self._behind_save(rank)
            case "leave":
                return rank._replace(left=True, at="leaving")
            case "leaving":
                return rank._replace(at="stopped")
            case "begin":
                return rank._replace(begun=rank.finished + 1, at="finish")
            case "finish":
                rank = rank._replace(finished=rank.begun)
                if self._interval_due(rank) and not job.loop:
                    return self._save(rank._replace(then="boundary"))
                return self._boundary(rank)
        raise AssertionError(rank.at)

    def _boundary(self, rank: Rank) -> Rank:
        """A step is over: the next one, or the end of the data."""
        if self.job.loop and rank.entered == NOTHING_ENTERED:
            return rank._replace(at="attach")
        if rank.finished < self.job.steps or self.job.loop:
            return rank._replace(at="enter" if self.job.entered_first else "look", then="")
        return self._complete(rank)

    def _look(self, rank: Rank, node: Node) -> Rank:
        if node.flag != rank.seen or rank.open:
            return rank._replace(at="vote" if self.job.ranks_vote else "look again")
        return self._go(rank) if self.job.entered_first else rank._replace(at="enter")

    def _go(self, rank: Rank) -> Rank:
        """Nothing is asked: begin the next step, if there is one."""
        if self.job.loop and self._interval_due(rank) and not self._saved(rank):
            return rank._replace(then="go", at="arrive")
        if rank.finished < self.job.steps:
            return rank._replace(at="begin")
        return rank._replace(at="completed") if self.job.loop else self._complete(rank)

    def _complete(self, rank: Rank) -> Rank:
        return self._save(rank._replace(then="complete"))

    def _interval_due(self, rank: Rank) -> bool:
        return self.job.interval > 0 and rank.finished % self.job.interval == 0

    def _decide(self, rank: Rank, answers: dict[int, RequestAnswer]) -> Rank:
        agenda = Agenda(rank.seen, list(rank.open))
        action = agenda.decide(rank.finished, rank.flag, answers)
        rank = rank._replace(seen=agenda.seen, open=tuple(agenda.open))
        match action.kind:
            case ActionKind.WAIT:
                return rank._replace(at="aborted")
            case ActionKind.GO:
                return rank._replace(then="go", at="acknowledge")
            case ActionKind.SAVE | ActionKind.SAVE_NOW:
                rank = rank._replace(then="save")
            case ActionKind.STOP:
                rank = rank._replace(then="stop")
        return rank._replace(at="rewind" if self.job.rewinds else "acknowledge")

    def _save(self, rank: Rank) -> Rank:
        """Save, unless what would be saved is saved already, and go where ``then`` says."""
        return self._behind_save(rank) if self._saved(rank) else rank._replace(at="arrive")

    def _saved(self, rank: Rank) -> bool:
        return rank.finished == (rank.saves[-1] if rank.saves else self.job.start)

    def _behind_save(self, rank: Rank) -> Rank:
        match rank.then:
            case "stop":
                return rank._replace(at="leave" if rank.finished else "stopped")
            case "complete":
                return rank._replace(at="completed")
            case "save" | "go" if self.job.loop:
                return self._go(rank)
            case _:
                return self._boundary(rank)

    # -- a watcher --------------------------------------------------------------------------------

    def node_steps(self, index: int, ranks: list[Rank], nodes: list[Node]) -> Iterator[Node]:
        """Yield the node after each action that its watcher can take."""
        job, node = self.job, nodes[index]
        mine = [rank for rank, home in zip(ranks, self.home, strict=True) if home == index]
        order = ("raise", "read") if job.flag_first else ("read", "raise")
        match node.at:
            case "idle" if node.served < len(job.requests):
                node = node._replace(kind=job.requests[node.served], served=node.served + 1)
                # On one node a save that is asked for while one is being taken up is that one.
                drops = node.kind is SAVE and node.flag and len(nodes) == 1
                yield node._replace(at="taken up?" if drops else order[0], words=())
            case "taken up?":
                if mine[len(node.words)].acknowledged < node.flag:
                    yield node._replace(at="idle", words=())
                elif len(node.words) + 1 < len(mine):
                    yield node._replace(words=(*node.words, 0))
                else:
                    yield node._replace(at=order[0], words=())
            case "raise":
                at = "read" if job.flag_first else "post"
                yield node._replace(flag=node.flag + 1, at="idle" if job.ranks_vote else at)
            case "read":
                words = (*node.words, mine[len(node.words)].entered)
                at = "read" if len(words) < len(mine) else "post" if job.flag_first else "raise"
                yield node._replace(words=words, at=at)
            case "post":
                if job.watcher_waits and any(
                    rank.at not in ("aborted", "wait", *ENDS) for rank in mine
                ):
                    return
                node = node._replace(posts=(*node.posts, answer_step(node.words)), words=())
                yield (
                    self._publish(node, node.posts)
                    if len(nodes) == 1
                    else node._replace(at="gather")
                )
            case "gather":
                posts = [each.posts[node.flag - 1 : node.flag] for each in nodes]
                if all(posts):
                    yield self._publish(node, [post for (post,) in posts])
        yield from self._give_up(nodes[index], ranks, len(nodes))

    def _publish(self, node: Node, posts: Any) -> Node:
        step = answer_step(posts) if self.job.maximum else node.posts[-1]
        answer = RequestAnswer(node.flag, node.kind, step)
        return node._replace(answers=(*node.answers, answer), at="idle")

    def _give_up(self, node: Node, ranks: list[Rank], nodes: int) -> Iterator[Node]:
        """A death aborts: the agent's loop between two requests, or a wait for another node."""
        if node.gave_up or node.at not in ("idle", "gather") or not self.job.gives_up:
            return
        if any(rank.at == "dead" for rank in ranks):
            node = node._replace(aborted=node.flag, gave_up=True)
            yield node if nodes == 1 else node._replace(at="ended")

    # -- deaths -----------------------------------------------------------------------------------

    def _deaths(
        self, state: State, ranks: list[Rank], nodes: list[Node]
    ) -> Iterator[tuple[str, State]]:
        dead = sum(rank.at == "dead" for rank in ranks)
        if self.job.deaths > dead:
            for index, rank in enumerate(ranks):
                if rank.at not in ENDS:
                    dead_rank = self._number(rank._replace(at="dead"))
                    after = put(state[0], index, dead_rank)
                    yield f"{self._label(index, rank)}, where it dies", (after, state[1])
        if self.job.node_deaths > sum(node.at == "gone" for node in nodes):
            for index, node in enumerate(nodes):
                after = tuple(
                    self._number(rank._replace(at="dead")) if home == index else number
                    for rank, home, number in zip(ranks, self.home, state[0], strict=True)
                )
                gone = self._number(node._replace(at="gone", gave_up=True))
                yield f"node {index} vanishes in {node.at}", (after, put(state[1], index, gone))


# -- what must hold -------------------------------------------------------------------------------


class Judge:
    """Says what is wrong with a state."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def complaints(self, ranks: list[Rank], nodes: list[Node], labels: list[str]) -> Iterator[str]:
        """What is wrong; ``labels`` are the actions that can be taken."""
        stops = [answer.step for node in nodes for answer in node.answers if answer.kind is STOP]
        furthest = max(rank.begun for rank in ranks)
        if stops and furthest > max(min(stops), self._job.first_boundary):
            yield f"a rank has passed the stop step: {min(stops)}, and {furthest} has begun"
        busy = any(
            node.served < len(self._job.requests)
            if node.at == "idle"
            else node.at not in ("ended", "gone")
            for node in nodes
        )
        if busy and not any(label.startswith("watcher") for label in labels):
            yield "a watcher waits for a rank"
        if not labels:
            yield from filter(None, [self._end(ranks, nodes)])

    def _end(self, ranks: list[Rank], nodes: list[Node]) -> str:
        """What is wrong with a state that nothing leads out of; empty if nothing is."""
        stuck = [f"rank {i} in {rank.at}" for i, rank in enumerate(ranks) if rank.at not in ENDS]
        if any(rank.at == "dead" for rank in ranks):
            if any(rank.at not in ENDS | COUPLED for rank in ranks):
                return f"behind a death, not released: {', '.join(stuck)}"
            longest = max((rank.saves for rank in ranks), key=len)
            if any(longest[: len(rank.saves)] != rank.saves for rank in ranks):
                return f"ranks saved differently: {[rank.saves for rank in ranks]}"
            return ""
        if stuck or any(rank.at in ("released", "dead") for rank in ranks):
            return f"deadlock: {', '.join(stuck)}"
        if len({(rank.at, rank.finished, rank.saves) for rank in ranks}) != 1:
            return f"ranks end differently: {ranks}"
        return self._outcome(ranks[0], nodes)

    def _outcome(self, rank: Rank, nodes: list[Node]) -> str:
        """All ranks ended alike; is it the end that the answers say?"""
        job = self._job
        if len({node.answers for node in nodes}) != 1:
            return f"the nodes published different answers: {[node.answers for node in nodes]}"
        answers = nodes[0].answers
        first = job.first_boundary
        stop = min(
            (max(answer.step, first) for answer in answers if answer.kind is STOP),
            default=job.steps + 1,
        )
        end = ("stopped", stop) if stop <= job.last_boundary else ("completed", job.steps)
        if (rank.at, rank.finished) != end:
            return f"{rank.at} at {rank.finished}, but the answers are {answers}"
        steps = {max(answer.step, first) for answer in answers}
        if rank.at == "stopped" or not job.loop:
            steps.add(rank.finished)
        if job.interval:
            steps.update(range(job.interval, rank.finished + 1, job.interval))
        expected = tuple(sorted(step for step in steps if job.start < step <= rank.finished))
        if rank.saves != expected:
            return f"saved at {rank.saves} instead of {expected}"
        return ""


class Violation(NamedTuple):
    """What went wrong, and the actions that led to it."""

    what: str
    trace: list[str]


@dataclass
class Explored:
    """What an exploration found; ``witnessed`` names the situations that occurred in it."""

    violation: Violation | None = None
    witnessed: set[str] = field(default_factory=set)


Situation = Callable[[list[Rank], list[Node]], bool]

SITUATIONS: dict[str, Situation] = {
    "a rank runs ahead": lambda ranks, nodes: (
        max(rank.begun for rank in ranks) == min(rank.finished for rank in ranks) + 2
    ),
    "one waits at the boundary, one is in the next step": lambda ranks, nodes: any(
        a.at in ("wait", "vote", "count") and b.at == "finish" and b.begun == a.finished + 1
        for a in ranks
        for b in ranks
    ),
    "a flag rises while a rank saves": lambda ranks, nodes: any(
        rank.at == "saving" and rank.seen < nodes[0].flag for rank in ranks
    ),
    "a step is read that was about to be rewound": lambda ranks, nodes: any(
        rank.at == "rewind" and node.at in ("read", "post") and rank.entered in node.words
        for rank in ranks
        for node in nodes
    ),
    "a rank learns of two requests at once": lambda ranks, nodes: any(
        len(rank.open) > 1 for rank in ranks
    ),
    "a stop comes after the last boundary": lambda ranks, nodes: any(
        node.flag > rank.seen and rank.at == "completed" for node in nodes for rank in ranks
    ),
    "the answer is that no step was entered": lambda ranks, nodes: any(
        answer.step == NOTHING_ENTERED for node in nodes for answer in node.answers
    ),
    "a rank is released": lambda ranks, nodes: any(rank.at == "released" for rank in ranks),
    "a save is dropped": lambda ranks, nodes: any(
        node.at == "idle" and node.served > node.flag for node in nodes
    ),
}


def explore(job: Job, kind: str = "") -> Explored:
    """Visit every state that any interleaving leads to, once; stop at the first violation.

    Args:
        kind: how a violation has to begin, so that others are passed over.
    """
    model = Model(job)
    judge = Judge(job)
    found = Explored()
    start = model.initial()
    origin: dict[State, tuple[State, str] | None] = {start: None}
    pending = deque([start])  # breadth first: the first violation has the shortest trace
    unwitnessed = dict(SITUATIONS)
    while pending:
        state = pending.popleft()
        steps = list(model.successors(state))
        ranks, nodes = model.decode(state)
        complaints = judge.complaints(ranks, nodes, [label for label, _ in steps])
        wrong = next((what for what in complaints if what.startswith(kind)), None)
        for name in [name for name, holds in unwitnessed.items() if holds(ranks, nodes)]:
            found.witnessed.add(name)
            del unwitnessed[name]
        if wrong is not None:
            found.violation = Violation(wrong, _trace(origin, state))
            break
        for label, moved in steps:
            after = model.canonical(moved)
            if after not in origin:
                origin[after] = (state, label)
                pending.append(after)
    return found


def _trace(origin: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    labels: list[str] = []
    step = origin[state]
    while step is not None:
        labels.append(step[1])
        step = origin[step[0]]
    return labels[::-1]
