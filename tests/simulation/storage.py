"""A host's memory tier, and the job directory as a supervisor's loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastic_ckpt.journal.events import JournalEvent
from elastic_ckpt.policy.drain_plan import DrainPlan
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.protocol.succession import Leader
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from tests.simulation.disk import Attempt, Checkpoint, Disk
from tests.simulation.kernel import Violation

if TYPE_CHECKING:
    from tests.simulation.hosts import Run
    from tests.simulation.shared_memory import SharedMemory

BYTES = 10**9


@dataclass
class Seal:
    step: int
    total_bytes: int = BYTES


@dataclass
class Place:
    slot: str


@dataclass(eq=False)
class Snapshot:
    """A generation in memory, as ``memory.tier.Sealed`` is to the supervisor."""

    checkpoint: Checkpoint
    seal: Seal
    generation: Place
    settled: bool = False

    @property
    def key(self) -> Key:
        return self.checkpoint.key

    @property
    def attempt(self) -> str:
        return self.checkpoint.attempt

    @property
    def age(self) -> Key:
        """Sessions have no names here, so a step is enough."""
        return self.key


@dataclass
class HostMemory:
    """What a host's shared memory holds, whatever run or process is there.

    Attributes:
        full_until: until then it has no room to note what was drained.
    """

    generations: list[Snapshot] = field(default_factory=list)
    full_until: float = 0.0

    @property
    def newest(self) -> Snapshot | None:
        return max(self.generations, key=lambda one: one.key, default=None)

    @property
    def has_room(self) -> bool:
        return sum(not one.settled for one in self.generations) < 2


class Tier:
    """The ``MemoryPort`` of one run: drains what is sealed, one generation at a time."""

    bell = None
    attempt = ""

    def __init__(self, run: Run, memory: HostMemory | None, disk: Disk) -> None:
        self.run = run
        self.memory = memory
        self.disk = disk
        self.kernel = run.kernel
        self.root = "" if memory is None else "/dev/shm/x"
        self._draining: Snapshot | None = None
        self._held = self._hurried = False
        self._plan = DrainPlan()
        self._done: list[Snapshot] = []
        self.handed_over: tuple[Key, str] | None = None  # at the end
        self._number = 0
        for one in list(memory.generations) if memory else []:
            one.settled = one.settled or one.key in disk.sealed
        self.hurry()

    def sealed(self, one: Checkpoint) -> None:
        """A rank has sealed a generation."""
        if self.memory is None:
            return
        self.disk.known[one.attempt] = one
        kept = [one for one in self.memory.generations if not one.settled]
        self.memory.generations = [
            *kept[-1:],
            Snapshot(one, Seal(one.key[1]), Place("generation-0")),
        ]
        self.kernel.say(f"sealed in memory of {self.run.host.name}: step {one.key[1]}")
        if self._held:
            self.hurry()
        self._look()
        self.run.wake(0.001)

    @property
    def over(self) -> bool:
        if self._shared is not None and self.run.leads:
            return self._shared.has_drained(self.run)
        return self._draining is None and not self._due()

    @property
    def _shared(self) -> SharedMemory | None:
        return self.run.world.shared_memory

    def begin(self) -> None:
        before, self.run.host.passed_on = self.run.host.passed_on, None
        if self._shared is not None and before is not None:
            self._shared.take_over(self.run, before)

    def serve(self) -> None:
        self._look()

    def hold(self) -> None:
        self._held = True

    def hurry(self) -> None:
        self._held, self._hurried = False, True
        if self._shared is not None and self.run.leads:
            self._shared.hurry(self.run)
        self._plan.retry_all()
        self._look()

    def hurry_once(self) -> None:
        self.hurry()

    def calm(self) -> None:
        self._hurried = False

    def newest_key(self) -> Key:
        newest = self.memory.newest if self.memory else None
        return newest.key if newest else NO_CHECKPOINT

    def forget(self, key: Key | None) -> bool:
        if self.memory is None:
            return True
        if self.not_on_disk() is not None:
            return False
        self.memory.generations = [one for one in self.memory.generations if one.key != key]
        return True

    def not_on_disk(self) -> Any:
        if self._shared is not None and self.run.leads:
            own = self._shared.newest_share(self.run)
            return None if own is None or own.settled or not own.seal.is_last else own
        newest = self.memory.newest if self.memory else None
        return newest if newest is not None and self._lacks(newest) else None

    def owed(self) -> Any:
        newest = self._newest_share() if not self.run.leads else None
        is_safe = newest is None or newest.settled or newest.keeper
        return None if is_safe else newest

    def kept_by_peer(self) -> tuple[Key, str] | None:
        newest = self._newest_share()
        return (newest.age, newest.keeper) if newest is not None and newest.keeper else None

    def _newest_share(self) -> Any:
        return self._shared.newest_share(self.run) if self._shared else None

    def undrained_bytes(self) -> int | None:
        return BYTES if self.not_on_disk() is not None else None

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        return

    def close(self, *, keep: bool = False, finished: bool = False) -> None:
        self._number += 1
        self.handed_over = self.kept_by_peer()
        if self._shared is not None and not keep:
            self._shared.leave(self.run.host)

    def _due(self) -> list[Snapshot]:
        if self.memory is None:
            return []
        now = self.kernel.now
        found = [one for one in self.memory.generations if self._lacks(one)]
        due = [one for one in found if self._plan.is_due(one.attempt, now)]
        return sorted(due, key=lambda one: one.key)

    def _lacks(self, one: Snapshot) -> bool:
        return not one.settled and self._plan.is_pending(one.attempt)

    def _look(self) -> None:
        due = self._due()
        if self._draining is not None or not due or self._held or self.run.is_gone:
            return
        chosen = due[-1] if self._hurried else due[0]
        self._draining = chosen
        self._plan.begin(chosen.attempt)
        self._number += 1
        number = self._number
        low, high = (0.2, 2.0) if self._hurried else (0.5, 6.0)
        self.disk.when_it_answers(
            self.run.host, lambda: self._written(chosen, number), self.kernel.between(low, high)
        )

    def _written(self, one: Snapshot, number: int) -> None:
        """Its bytes are on the disk; what is left is the rename."""
        if self._puts_off(lambda: self._written(one, number), number):
            return
        if self.disk.is_full or not self.run.may_seal():
            self._draining = None
            self._plan.failed(one.attempt, self.kernel.now)
            self._look()
            self.run.wake(0.001)
            return
        attempt = Attempt(one.checkpoint, self.run.number, set())
        self.disk.attempts.append(attempt)
        self.attempt = one.attempt
        self.kernel.after(
            self.kernel.between(0.0, 0.2), lambda: self._drained(one, number, attempt)
        )

    def _drained(self, one: Snapshot, number: int, attempt: Attempt) -> None:
        if self._puts_off(lambda: self._drained(one, number, attempt), number):
            return
        self._draining, self.attempt = None, ""
        assert self.memory is not None
        if attempt not in self.disk.attempts or attempt.owner != self.run.number:
            self._plan.failed(one.attempt, self.kernel.now)
        else:
            self.disk.attempts.remove(attempt)
            if one in self._done:
                raise Violation(f"{self.run.name} drains step {one.key[1]} again")
            self._done.append(one)
            if not self.disk.seal_left(one.checkpoint, self.run):
                self.memory.generations.remove(one)
            self._plan.done(one.attempt, [each.attempt for each in self.memory.generations])
            one.settled = self.kernel.now >= self.memory.full_until
            self.kernel.after(self.kernel.between(0.0, 1.0), self.run.directory.scan)
        self._look()
        self.run.wake(0.001)

    def _puts_off(self, act: Callable[[], None], number: int) -> bool:
        """Return whether it does not happen now, as nothing is written, or never."""
        if self.run.is_gone or number != self._number:
            return True
        waits = self._held or self.disk.hangs(self.run.host) or self.run.host.is_paused
        if waits:
            self.disk.when_it_answers(self.run.host, act, 0.2)
        return waits


class Directory:
    """The ``DirectoryPort`` of one run. Each scan takes a moment, and the disk may not answer."""

    def __init__(self, run: Run, disk: Disk) -> None:
        self._run = run
        self._disk = disk
        self._known = disk.newest
        self._is_clean = True
        self._cancelled = False
        self.fallen_back: str | None = None

    @property
    def lost(self) -> str:
        return self._run.lost

    def write_record(self, record: object) -> None:
        return

    def record_incarnation(self, number: int) -> None:
        return

    def take_save_request(self) -> bool:
        if self._disk.hangs(self._run.host):
            return False
        requested, self._disk.requested = self._disk.requested, False
        return requested

    def request_save(self) -> None:
        self._disk.requested = True

    @property
    def left_behind(self) -> Key | None:
        return None

    def newest(self) -> Key:
        return self._known

    def scan(self) -> None:
        self._disk.when_it_answers(self._run.host, self._scan, 0.01)

    def scan_now(self, left: Callable[[], float]) -> Key | None:
        if not self._wait_for_disk(left()):
            return None
        self._run.still_owns()
        self._scan()
        return self._known

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        kernel = self._run.kernel
        takes = max(self._disk.answers(self._run.host) - kernel.now, kernel.between(0.0, 1.5))
        self._is_clean = False

        def swept() -> None:
            self.sweep()
            self.settle(spare)
            self._scan()
            self._is_clean = True
            self._run.wake(0.001)

        self._run.host.after(takes, swept)

    def sweep(self) -> None:
        """Move the attempts of earlier runs to this one's number."""
        if not self._run.is_gone and self._run.still_owns():
            for one in self._disk.attempts:
                one.owner = self._run.number

    def settle(self, spare: str) -> None:
        """Seal what is complete, and remove the rest."""
        disk, run = self._disk, self._run
        for one in [one for one in disk.attempts if one.owner == run.number]:
            if run.is_gone or one.checkpoint.attempt == spare or not run.may_seal():
                continue
            disk.attempts.remove(one)
            if not one.missing:
                disk.seal_left(one.checkpoint, run)

    @property
    def cleaned(self) -> bool:
        return self._is_clean

    def fall_back(self, why: str, forget: Callable[[Key], bool], session: str) -> None:
        self.fallen_back = None
        self._cancelled = False

        def act() -> None:
            if self._run.host.when_it_runs(act) or self._cancelled or self._run.is_gone:
                return
            if self._disk.hangs(self._run.host):
                self._disk.when_it_answers(self._run.host, act, 0.01)
            else:
                self.fallen_back = self._fall_back(why, forget)
                self._run.wake(0.001)

        self._disk.when_it_answers(self._run.host, act, 0.01)

    def cancel_fall_back(self) -> bool:
        self._cancelled = True
        return True

    def _fall_back(self, why: str, forget: Callable[[Key], bool]) -> str:
        disk = self._disk
        if not self._run.still_owns() or len(disk.sealed) < 2 or not forget(disk.newest):
            return ""
        newest = disk.newest
        if disk.sealed[newest].run > self._run.number:
            raise Violation(f"{self._run.name} sets aside what a later run has sealed")
        del disk.sealed[newest]
        disk.set_aside.add(newest)
        self._known = disk.newest
        return f"{why}: setting step {newest[1]} aside"

    def events(self) -> list[JournalEvent]:
        return []

    def catch_up(self, left: Callable[[], float]) -> None:
        self._wait_for_disk(left())

    def history(self) -> Iterable[JournalEvent]:
        return ()

    def read_predictor(self) -> Predictor:
        return self._disk.predictor

    def write_predictor(self, predictor: Predictor) -> None:
        return

    def identity(self) -> str:
        return f"job.{self._run.number}"

    def known_identities(self, seconds: float) -> tuple[str, ...] | None:
        if not self._wait_for_disk(seconds):
            return None
        return tuple(f"job.{number}" for number in range(self._disk.number, 0, -1))

    def leader(self) -> Leader | None:
        return self._run.world.leader(self._run.host)

    def pass_on(self) -> None:
        self._run.has_ended = self._run.passed_on = True

    def close(self, left: Callable[[], float]) -> None:
        self._wait_for_disk(left())
        self._run.has_ended = True

    def _scan(self) -> None:
        self._known = self._disk.newest

    def _wait_for_disk(self, seconds: float) -> bool:
        """Block the turn until the disk answers, or for ``seconds``."""
        clock = self._run.host.clock
        left = max(0.0, self._disk.answers(self._run.host) - self._run.kernel.now - clock.blocked)
        clock.blocked += min(left, seconds)
        return left <= seconds
