"""A node's rank and its slot, as the agent and the supervisor see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_ckpt.protocol.agreement import (
    NOTHING_ENTERED,
    ActionKind,
    Agenda,
    RequestAnswer,
    answer_step,
)
from elastic_ckpt.protocol.cluster import NodeAnswer
from elastic_ckpt.protocol.ended import Ended, EndKind, end_kind
from elastic_ckpt.protocol.slot import Outcome, Phase, SessionStage, Source
from elastic_ckpt.protocol.start_marks import Marks

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.agent.launch import NodeRank
    from tests.simulation.agents import SimAgent
    from tests.simulation.gang import Gang
    from tests.simulation.world import World


NO_MARKS = Marks()


@dataclass
class SimSlot:
    """A rank's slot, as ``protocol.slot.Slot`` is to the supervisor."""

    local_rank: int = 0
    rank: int = -1
    pid: int = 0
    entered: int = NOTHING_ENTERED
    finished: int = 0
    epoch: int = 0
    sample_start_index: int = 0
    beat: int = 0
    phase: Phase = Phase.LAUNCHED
    seen: int = 0
    outcome: Outcome = Outcome.NONE
    exit_code: int = 0
    start_step: int = NOTHING_ENTERED
    saved_step: int = -1
    first_entry: int = 0
    left: int = 0
    marks: Marks = NO_MARKS
    source: Source = Source.NOTHING
    declares: bool = True
    session_stage: SessionStage = SessionStage.NONE
    samples_per_step: int = 1
    session: str = ""
    wants_saves: bool = False
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def attached(self) -> bool:
        return self.start_step != NOTHING_ENTERED

    @property
    def shown_step(self) -> int:
        return self.finished


class SimBoard:
    """The ``BoardPort`` of a run, with one slot."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.deadline: float | None = None
        self.hand_over_seconds = 0.0
        self.slot = SimSlot()
        self.flag = 0
        self.ring: dict[int, RequestAnswer] = {}

    def begin_incarnation(self, number: int) -> None:
        self.slot, self.flag, self.ring = SimSlot(), 0, {}
        self.incarnation = number

    def read_slot(self, local_rank: int) -> SimSlot:
        return self.slot

    def read_slots(self) -> list[SimSlot]:
        return [self.slot]

    def answers(self) -> dict[int, RequestAnswer]:
        return self.ring


class SimWorkers:
    """One node's rank, and the agent's view of it (``LocalWorkers``)."""

    def __init__(self, agent: SimAgent, world: World) -> None:
        self.agent = agent
        self.world = world
        self.kernel = world.kernel
        self.clock = agent.run.host.clock
        self.board = agent.run.board
        self.gang: Gang | None = None
        self.agenda = Agenda()
        self.is_dead = True
        self.waits = False
        self.action: ActionKind | None = None
        self.cut = False
        self.not_begun = False
        self.hangs = False
        self.evaluates_until = 0.0
        self.number, self.rank = 0, -1
        self.message = ""

    # -- what the agent does --------------------------------------------------------------------

    def begin(self, place: NodeRank) -> None:
        self.number = place.number
        self.board.begin_incarnation(place.number)
        self.agenda, self.waits, self.action = Agenda(), False, None
        self.is_dead = self.cut = self.not_begun = self.hangs = False
        self.gang = self.world.gang(place.number, place.nodes, self.agent)
        slot, gang = self.board.slot, self.gang
        slot.rank = self.rank = place.node

        def started() -> None:
            if not self.is_dead and self.gang is gang:
                slot.pid, slot.beat = 1, self.clock.monotonic_ns()
                gang.join(self)

        self.agent.run.host.after(self.kernel.between(0.05, 1.0), started)

    def flag(self, number: int) -> NodeAnswer:
        self.board.flag = number
        slot = self.board.slot
        return NodeAnswer(answer_step([slot.entered]), bool(slot.first_entry))

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        self.board.ring[answer.number] = answer
        if idle:
            self.not_begun = True
            self.kill()
        elif self.gang is not None:
            self.waits = False
            self.gang.try_to_enter(self)

    def cut_short(self) -> None:
        if self.gang is not None and not self.is_dead:
            self.cut = True
            self.kill()

    @property
    def is_warm(self) -> bool:
        return True

    @property
    def busy(self) -> bool:
        return self.gang is not None

    @property
    def answered(self) -> int:
        return max(self.board.ring, default=0)

    @property
    def flagged(self) -> int:
        return self.board.flag

    @property
    def seen(self) -> int:
        return self.agenda.seen

    def kill(self) -> None:
        """SIGKILL the rank; nothing if it is gone."""
        if not self.is_dead:
            self.leave(self.board.slot.outcome)

    def fail(self, exit_code: int, message: str = "it failed") -> None:
        """The rank fails by itself: with a code after an exception, or by a signal."""
        if self.is_dead or self.board.slot.outcome is not Outcome.NONE:
            return
        slot = self.board.slot
        slot.exit_code, self.message = exit_code, message
        self.leave(Outcome.FAILED if exit_code > 0 else Outcome.NONE)

    def leave(self, outcome: Outcome) -> None:
        """The process is gone; the agent notices."""
        self.is_dead = True
        slot, gang = self.board.slot, self.gang
        slot.outcome, slot.left = outcome, self.clock.monotonic_ns()
        if gang is not None and outcome in (Outcome.NONE, Outcome.FAILED) and not gang.is_broken:
            gang.is_broken, gang.broken_at = True, self.kernel.now
        self.agent.run.host.after(self.kernel.between(0.005, 0.05), lambda: self._over(gang))

    def _over(self, gang: Gang | None) -> None:
        if self.gang is not gang or self.agent.is_dead:
            return
        self.gang = None
        slot = self.board.slot
        kind = end_kind({slot.outcome}, cut_short=self.cut, not_begun=self.not_begun)
        crashed = kind is EndKind.CRASHED
        exit_code = (slot.exit_code or -9) if crashed else 0
        now = self.clock.monotonic_ns()
        ended = Ended(
            incarnation=self.number,
            kind=kind,
            rank=slot.rank if crashed else -1,
            exit_code=exit_code,
            message=self.message if crashed else "",
            stepped=bool(slot.first_entry),
            steps=max(0, slot.finished - slot.start_step) if slot.first_entry else 0,
            finished=slot.finished,
            attached=slot.attached,
            failed_at=slot.left,
            noticed_at=now,
            gone_at=now,
            failed_wall=self.clock.wall(),
        )
        self.agent.ended(ended)
