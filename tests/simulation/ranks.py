"""Ranks that train in step, one on each node, and what the agreement has them do at a boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_ckpt.errors import ExitCode
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
from tests.simulation.kernel import Violation

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.agent.launch import NodeRank
    from tests.simulation.hosts import Run, SimAgent
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
        self.number = 0
        self.message = ""

    # -- what the agent does --------------------------------------------------------------------

    def begin(self, place: NodeRank) -> None:
        self.number = place.number
        self.board.begin_incarnation(place.number)
        self.agenda, self.waits, self.action = Agenda(), False, None
        self.is_dead = self.cut = self.not_begun = self.hangs = False
        self.gang = self.world.gang(place.number, place.nodes, self.agent.run)
        slot, gang = self.board.slot, self.gang
        slot.rank = place.node

        def started() -> None:
            if not self.is_dead and self.gang is gang:
                slot.pid, slot.beat = 1, self.clock.monotonic_ns()
                gang.join(self)

        self.kernel.after(self.kernel.between(0.05, 1.0), started)

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
        self.kernel.after(self.kernel.between(0.005, 0.05), lambda: self._over(gang))

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


class Gang:
    """The ranks of one incarnation on all nodes. Nobody finishes a step before all have entered it.

    Attributes:
        run: of the node that launched it: the head's, or the one there is.
        finished: optimizer steps.
        has_completed: whether all steps are done and the last checkpoint is sealed.
    """

    def __init__(self, world: World, number: int, size: int, run: Run) -> None:
        self.world = world
        self.kernel = world.kernel
        self.number = number
        self.size = size
        self.run = run
        self.members: list[SimWorkers] = []
        self.finished = self.start_step = 0
        self.is_broken = self.has_completed = self.is_loaded = self.has_stopped = False
        self.broken_at = self.completed_at = float("inf")

    def join(self, workers: SimWorkers) -> None:
        self.members.append(workers)
        if len(self.members) == self.size:
            self.world.disk.when_it_answers(self._load, self.kernel.between(0.1, 1.5))

    def _load(self) -> None:
        if self.is_broken or self.run.host.when_it_runs(self._load):
            return
        if self.world.disk.hangs:
            self.world.disk.when_it_answers(self._load, 0.1)
            return
        self.start_step = self.finished = self.world.check_load(self)
        for one in self.members:
            slot = one.board.slot
            slot.start_step = slot.finished = self.start_step
            slot.saved_step = self.start_step if self.start_step else -1
            slot.total_steps = self.world.total_steps
            slot.phase, slot.beat = Phase.TRAINING, one.clock.monotonic_ns()
        self.is_loaded = True
        self.kernel.say(f"incarnation {self.number} trains from step {self.start_step}")
        self._boundary()

    def _boundary(self) -> None:
        if self.finished >= self.world.total_steps:
            self._save(ActionKind.GO)
            return
        interval = self.world.interval_steps
        due = interval and self.finished % interval == 0 and self.finished > self.start_step
        if due and all(one.board.slot.saved_step < self.finished for one in self.members):
            self._save(ActionKind.SAVE)
            return
        for one in self.members:
            self.try_to_enter(one)

    def try_to_enter(self, one: SimWorkers) -> None:
        """A rank stands at the boundary: have it begin the next step, wait, or act."""
        if self.is_broken or one.is_dead or one.waits or one.action is not None:
            return
        slot = one.board.slot
        if not self.is_loaded or slot.entered > self.finished or slot.phase is Phase.SAVING:
            return
        if self.kernel.now < one.evaluates_until:
            self.kernel.after(one.evaluates_until - self.kernel.now, lambda: self.try_to_enter(one))
            return
        action = one.agenda.decide(self.finished, one.board.flag, one.board.ring)
        slot.seen = one.agenda.seen
        one.agent.changed()
        if action.kind is ActionKind.WAIT:
            one.waits = True
        elif action.kind is ActionKind.GO:
            self._enter(one)
        else:
            if action.kind is ActionKind.STOP and self.has_stopped:
                self._stop(one)  # the others have saved with it, and left
                return
            one.action = action.kind
            if any(other.board.slot.entered > self.finished for other in self.members):
                raise Violation(f"a rank stops at step {self.finished}, another has begun the next")
            if all(other.action is not None for other in self.members):
                self._act()

    def _enter(self, one: SimWorkers) -> None:
        slot = one.board.slot
        if self.has_stopped or any(other.action is not None for other in self.members):
            raise Violation(f"a rank begins step {self.finished + 1}, another stops before it")
        slot.entered = self.finished + 1
        slot.beat = one.clock.monotonic_ns()
        if not slot.first_entry:
            slot.first_entry = slot.beat
            one.agent.run.wake(self.kernel.between(0.0, 0.25))
        if all(other.board.slot.entered > self.finished for other in self.members):
            if any(other.hangs for other in self.members):
                return
            step = self.finished + 1
            self.kernel.after(
                self.world.step_seconds * self.kernel.between(0.8, 1.3), lambda: self._finish(step)
            )

    def _finish(self, step: int) -> None:
        if self.is_broken or self.finished >= step:
            return
        if self.run.host.when_it_runs(lambda: self._finish(step)):
            return
        if any(one.hangs for one in self.members):
            return
        if step == self.world.deadly_step and self.world.deaths_left > 0:
            self.world.deaths_left -= 1
            self.world.count_failure()
            self.members[-1].fail(1)
            return
        self.finished = step
        for one in self.members:
            slot = one.board.slot
            slot.finished, slot.beat = step, one.clock.monotonic_ns()
            if not slot.marks.stepped:
                slot.marks = Marks(stepped=slot.beat)
        self._boundary()

    # -- saves ----------------------------------------------------------------------------------

    def _act(self) -> None:
        """All ranks act at this boundary; one may have learned of the stop, another yet has to."""
        kinds = [one.action for one in self.members if one.action is not None]
        order = (ActionKind.STOP, ActionKind.SAVE_NOW, ActionKind.SAVE)
        self._save(min(kinds, key=order.index))

    def _save(self, kind: ActionKind) -> None:
        for one in self.members:
            one.board.slot.phase = Phase.SAVING
            one.board.slot.beat = one.clock.monotonic_ns()
        tier = self.members[0].agent.run.tier
        urgent = kind in (ActionKind.STOP, ActionKind.SAVE_NOW)
        key = (0, self.finished)
        memory = tier.memory
        if 0 < self.finished <= self.members[0].board.slot.saved_step or not self.finished:
            self.kernel.after(0.01, lambda: self._saved(kind))  # there is that checkpoint, or none
        elif memory is not None and not urgent and memory.has_room:
            self.kernel.after(self.kernel.between(0.01, 0.3), lambda: self._seal_memory(key, kind))
        else:
            low, high = self.world.save_seconds
            self.world.disk.when_it_answers(
                lambda: self._seal_disk(key, kind), self.kernel.between(low, high)
            )

    def _seal_memory(self, key: tuple[int, int], kind: ActionKind) -> None:
        if not self.is_broken and not self.run.host.when_it_runs(
            lambda: self._seal_memory(key, kind)
        ):
            self.members[0].agent.run.tier.sealed(key)
            self._saved(kind)

    def _seal_disk(self, key: tuple[int, int], kind: ActionKind) -> None:
        if self.is_broken or self.run.host.when_it_runs(lambda: self._seal_disk(key, kind)):
            return
        disk = self.world.disk
        if disk.hangs:
            disk.when_it_answers(lambda: self._seal_disk(key, kind), 0.1)
            return
        memory = self.members[0].agent.run.tier.memory
        if not self.run.may_seal():
            self._superseded()
        elif not disk.is_full:
            disk.attempts.add((self.run.number, self.finished))
            self.kernel.after(self.kernel.between(0.0, 0.5), lambda: self._rename(key, kind))
        elif memory is not None and memory.has_room:  # what the disk refuses goes into memory
            self._seal_memory(key, kind)
        elif kind in (ActionKind.STOP, ActionKind.GO):
            self.world.count_failure()
            for one in self.members:
                one.fail(74, "StorageFailed")
        else:
            self._saved(kind, sealed=False)  # a Session trains on

    def _rename(self, key: tuple[int, int], kind: ActionKind) -> None:
        """The checked attempt becomes a checkpoint, unless a run that took over has moved it."""
        if self.is_broken or self.run.host.when_it_runs(lambda: self._rename(key, kind)):
            return
        disk, attempt = self.world.disk, (self.run.number, self.finished)
        if attempt not in disk.attempts:
            self._superseded()
            return
        disk.attempts.discard(attempt)
        disk.seal(key, self.run, self.number)
        self._saved(kind)

    def _superseded(self) -> None:
        for one in list(self.members):
            one.fail(int(ExitCode.UNAVAILABLE), "RunSuperseded")

    def _saved(self, kind: ActionKind, *, sealed: bool = True) -> None:
        if self.is_broken:
            return
        if kind is ActionKind.GO:
            self.has_completed, self.completed_at = True, self.kernel.now
        for one in self.members:
            slot = one.board.slot
            slot.phase, slot.beat = Phase.TRAINING, one.clock.monotonic_ns()
            if sealed:
                slot.saved_step = self.finished
        for one in list(self.members):
            action, one.action = one.action, None
            if kind is ActionKind.GO:
                one.leave(Outcome.COMPLETED)
            elif action is ActionKind.STOP:
                self._stop(one)
        for one in list(self.members):
            self.try_to_enter(one)

    def _stop(self, one: SimWorkers) -> None:
        self.has_stopped = True
        one.leave(Outcome.STOPPED if self.finished else Outcome.STOPPED_UNSAVED)
