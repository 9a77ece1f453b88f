"""Ranks that train in step, one on each node, and what the agreement has them do at a boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.protocol.slot import Outcome, Phase
from elastic_ckpt.protocol.start_marks import Marks
from tests.simulation.disk import Attempt, Checkpoint
from tests.simulation.kernel import Violation

if TYPE_CHECKING:
    from tests.simulation.ranks import SimWorkers
    from tests.simulation.run import Run
    from tests.simulation.world import World
STORAGE_FAILED = 74


class Gang:
    """The ranks of one incarnation on all nodes. Nobody finishes a step before all have entered it.

    Attributes:
        run: of the node that launched it: the head's, or the one there is.
        parent: the attempt that its ranks loaded, or saved last.
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
        self.parent = ""
        self.finished = self.start_step = 0
        self.is_broken = self.has_completed = self.is_loaded = self.has_stopped = False
        self.broken_at = self.completed_at = float("inf")

    @property
    def leader(self) -> SimWorkers:
        """Rank 0, which alone seals."""
        return next(one for one in self.members if one.rank == 0)

    def join(self, workers: SimWorkers) -> None:
        self.members.append(workers)
        if len(self.members) == self.size:
            if self.leader.agent.run is not self.run:
                raise Violation("the rank that seals is not on the node that owns the job")
            self.kernel.after(self.kernel.between(0.1, 1.5), self._load)

    def is_held(self, act: Callable[[], None], *, storage: bool = False) -> bool:
        """Return whether what needs all ranks is put off: one does not run, or reach rank 0."""
        if self.is_broken:
            return True
        until, disk = 0.0, self.world.disk
        for one in self.members:
            host = one.agent.run.host
            if host.is_paused or not self.world.network.reaches(host, self.run.host):
                until = max(until, host.paused_until, self.kernel.now + 0.3)
            if storage and disk.hangs(host):
                until = max(until, disk.answers(host))
        if until:
            self.kernel.after(until - self.kernel.now + 0.001, act)
        return until > 0.0

    def _load(self) -> None:
        if self.is_held(self._load, storage=True):
            return
        found = self.world.load(self)
        self.start_step = self.finished = found.key[1] if found else 0
        self.parent = found.attempt if found else ""
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
        if self.finished >= step or self.is_held(lambda: self._finish(step)):
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
        urgent = kind in (ActionKind.STOP, ActionKind.SAVE_NOW)
        memory, shared = self.run.tier.memory, self.world.shared_memory
        leaves_shares = kind is ActionKind.STOP and shared is not None and shared.has(self.parent)
        is_saved = 0 < self.finished <= self.members[0].board.slot.saved_step
        if is_saved and leaves_shares:
            self.parent = self.world.disk.known[self.parent].parent
            is_saved = False
        if is_saved or not self.finished:
            self.kernel.after(0.01, lambda: self._saved(kind))  # there is that checkpoint, or none
        elif memory is not None and not urgent and memory.has_room:
            self.kernel.after(self.kernel.between(0.01, 0.3), lambda: self._seal_memory(kind))
        elif shared is not None and kind is ActionKind.SAVE and shared.has_room(self):
            shared.save(self, self.new_checkpoint(), lambda one: self._saved(kind, one.attempt))
        elif shared is not None and kind is ActionKind.STOP and shared.may_hand_over(self):
            shared.save(
                self, self.new_checkpoint(), lambda one: self._saved(kind, one.attempt),
                otherwise=lambda: self._begin_attempt(kind),
            )  # fmt: skip
        else:
            self._begin_attempt(kind)

    def new_checkpoint(self) -> Checkpoint:
        attempt = self.world.disk.new_attempt()
        return Checkpoint((0, self.finished), attempt, self.run.number, self.number, self.parent)

    def _seal_memory(self, kind: ActionKind) -> None:
        if not self.is_held(lambda: self._seal_memory(kind)):
            one = self.new_checkpoint()
            self.run.tier.sealed(one)
            self._saved(kind, one.attempt)

    def _begin_attempt(self, kind: ActionKind) -> None:
        """Rank 0 makes the directory; each rank writes its part, at its own pace."""
        if self.is_held(lambda: self._begin_attempt(kind)):
            return
        disk, host = self.world.disk, self.run.host
        if disk.hangs(host):
            disk.when_it_answers(host, lambda: self._begin_attempt(kind), 0.1)
            return
        if not self.run.may_seal():
            self._superseded()
            return
        ranks = {one.rank for one in self.members}
        attempt = Attempt(self.new_checkpoint(), self.run.number, ranks)
        disk.attempts.append(attempt)
        low, high = self.world.save_seconds
        for one in self.members:
            later = self.kernel.between(low, high)
            self.kernel.after(later, lambda one=one: self._write_part(one, attempt, kind))

    def _write_part(self, one: SimWorkers, attempt: Attempt, kind: ActionKind) -> None:
        """A rank writes its part, late perhaps: the directory may have gone."""
        disk, host = self.world.disk, one.agent.run.host

        def again() -> None:
            self._write_part(one, attempt, kind)

        if one.is_dead or one.gang is not self or host.when_it_runs(again):
            return
        if disk.hangs(host):
            disk.when_it_answers(host, again, 0.1)
        elif attempt not in disk.attempts or attempt.owner != self.run.number:
            if self.run is disk.owner and not self.is_broken:
                raise Violation(f"the attempt of {self.run.name} has gone while it was written")
            one.fail(STORAGE_FAILED, "StorageFailed")
        else:
            attempt.missing.discard(one.rank)
            if not attempt.missing:
                self._publish(attempt, kind)

    def _publish(self, attempt: Attempt, kind: ActionKind) -> None:
        """All ranks have told rank 0 of their parts."""
        if self.is_held(lambda: self._publish(attempt, kind)):
            return
        disk, host, memory = self.world.disk, self.run.host, self.run.tier.memory
        if disk.hangs(host):
            disk.when_it_answers(host, lambda: self._publish(attempt, kind), 0.1)
            return
        if not self.run.may_seal():
            self._superseded()
        elif not disk.is_full:
            later, leader = self.kernel.between(0.0, 0.5), self.leader
            self.kernel.after(later, lambda: self._rename(leader, attempt, kind))
            return
        elif memory is not None and memory.has_room:  # what the disk refuses goes into memory
            self._seal_memory(kind)
        elif kind in (ActionKind.STOP, ActionKind.GO):
            self.world.count_failure()
            for one in self.members:
                one.fail(STORAGE_FAILED, "StorageFailed")
        else:
            self._saved(kind, sealed=False)  # a Session trains on
        if attempt in disk.attempts and attempt.owner == self.run.number:
            disk.attempts.remove(attempt)

    def _rename(self, leader: SimWorkers, attempt: Attempt, kind: ActionKind) -> None:
        """The checked attempt becomes a checkpoint, unless a run that took over has moved it.

        Rank 0 needs no other rank for that: they may have gone.
        """
        disk, host = self.world.disk, self.run.host

        def again() -> None:
            self._rename(leader, attempt, kind)

        if leader.is_dead or leader.gang is not self or host.when_it_runs(again):
            return
        if disk.hangs(host):
            disk.when_it_answers(host, again, 0.1)
        elif attempt not in disk.attempts or attempt.owner != self.run.number:
            self._superseded()
        else:
            disk.attempts.remove(attempt)
            disk.seal(attempt.checkpoint, self.run, self.number)
            self._saved(kind, attempt.checkpoint.attempt)

    def _superseded(self) -> None:
        for one in list(self.members):
            one.fail(int(ExitCode.UNAVAILABLE), "RunSuperseded")

    def _saved(self, kind: ActionKind, attempt: str = "", *, sealed: bool = True) -> None:
        """Let the ranks go on: with a checkpoint of this attempt, or because there is one."""
        if self.is_held(lambda: self._saved(kind, attempt, sealed=sealed)):
            return
        self.parent = attempt or self.parent
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
