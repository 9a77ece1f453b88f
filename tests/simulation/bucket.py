"""Owners of a bucket on a store that fails in every way that one may: from a seed, replayable.

The real claims, uploads and listings run, each owner in a thread of its own, one at a time: at each
request the seed decides who goes on, whether the request is carried out, and what is said of it. So
a schedule is a sequence of requests in one order, and time is what the schedule says.

    python -m tests.simulation.bucket 1 10000
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import threading
import time as real_time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from unittest import mock

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket import take as taking
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim, Owner, claim_of
from elastic_ckpt.checkpoint.bucket.retain import prune, set_aside
from elastic_ckpt.checkpoint.bucket.store import StoredObject
from elastic_ckpt.checkpoint.bucket.take import take
from elastic_ckpt.checkpoint.bucket.transfer import push, seal_uploaded, send
from elastic_ckpt.checkpoint.manifest import (
    EngineInfo,
    FileEntry,
    Manifest,
    SealHeader,
    make_manifest,
)
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.errors import BucketFailed, LockHeld, RunSuperseded
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import ignore

T = TypeVar("T")

OWNERS = 4
SAVES = 5
DATA = b"state"
FILE = FileEntry("modeling/x", len(DATA), "ccb356a16ce4d54a899465fe1ae32812", 0)
LIMIT_SECONDS = 60.0
"""Of real time, for one schedule: what takes longer hangs."""


class Killed(BaseException):
    """The machine of an owner is gone."""


class Violation(AssertionError):
    """A schedule broke a promise."""


@dataclass
class Faults:
    """What this schedule's store does, each as a probability per request.

    Late requests are carried out after the next ones; old listings show what was there a while ago.
    No real store does both at once, and no protocol without a clock could bear it.
    """

    refused: float
    lost: float
    late: float
    old: float
    killed: float
    cut: float

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        def some(most: float) -> float:
            return rng.choice((0.0, rng.random() * most))

        late = some(0.1)
        return cls(some(0.2), some(0.2), late, 0.0 if late else some(0.5), some(0.02), some(0.02))


@dataclass
class Actor:
    """One owner, or the drain of one: its thread, and what became of it. Both are on one machine,
    which is gone with the one or the other."""

    name: str
    machine: Actor | None = None
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    wakes: float = 0.0
    cut_until: float = 0.0
    over: bool = False
    killed: bool = False
    error: BaseException | None = None

    @property
    def is_gone(self) -> bool:
        return self.killed or (self.machine is not None and self.machine.killed)

    def kill(self) -> None:
        self.killed = True
        if self.machine is not None:
            self.machine.killed = True


class Schedule:
    """One store, its owners, and what they were told."""

    def __init__(self, seed: int, log: list[str] | None = None) -> None:
        self.rng = random.Random(seed)
        self.faults = Faults.draw(self.rng)
        self.log = log
        self.now = 0.0
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.before: list[dict[str, tuple[bytes, float]]] = [{}]
        self.late: list[tuple[float, Callable[[], object]]] = []
        self.made: dict[str, tuple[int, str]] = {}  # attempt: claim and parent
        self.reported: list[str] = []
        self.actors = [Actor(f"run-{number}") for number in range(OWNERS)]
        self._turn = threading.Semaphore(0)
        self.running: list[tuple[Actor, threading.Thread]] = []

    def say(self, line: str) -> None:
        if self.log is not None:
            self.log.append(f"{self.now:7.1f} {line}")

    def run(self) -> None:
        for actor in self.actors:
            actor.wakes = self.rng.uniform(0, 200)
            self._start(actor, OwnerLife(self, actor).live)
        began = real_time.monotonic()
        while ready := [actor for actor in self.actors if not actor.over]:
            if real_time.monotonic() - began > LIMIT_SECONDS:
                raise Violation("the schedule does not end")
            awake = [actor for actor in ready if actor.wakes <= self.now]
            if not awake:
                self.now = min(actor.wakes for actor in ready)
                continue
            self.now += self.rng.uniform(0.0, 1.0)
            self._land(self.now)
            chosen = self.rng.choice(awake)
            chosen.baton.release()
            self._turn.acquire()
        for _, thread in self.running:
            thread.join(LIMIT_SECONDS)
        for actor in self.actors:
            if actor.error is not None:
                raise actor.error
        self._land(math.inf)
        self._check_end()

    def spawn(self, actor: Actor, life: Callable[[], None]) -> None:
        """Let another one take part from now on."""
        actor.wakes = self.now
        self.actors.append(actor)
        self._start(actor, life)

    def _start(self, actor: Actor, life: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._work, args=(actor, life), daemon=True)
        self.running.append((actor, thread))
        thread.start()

    def _work(self, actor: Actor, life: Callable[[], None]) -> None:
        actor.baton.acquire()
        try:
            life()
        except Killed:
            self.say(f"{actor.name} is gone")
        except BaseException as error:
            actor.error = error
        actor.over = True
        self._turn.release()

    def point(self, actor: Actor) -> None:
        """Let the others go first, as far as the seed says."""
        self._turn.release()
        actor.baton.acquire()
        if self.rng.random() < self.faults.killed:
            actor.kill()
        if actor.is_gone:
            raise Killed

    def sleep(self, actor: Actor, seconds: float) -> None:
        actor.wakes = self.now + seconds
        self.point(actor)

    def _land(self, now: float) -> None:
        """Carry out the late requests that are due."""
        due = [one for one in self.late if one[0] <= now]
        self.late = [one for one in self.late if one[0] > now]
        for _, do in sorted(due, key=lambda one: one[0]):
            do()

    def ancestors(self, attempt: str) -> set[str]:
        found: set[str] = set()
        while attempt and attempt not in found:
            found.add(attempt)
            attempt = self.made[attempt][1]
        return found

    def started(self, actor: Actor, claim: int, attempt: str, promised: list[str]) -> None:
        """Check that an owner continues from all that was called saved before it claimed."""
        self.say(f"{actor.name} owns claim {claim}, continues from {attempt or 'nothing'}")
        lost = set(promised) - self.ancestors(attempt)
        if lost:
            raise Violation(f"claim {claim} begins at {attempt or 'nothing'}, without {lost}")

    def _check_end(self) -> None:
        store = FaultyStore(self, None)
        newest = catalog.newest(store)
        lost = set(self.reported) - self.ancestors(newest.attempt if newest else "")
        if lost:
            raise Violation(f"{newest} does not continue from {lost}, which were saved")
        if newest is not None:
            catalog.read_seal(store, newest)
            if f"{newest.data}{FILE.path}" not in self.objects:
                raise Violation(f"{newest} is sealed and has no data")


class FaultyStore:
    """The store as one owner sees it; without an owner as it is."""

    url = "s3://bucket/job"

    def __init__(self, schedule: Schedule, actor: Actor | None) -> None:
        self._schedule = schedule
        self._actor = actor

    def get(self, key: str, limit: int) -> bytes:
        del limit

        def look() -> bytes:
            if key not in self._schedule.objects:
                raise FileNotFoundError(key)
            return self._schedule.objects[key][0]

        return self._ask("get", key, look)

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        return memoryview(self.get(key, length)[start : start + length])

    def put(self, key: str, data: bytes) -> None:
        self._ask("put", key, lambda: self._set(key, data), writes=True)

    def put_new(self, key: str, data: bytes) -> None:
        def set_new() -> None:
            if key in self._schedule.objects:
                raise FileExistsError(key)
            self._set(key, data)

        self._ask("create", key, set_new, writes=True)

    def upload(self, key: str, chunks: Iterable[memoryview], size: int = 0) -> None:
        self.put(key, b"".join(chunks))

    def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
        schedule = self._schedule

        def look() -> list[StoredObject]:
            shown = schedule.objects
            if self._actor is not None and schedule.rng.random() < schedule.faults.old:
                shown = schedule.rng.choice(schedule.before[-30:])
            return [
                StoredObject(key, len(shown[key][0]), shown[key][1])
                for key in sorted(shown)
                if key.startswith(prefix)
            ]

        yield self._ask("list", prefix, look)

    def delete(self, keys: list[str]) -> None:
        def drop() -> None:
            self._remember()
            for key in keys:
                self._schedule.objects.pop(key, None)

        self._ask("delete", keys[0] if keys else "", drop, writes=True)

    def _set(self, key: str, data: bytes) -> None:
        self._remember()
        self._schedule.objects[key] = (data, self._schedule.now)

    def _remember(self) -> None:
        if self._schedule.faults.old:
            self._schedule.before.append(dict(self._schedule.objects))

    def _ask(self, name: str, key: str, do: Callable[[], T], *, writes: bool = False) -> T:
        schedule, actor = self._schedule, self._actor
        if actor is None:
            return do()
        schedule.point(actor)
        rng, faults = schedule.rng, schedule.faults
        if rng.random() < faults.cut:
            actor.cut_until = schedule.now + rng.uniform(0, 120)
        failed = BucketFailed(f"cannot {name} {key}")
        if schedule.now < actor.cut_until or rng.random() < faults.refused:
            schedule.say(f"{actor.name} {name} {key}: refused")
            raise failed
        if writes and rng.random() < faults.late:
            schedule.say(f"{actor.name} {name} {key}: late")

            def land() -> None:
                schedule.say(f"{actor.name} {name} {key}: carried out now")
                with contextlib.suppress(FileExistsError):
                    do()

            delay = rng.choice((2, 100, 400)) * rng.random()
            schedule.late.append((schedule.now + delay, land))
            fate = rng.random()  # what holds a request up often takes more with it
            if fate < 0.2:
                actor.kill()
            actor.cut_until = schedule.now + 150 * (0.2 < fate < 0.4)
            raise failed
        found = do()
        if rng.random() < faults.lost:
            schedule.say(f"{actor.name} {name} {key}: done, the answer was lost")
            raise failed
        schedule.say(f"{actor.name} {name} {key}")
        return found


class OwnerLife:
    """What one run does: claim, continue, save, end or vanish."""

    def __init__(self, schedule: Schedule, actor: Actor) -> None:
        self._schedule = schedule
        self._actor = actor
        self._store = FaultyStore(schedule, actor)
        self._owner = Owner(
            run_id=actor.name, node="node", nonce=actor.name,
            owner=ProcessIdentity(f"host of {actor.name}", "boot", 1, 1.0),
        )  # fmt: skip
        # Of several nodes: the leader of the ranks seals and so does a drain, the supervisor beats.
        self._is_shared = schedule.rng.random() < 0.5
        self._leader: BucketClaim | None = None
        self._drain: DrainLife | None = None
        self._lock_is_taken = False

    def live(self) -> None:
        try:
            self._live()
        finally:
            if self._drain is not None:
                self._drain.is_over = True

    def _live(self) -> None:
        claim = self._claim()
        if claim is None:
            return
        rng = self._schedule.rng
        try:
            # Whatever was called saved until now was saved before this claim, or by nobody.
            promised = list(self._schedule.reported)
            seal = self._again(lambda: catalog.newest(self._store, "", claim.newest))
            parent, step = (seal.attempt, seal.step) if seal else ("", 0)
            self._schedule.started(self._actor, claim.number, parent, promised)
            for _ in range(SAVES):
                self._pause(claim)
                step += rng.choice((1, 2, 30))
                parent = self._save(claim, step, parent)
            while self._drain is not None and self._drain.is_busy:
                self._pause(claim)
                self._schedule.sleep(self._actor, 10.0)
            if rng.random() < 0.5:
                self._again(lambda: claim.beat(ended=True))
        except RunSuperseded:
            self._schedule.say(f"{self._actor.name} has lost claim {claim.number}")
        except BucketFailed:
            self._schedule.say(f"{self._actor.name} gives up")

    def _claim(self) -> BucketClaim | None:
        for _ in range(30):
            try:
                return take(self._store, "job", self._owner, Patience())
            except (BucketFailed, LockHeld):
                self._schedule.sleep(self._actor, self._schedule.rng.uniform(1, 60))
        return None

    def _pause(self, claim: BucketClaim) -> None:
        for _ in range(self._schedule.rng.randint(0, 3)):
            self._schedule.sleep(self._actor, 10.0)
            with contextlib.suppress(BucketFailed):
                claim.beat()

    def _save(self, claim: BucketClaim, step: int, parent: str) -> str:
        """Save, and note it if it was called saved; return what the next one continues from."""
        attempt = f"{self._actor.name}-{step}"
        manifest = _manifest(attempt, step, parent)
        self._schedule.made[attempt] = (claim.number, parent)
        if self._is_shared and self._schedule.rng.random() < 0.4:
            self._schedule.say(f"{self._actor.name} has {attempt} in memory")
            self._drained(claim).bring(manifest)
            return attempt
        with contextlib.suppress(BucketFailed):
            seal = self._again(lambda: self._seal(claim, manifest))
            self._schedule.say(f"{self._actor.name} calls {attempt} saved")
            if self._is_shared and self._schedule.rng.random() < 0.1:
                return self._fall_back(claim, seal, attempt, parent)
            self._schedule.reported.append(attempt)
            if self._schedule.rng.random() < 0.3:
                prune(self._leader or claim, "", Retention(last=2))
        return attempt

    def _drained(self, claim: BucketClaim) -> DrainLife:
        if self._drain is None:
            actor = Actor(f"{self._actor.name}-drain", self._actor)
            self._drain = DrainLife(self._schedule, actor, self._owner, claim.number, self._lock)
            self._schedule.spawn(actor, self._drain.live)
        return self._drain

    @contextlib.contextmanager
    def _lock(self, actor: Actor) -> Iterator[None]:
        """As that of a file: who dies lets go of it."""
        while self._lock_is_taken:
            self._schedule.sleep(actor, 1.0)
        self._lock_is_taken = True
        try:
            yield
        finally:
            self._lock_is_taken = False

    def _seal(self, claim: BucketClaim, manifest: Manifest) -> SealKey:
        if not self._is_shared:
            return push(claim, _source, manifest)
        if self._leader is None:
            lock = partial(self._lock, self._actor)
            self._leader = claim_of(self._store, claim.number, self._owner.nonce, lock)
        return _upload(self._leader, manifest)

    def _fall_back(self, claim: BucketClaim, seal: SealKey, attempt: str, parent: str) -> str:
        """Take the newest one's seal away; return what the next one continues from."""
        try:
            self._again(lambda: set_aside(self._leader or claim, seal))
        except BucketFailed:
            return attempt  # it may still be there, and is as good
        self._schedule.say(f"{self._actor.name} goes back to {parent or 'nothing'}")
        return parent

    def _again(self, do: Callable[[], T]) -> T:
        return _again(self._schedule, self._actor, do)


class DrainLife:
    """The drain of a supervisor: it seals what was saved in memory, while the leader of the ranks
    seals what was not, and so in another order."""

    def __init__(
        self,
        schedule: Schedule,
        actor: Actor,
        owner: Owner,
        number: int,
        lock: Callable[[Actor], AbstractContextManager[None]],
    ) -> None:
        self._schedule = schedule
        self._actor = actor
        self._owner = owner
        self._number = number
        self._lock = lock
        self._waiting: deque[Manifest] = deque()
        self.is_over = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting) and not self.is_over

    def bring(self, manifest: Manifest) -> None:
        self._waiting.append(manifest)

    def live(self) -> None:
        try:
            store = FaultyStore(self._schedule, self._actor)
            lock = partial(self._lock, self._actor)
            claim = _again(
                self._schedule, self._actor,
                lambda: claim_of(store, self._number, self._owner.nonce, lock),
            )  # fmt: skip
            while not self.is_over:
                self._schedule.sleep(self._actor, 5.0)
                if self._waiting:
                    self._bring_one(claim, self._waiting[0])
                    self._waiting.popleft()
        except (RunSuperseded, BucketFailed) as error:
            self._schedule.say(f"{self._actor.name} gives up: {error}")
        finally:
            self.is_over = True

    def _bring_one(self, claim: BucketClaim, manifest: Manifest) -> None:
        _again(self._schedule, self._actor, lambda: _upload(claim, manifest))
        self._schedule.say(f"{self._actor.name} calls {manifest.attempt} saved")
        self._schedule.reported.append(manifest.attempt)
        with contextlib.suppress(BucketFailed):
            if self._schedule.rng.random() < 0.3:
                prune(claim, "", Retention(last=2))


def _again(schedule: Schedule, actor: Actor, do: Callable[[], T]) -> T:
    for _ in range(8):
        try:
            return do()
        except BucketFailed:
            schedule.sleep(actor, 2.0)
    return do()


def _source(_: FileEntry) -> Iterator[memoryview]:
    return iter([memoryview(DATA)])


def _upload(claim: BucketClaim, manifest: Manifest) -> SealKey:
    prefix = SealKey.of(manifest, claim.number).data
    for entry in manifest.files:
        send(claim.store, prefix, _source, entry, ignore)
    return seal_uploaded(claim, manifest)


def _manifest(attempt: str, step: int, parent: str) -> Manifest:
    header = SealHeader(
        job="job", attempt=attempt, incarnation=1, created="", reason="interval", epoch=0,
        step=step, step_in_epoch=step, sample_start_index=step, samples_per_step=1, order_seed=None,
        dataset_fingerprint="", dataset_size=0, world_size=1, data_parallel_size=1,
        engine=EngineInfo("torch"), torch="", parent=parent,
    )  # fmt: skip
    return make_manifest(header, [FILE])


class Clocks:
    """Time as the schedule has it, for the code that waits for a lease."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def monotonic(self) -> float:
        return self._schedule.now

    def sleep(self, seconds: float) -> None:
        running = threading.current_thread()
        actor = next(a for a, t in self._schedule.running if t is running)
        self._schedule.sleep(actor, seconds)


def simulate(seed: int, log: list[str] | None = None) -> str | None:
    """Run one schedule; return what it broke, None for nothing."""
    schedule = Schedule(seed, log)
    with mock.patch.object(taking, "time", Clocks(schedule)):
        try:
            schedule.run()
        except Violation as error:
            return str(error)
    return None


def main() -> None:
    """Try all seeds between two."""
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    began, failed = real_time.perf_counter(), 0
    for seed in range(first, last + 1):
        log: list[str] | None = [] if first == last else None
        broken = simulate(seed, log)
        for line in log or ():
            print(line)
        if broken is not None:
            failed += 1
            print(f"seed {seed}: {broken}", flush=True)
    seconds, count = real_time.perf_counter() - began, last - first + 1
    print(f"{count} schedules in {seconds:.1f} s, {count / seconds:.0f} a second: {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
