"""The disk that all hosts share, a host's memory tier, the job directory as the loop sees it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastic_ckpt.journal.events import JournalEvent
from elastic_ckpt.policy.drain_plan import DrainPlan
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from tests.simulation.kernel import Kernel, Violation

if TYPE_CHECKING:
    from tests.simulation.hosts import Run

BYTES = 10**9


class Disk:
    """Sealed checkpoints by key, and who may seal.

    Attributes:
        owner: the run with the newest number; it may have ended.
        number: the newest run number.
        loaded: the newest number whose ranks have loaded: no earlier run may seal after that.
        attempts: (run number, step) of what is being written; a take-over moves it away.
        answers_at: until then nothing that needs the disk returns.
        full_until: until then nothing can be written.
        incarnations: how many have been launched in the job; records count on from it.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sealed: dict[Key, int] = {}
        self.number = self.loaded = 0
        self.attempts: set[tuple[int, int]] = set()
        self.set_aside: set[Key] = set()
        self.owner: Run | None = None
        self.answers_at = self.full_until = 0.0
        self.incarnations = 0
        self.requested = False
        self.predictor = Predictor()

    @property
    def newest(self) -> Key:
        return max(self.sealed, default=NO_CHECKPOINT)

    @property
    def hangs(self) -> bool:
        return self.kernel.now < self.answers_at

    @property
    def is_full(self) -> bool:
        return self.kernel.now < self.full_until

    def when_it_answers(self, act: Callable[[], None], least: float = 0.0) -> None:
        """Have something happen after ``least`` seconds, and not before the disk answers."""
        self.kernel.after(max(least, self.answers_at - self.kernel.now), act)

    def is_off_the_line(self, left_by: int, run: int) -> bool:
        """Whether what an earlier run left is behind what a later one has sealed."""
        return left_by < run and self.sealed.get(self.newest, 0) > left_by

    def seal(self, key: Key, run: Run, incarnation: int) -> None:
        """Publish a checkpoint; its caller has checked the fence, some time ago."""
        if run.number < self.loaded:
            raise Violation(
                f"{run.name} seals step {key[1]}, and run number {self.loaded} has loaded"
            )
        if incarnation and self.owner is run and incarnation != self.incarnations:
            raise Violation(
                f"incarnation {incarnation} seals step {key[1]}, {self.incarnations} is launched"
            )
        self.kernel.say(f"sealed on disk: step {key[1]}, by {run.name}")
        self.sealed[key] = max(run.number, self.sealed.get(key, 0))


@dataclass
class Seal:
    step: int
    total_bytes: int = BYTES


@dataclass
class Place:
    slot: str


_numbers = itertools.count()


@dataclass(eq=False)
class Snapshot:
    """A generation in memory, as ``memory.tier.Sealed`` is to the supervisor."""

    key: Key
    seal: Seal
    generation: Place
    settled: bool = False
    attempt: str = field(default_factory=lambda: f"attempt {next(_numbers)}")
    run: int = 0

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
        self._number = 0
        for one in list(memory.generations) if memory else []:
            one.settled = one.settled or one.key in disk.sealed
        self.hurry()

    def sealed(self, key: Key) -> None:
        """A rank has sealed a generation."""
        if self.memory is None:
            return
        kept = [one for one in self.memory.generations if not one.settled]
        self.memory.generations = [
            *kept[-1:],
            Snapshot(key, Seal(key[1]), Place("generation-0"), run=self.run.number),
        ]
        self.kernel.say(f"sealed in memory of {self.run.host.name}: step {key[1]}")
        if self._held:
            self.hurry()
        self._look()
        self.run.wake(0.001)

    @property
    def over(self) -> bool:
        return self._draining is None and not self._due()

    def begin(self) -> None:
        return

    def serve(self) -> None:
        self._look()

    def hold(self) -> None:
        self._held = True

    def hurry(self) -> None:
        self._held, self._hurried = False, True
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
        newest = self.memory.newest if self.memory else None
        return newest if newest is not None and self._lacks(newest) else None

    def undrained_bytes(self) -> int | None:
        return BYTES if self.not_on_disk() is not None else None

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        return

    def close(self) -> None:
        self._number += 1

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
            lambda: self._drained(chosen, number), self.kernel.between(low, high)
        )

    def _drained(self, one: Snapshot, number: int) -> None:
        if self.run.is_gone or number != self._number:
            return
        if self._held or self.disk.hangs or self.run.host.is_paused:  # nothing more is written
            self.disk.when_it_answers(lambda: self._drained(one, number), 0.2)
            return
        self._draining = None
        if not self.run.may_seal():
            self._plan.failed(one.attempt, self.kernel.now)
            return
        if self.disk.is_full:
            self._plan.failed(one.attempt, self.kernel.now)
        else:
            if one in self._done:
                raise Violation(f"{self.run.name} drains step {one.key[1]} again")
            self._done.append(one)
            assert self.memory is not None
            if self.disk.is_off_the_line(one.run, self.run.number):
                self.memory.generations.remove(one)  # superseded
            else:
                self.disk.seal(one.key, self.run, 0)
            self._plan.done(one.attempt, [each.attempt for each in self.memory.generations])
            one.settled = self.kernel.now >= self.memory.full_until
            self.kernel.after(self.kernel.between(0.0, 1.0), self.run.directory.scan)
        self._look()
        self.run.wake(0.001)


class Directory:
    """The ``DirectoryPort`` of one run. Each scan takes a moment, and the disk may not answer."""

    def __init__(self, run: Run, disk: Disk) -> None:
        self._run = run
        self._disk = disk
        self._known = disk.newest
        self._cleaned_at = 0.0
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
        if self._disk.hangs:
            return False
        requested, self._disk.requested = self._disk.requested, False
        return requested

    def request_save(self) -> None:
        self._disk.requested = True

    def newest(self) -> Key:
        return self._known

    def scan(self) -> None:
        self._disk.when_it_answers(self._scan, 0.01)

    def scan_now(self, left: Callable[[], float]) -> Key | None:
        if not self._wait_for_disk(left()):
            return None
        self._scan()
        return self._known

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        kernel = self._run.kernel
        takes = max(self._disk.answers_at - kernel.now, kernel.between(0.0, 1.5))
        self._cleaned_at = kernel.now + takes
        self._run.wake(takes)

        def swept() -> None:
            self.sweep()
            self._scan()

        kernel.after(takes, swept)

    def sweep(self) -> None:
        """Move the attempts of earlier runs away."""
        disk, number = self._disk, self._run.number
        if disk.owner is self._run:
            disk.attempts = {one for one in disk.attempts if one[0] >= number}

    @property
    def cleaned(self) -> bool:
        return self._run.kernel.now >= self._cleaned_at

    def fall_back(self, why: str, forget: Callable[[Key], bool], session: str) -> None:
        self.fallen_back = None
        self._cancelled = False

        def act() -> None:
            if not self._cancelled and not self._run.is_gone:
                self.fallen_back = self._fall_back(why, forget)
                self._run.wake(0.001)

        self._disk.when_it_answers(act, 0.01)

    def cancel_fall_back(self) -> bool:
        self._cancelled = True
        return True

    def _fall_back(self, why: str, forget: Callable[[Key], bool]) -> str:
        disk = self._disk
        if len(disk.sealed) < 2 or not forget(disk.newest):
            return ""
        newest = disk.newest
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
        return "job"

    def known_identity(self, seconds: float) -> str | None:
        return "job" if self._wait_for_disk(seconds) else None

    def close(self, left: Callable[[], float]) -> None:
        self._wait_for_disk(left())
        self._run.has_ended = True

    def _scan(self) -> None:
        self._known = self._disk.newest

    def _wait_for_disk(self, seconds: float) -> bool:
        """Block the turn until the disk answers, or for ``seconds``."""
        clock = self._run.host.clock
        left = max(0.0, self._disk.answers_at - self._run.kernel.now - clock.blocked)
        clock.blocked += min(left, seconds)
        return left <= seconds
