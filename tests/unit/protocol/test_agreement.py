"""The stop-step agreement, over all interleavings of small jobs and random ones of larger jobs.

``agreement_model.py`` says what is modelled and what must hold: no rank passes the stop step, none
waits for ever, all save at the same steps in the same order and end alike, and no watcher ever
waits for a rank.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.errors import StopAborted
from elastic_ckpt.protocol.agreement import (
    NOTHING_ENTERED,
    ActionKind,
    Agenda,
    RequestAnswer,
    RequestKind,
    StepAction,
    answer_step,
)
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.agent import watcher
from elastic_ckpt.training import step as step_module
from elastic_ckpt.training.step import StepProtocol
from tests.unit.protocol.agreement_model import (
    COUPLED,
    ENDS,
    SAVE,
    STOP,
    Job,
    Judge,
    Model,
    Node,
    Rank,
    explore,
)

AHEAD = "a rank runs ahead"
BLOCKED = "one waits at the boundary, one is in the next step"
WHILE_SAVING = "a flag rises while a rank saves"
REWOUND = "a step is read that was about to be rewound"
AT_ONCE = "a rank learns of two requests at once"
TOO_LATE = "a stop comes after the last boundary"
NOT_BEGUN = "the answer is that no step was entered"
RELEASED = "a rank is released"
DROPPED = "a save is dropped"

# -- every interleaving ---------------------------------------------------------------------------


def holds(job: Job, *witnesses: str) -> None:
    """Nothing goes wrong in any interleaving, and the situations that matter do occur."""
    found = explore(job)
    assert found.violation is None, "\n".join([found.violation.what, *found.violation.trace])
    assert not set(witnesses) - found.witnessed


@pytest.mark.parametrize(
    "job",
    [
        Job(nodes=(2,), steps=4),
        Job(nodes=(3,), steps=4),
        Job(nodes=(1, 1), steps=4),
        Job(nodes=(2, 1), steps=2),
    ],
)
def test_one_stop_at_any_time(job: Job) -> None:
    holds(job, AHEAD, BLOCKED, TOO_LATE, NOT_BEGUN)


def test_a_node_for_each_rank() -> None:
    """The agreement of a script without a supervisor, where each rank watches for itself."""
    holds(Job(nodes=(1, 1, 1), steps=2), AHEAD, BLOCKED, TOO_LATE)


@pytest.mark.parametrize(
    "job",
    [
        Job(nodes=(2,), steps=4, requests=(SAVE, STOP)),
        Job(nodes=(3,), steps=2, requests=(SAVE, STOP)),
        Job(nodes=(1, 1), steps=2, requests=(SAVE, STOP)),
    ],
)
def test_a_save_and_then_a_stop(job: Job) -> None:
    """Also a stop that comes while some ranks save and others have yet to arrive there."""
    holds(job, AHEAD, BLOCKED, WHILE_SAVING, REWOUND, AT_ONCE, TOO_LATE)


def test_saves_followed_by_a_stop() -> None:
    holds(Job(steps=3, requests=(SAVE, SAVE, STOP)), WHILE_SAVING, AT_ONCE, DROPPED)


def test_a_second_stop_changes_nothing() -> None:
    holds(Job(steps=4, requests=(STOP, STOP)), AT_ONCE)
    holds(Job(steps=4, requests=(STOP, SAVE)), WHILE_SAVING)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("interval", [1, 2])
def test_requests_beside_saves_at_fixed_steps(start: int, interval: int) -> None:
    """After a resume, too; one from the last step has nothing to do."""
    holds(Job(steps=3, start=start, interval=interval, requests=(SAVE, STOP)), TOO_LATE)


def test_a_single_rank() -> None:
    holds(Job(nodes=(1,), steps=4, requests=(SAVE, SAVE, STOP)), REWOUND, TOO_LATE)


def test_a_request_at_the_last_step_ends_all_ranks_alike() -> None:
    """A session has no boundary after its last step: all complete, with one last save."""
    holds(Job(nodes=(2,), steps=1, requests=(SAVE, STOP)), BLOCKED, TOO_LATE)
    holds(Job(nodes=(3,), steps=1), BLOCKED, TOO_LATE)


@pytest.mark.parametrize(
    "job",
    [
        Job(loop=True, steps=4, rewinds=False, requests=(SAVE, SAVE, STOP), interval=2),
        Job(loop=True, nodes=(3,), steps=3, rewinds=False),
        Job(loop=True, nodes=(1, 1), steps=3, rewinds=False),
    ],
)
def test_a_loop_that_checks_once_per_step(job: Job) -> None:
    """``should_save``: without a rewind, because the next step begins without another look."""
    holds(job, AHEAD, BLOCKED)


# -- deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        Job(nodes=(3,), steps=2, deaths=1),
        Job(nodes=(2,), steps=3, deaths=2, requests=(SAVE, STOP)),
        Job(nodes=(1, 1), steps=2, deaths=1),
        Job(nodes=(1, 1), steps=3, node_deaths=1),
    ],
)
def test_a_death_in_every_state_leaves_no_rank_waiting_for_an_answer(job: Job) -> None:
    """The supervisor kills ranks that are stuck in a step or in the save after it."""
    holds(job, BLOCKED, RELEASED)


def test_without_an_abort_a_vanished_node_leaves_ranks_waiting() -> None:
    broken = Job(nodes=(1, 1), steps=2, node_deaths=1, gives_up=False)
    found = explore(broken, "behind a death, not released")
    assert found.violation is not None
    assert "in wait" in found.violation.what


# -- rules that must fail, so that the explorer is known to see it --------------------------------


@pytest.mark.parametrize("nodes", [(2,), (3,)])
def test_ranks_that_wait_for_each_other_deadlock(nodes: tuple[int, ...]) -> None:
    """The naive rule: post what was finished, wait until all have posted, take the maximum."""
    found = explore(Job(nodes=nodes, ranks_vote=True))
    assert found.violation is not None
    assert found.violation.what.startswith("deadlock")
    assert "in finish" in found.violation.what
    assert "in count" in found.violation.what


@pytest.mark.parametrize(
    "broken",
    [
        Job(flag_first=False),
        Job(entered_first=False),
        Job(nodes=(1, 1), maximum=False),
        Job(nodes=(1, 1), flag_first=False),
    ],
)
def test_a_wrong_order_or_a_missing_maximum_lets_a_rank_pass_the_stop_step(broken: Job) -> None:
    found = explore(broken)
    assert found.violation is not None
    assert found.violation.what.startswith("a rank has passed the stop step")
    assert explore(broken, "deadlock").violation is not None


def test_the_model_finds_a_watcher_that_waits_for_ranks() -> None:
    found = explore(Job(watcher_waits=True))
    assert found.violation is not None
    assert found.violation.what == "a watcher waits for a rank"


@pytest.mark.parametrize("requests", [(SAVE, STOP), (SAVE, SAVE)])
def test_a_rewind_without_another_check_deadlocks(requests: tuple[RequestKind, ...]) -> None:
    """A loop that begins the next step after a save must leave ``entered`` where it is."""
    found = explore(Job(loop=True, steps=4, requests=requests), "deadlock")
    assert found.violation is not None


class _LateAgenda(Agenda):
    """Serves an answer one boundary after its step."""

    def decide(self, finished: int, flag: int, answers: Any) -> StepAction:
        return super().decide(finished - 1, flag, answers)


class _HastyAgenda(Agenda):
    """Goes on while the answer is missing."""

    def decide(self, finished: int, flag: int, answers: Any) -> StepAction:
        action = super().decide(finished, flag, answers)
        return StepAction(ActionKind.GO) if action.kind is ActionKind.WAIT else action


class _NewestAgenda(Agenda):
    """Forgets what came before the newest request."""

    def decide(self, finished: int, flag: int, answers: Any) -> StepAction:
        if self.seen < flag and flag in answers:
            self.seen = flag - 1
            self.open.clear()
        return super().decide(finished, flag, answers)


@pytest.mark.parametrize("broken", [_LateAgenda, _HastyAgenda, _NewestAgenda])
def test_the_model_finds_a_wrong_agenda(
    monkeypatch: pytest.MonkeyPatch, broken: type[Agenda]
) -> None:
    monkeypatch.setattr("tests.unit.protocol.agreement_model.Agenda", broken)
    assert explore(Job(requests=(SAVE, STOP))).violation is not None


def test_the_model_finds_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.protocol.agreement_model.answer_step", min)
    assert explore(Job()).violation is not None


# -- larger jobs, random schedules ----------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    nodes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    steps = draw(st.integers(1, 12))
    return Job(
        nodes=tuple(nodes),
        steps=steps,
        start=draw(st.integers(0, steps)),
        requests=tuple(draw(st.lists(st.sampled_from([SAVE, STOP]), min_size=1, max_size=4))),
        interval=draw(st.integers(0, 5)),
    )


def run_at_random(job: Job, seed: int, death: float = 0.0) -> tuple[str, list[Rank]]:
    """One run to its end, each rank and each watcher at a pace of its own.

    Args:
        death: weight of a death against other actions; those of a fast rank weigh 1.

    Returns:
        What went wrong, empty if nothing did; and the ranks at the end.
    """
    chance = random.Random(seed)
    model = Model(job)
    judge = Judge(job)
    state = model.initial()
    pace: dict[str, float] = {}
    while True:
        steps = list(model.successors(state))
        labels = [label for label, _ in steps]
        ranks, nodes = model.decode(state)
        wrong = next(judge.complaints(ranks, nodes, labels), "")
        if wrong or not steps:
            return wrong, ranks
        weights = []
        for label, after in steps:
            mover = who_moves(label, state[0], after[0])
            weight = pace.setdefault(mover, 10.0 ** chance.uniform(-3, 0))
            weights.append(death if "dies" in label or "vanishes" in label else weight)
        state = chance.choices(steps, weights)[0][1]


def who_moves(label: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    moved = [rank for rank, now in enumerate(after) if now != before[rank]]
    return f"rank {moved[0]}" if moved else label.partition(":")[0]


@settings(max_examples=200, derandomize=True, database=None)
@given(job=jobs(), seed=st.integers(0, 2**32))
def test_larger_jobs_at_random(job: Job, seed: int) -> None:
    wrong, ranks = run_at_random(job, seed)
    assert not wrong
    assert {rank.at for rank in ranks} <= {"stopped", "completed"}


@settings(max_examples=200, derandomize=True, database=None)
@given(job=jobs(), seed=st.integers(0, 2**32), nodes=st.booleans())
def test_larger_jobs_with_deaths_at_random(job: Job, seed: int, nodes: bool) -> None:
    deaths = {"node_deaths": 1} if nodes and len(job.nodes) > 1 else {"deaths": 2}
    wrong, ranks = run_at_random(replace(job, **deaths), seed, death=0.01)
    assert not wrong
    assert {rank.at for rank in ranks} <= ENDS | COUPLED


def test_random_schedules_find_wrong_protocols() -> None:
    """The two tests above could fail: the naive rule does, in most schedules."""
    naive = Job(nodes=(8,), steps=6, ranks_vote=True)
    verdicts = [run_at_random(naive, seed)[0] for seed in range(40)]
    assert sum(verdict.startswith("deadlock") for verdict in verdicts) > 10
    unfenced = Job(nodes=(4, 4), steps=6, flag_first=False)
    assert any(run_at_random(unfenced, seed)[0] for seed in range(200))


# -- the model takes the actions that the code takes ----------------------------------------------


class Timeline:
    """A board that changes by itself: the n-th access finds the n-th moment, or the last."""

    def __init__(self, moments: list[Node]) -> None:
        self._moments = moments
        self.accesses: list[str] = []

    def access(self, name: str) -> Node:
        moment = self._moments[min(len(self.accesses), len(self._moments) - 1)]
        self.accesses.append(name)
        return moment


class TimelineBoard:
    """What ``StepProtocol`` reads."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    @property
    def flag(self) -> int:
        return self._timeline.access("look").flag

    @property
    def aborted(self) -> int:
        return self._timeline.access("aborted").aborted

    def answers(self) -> dict[int, RequestAnswer]:
        found = self._timeline.access("answers").answers
        return {answer.number: answer for answer in found}


class TimelineSlot:
    """What ``StepProtocol`` writes; what is for ``status`` alone is no part of the agreement."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def step(self, entered: int, finished: int, epoch: int, samples: int) -> None:
        self._timeline.access(f"entered {entered}")

    def seen(self, number: int) -> None:
        self._timeline.access(f"acknowledge {number}")

    def first_entry(self) -> None:
        pass

    def phase(self, phase: Any) -> None:
        pass


BOUNDARIES = 3
"""How often a rank looks in one comparison."""


def accesses_of_the_code(moments: list[Node], finished: int) -> tuple[list[str], str]:
    """A rank as ``Session`` drives it: its accesses to the board, and how it ends."""
    timeline = Timeline(moments)
    board: Any = TimelineBoard(timeline)
    slot: Any = TimelineSlot(timeline)
    protocol = StepProtocol(board, slot)
    for _ in range(BOUNDARIES):
        try:
            action = protocol.enter(finished)
        except StopAborted:
            return timeline.accesses, "released"
        if action.kind is ActionKind.STOP:
            return timeline.accesses, "stopped"
        finished += action.kind is ActionKind.GO  # after a save it checks again
    return timeline.accesses, f"behind {finished}"


def accesses_of_the_model(moments: list[Node], finished: int) -> tuple[list[str], str]:
    """The same rank in the model; what it does alone is no access to the board."""
    timeline = Timeline(moments)
    model = Model(Job(nodes=(1,), steps=finished + 10))
    rank = Rank("enter", finished, finished, entered=finished)
    looks = 0
    while rank.at not in ENDS:
        if rank.at == "wait":  # the code polls also where there is no news
            rank = rank._replace(at="look again")
        looks += rank.at == "enter"
        if looks > BOUNDARIES:
            return timeline.accesses, f"behind {rank.finished}"
        names = {
            "enter": f"entered {rank.finished + 1}",
            "look": "look",
            "look again": "look",
            "answers": "answers",
            "aborted": "aborted",
            "rewind": f"entered {rank.finished}",
            "acknowledge": f"acknowledge {rank.seen}",
        }
        moment = timeline.access(names[rank.at]) if rank.at in names else Node()
        rank = model.rank_step(rank, moment, 0) or rank
    return timeline.accesses, rank.at


def timelines() -> list[list[Node]]:
    """Every time at which a request, or two, may be flagged, answered or aborted in 9 accesses."""
    found = []
    for kinds in ((STOP,), (SAVE,), (SAVE, STOP)):
        for at in product(range(9), repeat=2 * len(kinds)):
            if sorted(at) != list(at):
                continue
            for step in (4, 5, 6, 7):
                for abort in (False, True):
                    found.append(timeline_of(kinds, at, step, abort))
    return found


def timeline_of(
    kinds: tuple[RequestKind, ...], at: tuple[int, ...], step: int, abort: bool
) -> list[Node]:
    """Request ``n`` is flagged at ``at[2 n]`` and answered at the next; the last may be aborted."""
    moments = []
    for now in range(10):
        flags = sum(now >= time for time in at[::2])
        answered = sum(now >= time for time in at[1::2])
        lost = abort and answered == len(kinds)
        answers = tuple(
            RequestAnswer(number + 1, kinds[number], step) for number in range(answered - lost)
        )
        moments.append(Node(flag=flags, answers=answers, aborted=flags if lost else 0))
    return moments


def test_the_model_takes_the_actions_that_a_rank_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "_POLL_SECONDS", 0.0)
    ends = set()
    for moments in timelines():
        code = accesses_of_the_code(moments, finished=5)
        assert code == accesses_of_the_model(moments, finished=5)
        ends.add(code[1])
    assert ends == {"released", "stopped", "behind 7", "behind 8"}


class WatchedBoard(Board):
    """Notes what a watcher does."""

    accesses: list[str]

    def raise_flag(self, number: int) -> None:
        self.accesses.append(f"raise {number}")
        super().raise_flag(number)

    def entered(self) -> list[int]:
        self.accesses.append("read")
        return super().entered()

    def post_answer(self, answer: RequestAnswer) -> None:
        self.accesses.append(f"post {answer.number} {answer.kind.name} {answer.step}")
        super().post_answer(answer)


def watched_board(slots: int) -> WatchedBoard:
    board = WatchedBoard.private(slots)
    assert isinstance(board, WatchedBoard)
    board.accesses = []
    return board


@pytest.fixture
def board() -> WatchedBoard:
    """The board of two running ranks."""
    board = watched_board(2)
    for rank in range(2):
        slot = board.rank_slot(rank)
        slot.attach(0)
        slot.step(4 + rank, 3 + rank, 0, 0)
        slot.first_entry()
    return board


def test_the_agent_raises_the_flag_waits_reads_and_posts(
    board: WatchedBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher.time, "sleep", lambda seconds: board.accesses.append("fence"))
    assert watcher.Watcher(board).ask(STOP) == (RequestAnswer(1, STOP, 5), False)
    assert board.accesses == ["raise 1", "fence", "read", "post 1 STOP 5"]


def test_the_agent_drops_a_save_before_the_last_one_is_seen_but_never_a_stop(
    board: WatchedBoard,
) -> None:
    agent = watcher.Watcher(board)
    assert agent.ask(SAVE) is not None
    assert agent.ask(SAVE) is None
    board.rank_slot(0).seen(1)
    assert agent.ask(SAVE) is None
    board.rank_slot(1).seen(1)
    assert agent.ask(SAVE) is not None
    assert agent.ask(STOP) is not None
    kinds = {number: answer.kind for number, answer in board.answers().items()}
    assert kinds == {1: SAVE, 2: SAVE, 3: STOP}


def test_a_watcher_without_a_supervisor_keeps_the_same_order() -> None:
    from elastic_ckpt.training.ranks.peers import Peers
    from elastic_ckpt.training.solo import SoloWatcher

    board = watched_board(1)
    board.rank_slot(0).step(8, 7, 0, 0)
    watcher = SoloWatcher(board, Peers(0, 1, None, 1.0))
    watcher._noticed = True
    watcher._run()
    assert board.accesses == ["raise 1", "read", "post 1 STOP 8"]


# -- a rank's agenda, by hand ---------------------------------------------------------------------


def test_an_agenda_without_a_request_continues() -> None:
    agenda = Agenda()
    assert agenda.decide(finished=7, flag=0, answers={}) == StepAction(ActionKind.GO)


def test_an_agenda_waits_for_the_answer_and_then_for_its_step() -> None:
    agenda = Agenda()
    assert agenda.decide(5, 1, {}).kind is ActionKind.WAIT
    answers = {1: RequestAnswer(1, STOP, 6)}
    assert agenda.decide(5, 1, answers) == StepAction(ActionKind.GO)
    assert (agenda.seen, agenda.open) == (1, [answers[1]])
    assert agenda.decide(6, 1, answers) == StepAction(ActionKind.STOP, 1)
    assert agenda.open == []


def test_an_agenda_serves_each_request_once_and_in_order() -> None:
    agenda = Agenda()
    answers = {1: RequestAnswer(1, SAVE, 5), 2: RequestAnswer(2, SAVE, 6)}
    assert agenda.decide(5, 2, answers) == StepAction(ActionKind.SAVE, 1)
    assert agenda.decide(5, 2, answers) == StepAction(ActionKind.GO)
    assert agenda.decide(6, 2, answers) == StepAction(ActionKind.SAVE, 2)
    assert agenda.decide(6, 2, answers) == StepAction(ActionKind.GO)


def test_a_stop_includes_the_saves_that_are_due_with_it() -> None:
    answers = {1: RequestAnswer(1, STOP, 5), 2: RequestAnswer(2, SAVE, 5)}
    assert Agenda().decide(5, 2, answers) == StepAction(ActionKind.STOP, 2)


def test_a_save_that_a_user_waits_for_comes_before_one_of_the_interval() -> None:
    for first, second in ((SAVE, RequestKind.SAVE_NOW), (RequestKind.SAVE_NOW, SAVE)):
        answers = {1: RequestAnswer(1, first, 5), 2: RequestAnswer(2, second, 5)}
        assert Agenda().decide(5, 2, answers) == StepAction(ActionKind.SAVE_NOW, 2)


def test_an_agenda_keeps_answers_before_a_missing_one() -> None:
    agenda = Agenda()
    assert agenda.decide(5, 2, {1: RequestAnswer(1, SAVE, 5)}).kind is ActionKind.WAIT
    assert agenda.seen == 1
    assert agenda.decide(5, 2, {2: RequestAnswer(2, STOP, 6)}) == StepAction(ActionKind.SAVE, 1)


def test_the_answer_is_the_largest_step_or_nothing_entered() -> None:
    assert answer_step([3, 5, NOTHING_ENTERED]) == 5
    assert answer_step([]) == answer_step([NOTHING_ENTERED]) == NOTHING_ENTERED
    assert (
        Agenda().decide(4, 1, {1: RequestAnswer(1, STOP, NOTHING_ENTERED)}).kind is ActionKind.STOP
    )
