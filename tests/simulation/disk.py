"""The disk that all hosts share: checkpoints, what is being written, and who may seal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from tests.simulation.kernel import Kernel, Violation

if TYPE_CHECKING:
    from tests.simulation.hosts import Host
    from tests.simulation.run import Run


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says.

    Attributes:
        run: number of the run whose ranks wrote it; a later one may have sealed it.
        parent: attempt that these ranks had loaded, or saved before; empty for none.
    """

    key: Key
    attempt: str
    run: int
    incarnation: int
    parent: str

    def is_later(self, other: Checkpoint) -> bool:
        """As ``lineage.is_later``."""
        return (self.run, self.incarnation) > (other.run, other.incarnation)


@dataclass(eq=False)
class Attempt:
    """A directory in ``.attempts``.

    Attributes:
        owner: the run number in its name.
        missing: ranks that have not written their parts.
    """

    checkpoint: Checkpoint
    owner: int
    missing: set[int]


class Disk:
    """Sealed checkpoints by key, and who may seal.

    Attributes:
        owner: the run with the newest number; it may have ended.
        number: the newest run number.
        loaded: the newest number whose ranks have loaded: no earlier run may seal after that.
        rewound: the number of the run that has gone back to an older checkpoint last.
        lock_is_lost: the server has forgotten the owner's lock.
        answers_at: until then nothing that needs the disk returns, on any host.
        full_until: until then nothing can be written.
        has_branches: a run may go back behind what nodes have in memory, and find it there again.
        incarnations: how many have been launched in the job; records count on from it.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sealed: dict[Key, Checkpoint] = {}
        self.known: dict[str, Checkpoint] = {}  # whatever was ever sealed, in either tier
        self.number = self.loaded = self.rewound = 0
        self.attempts: list[Attempt] = []
        self.set_aside: set[Key] = set()
        self.superseded: dict[str, Checkpoint] = {}
        self._written: set[str] = set()
        self.owner: Run | None = None
        self.lock_is_lost = False
        self.answers_at = self.full_until = 0.0
        self.incarnations = 0
        self.has_branches = False
        self.requested = False
        self.predictor = Predictor()
        self._count = 0

    @property
    def newest(self) -> Key:
        return max(self.sealed, default=NO_CHECKPOINT)

    @property
    def is_full(self) -> bool:
        return self.kernel.now < self.full_until

    def answers(self, host: Host) -> float:
        """Return when it answers to a host."""
        return max(self.answers_at, host.storage_at)

    def hangs(self, host: Host) -> bool:
        return self.kernel.now < self.answers(host)

    def when_it_answers(self, host: Host, act: Callable[[], None], least: float = 0.0) -> None:
        """Have something happen after ``least`` seconds, and not before the disk answers."""
        self.kernel.after(max(least, self.answers(host) - self.kernel.now), act)

    def new_attempt(self) -> str:
        self._count += 1
        return f"attempt {self._count}"

    def is_off_the_line(self, one: Checkpoint, run: Run) -> bool:
        """As ``lineage.is_stale``: whether the job has gone on without what a run has left."""
        if one.run >= run.number or one.run < run.rewound:
            return one.run < run.number
        there = self.sealed.get(self.newest)
        if there is None or there.run == one.run:
            return False
        return there.run > one.run or there.key > one.key

    def seal_left(self, one: Checkpoint, run: Run) -> bool:
        """Seal what is complete, of an earlier run perhaps; False if it was superseded."""
        if self.is_off_the_line(one, run):
            self.superseded[one.attempt] = one
            return False
        if one.run < run.number:
            self._straighten(one)
        self.seal(one, run, 0)
        return True

    def _straighten(self, newest: Checkpoint) -> None:
        """As ``lineage.straighten``."""
        there = {one.attempt: one for one in self.sealed.values()}
        line, oldest = {newest.attempt}, newest
        while (found := (there | self.superseded).get(oldest.parent)) is not None:
            line.add(found.attempt)
            oldest = found
        for one in there.values():
            if one.attempt not in line and oldest.key < one.key < newest.key:
                self.superseded[one.attempt] = self.sealed.pop(one.key)
        for attempt in line & set(self.superseded):
            one = self.superseded.pop(attempt)
            self.sealed[one.key] = one

    def seal(self, one: Checkpoint, run: Run, incarnation: int) -> None:
        """Publish a checkpoint; its caller has checked the fence, some time ago."""
        step = one.key[1]
        if run.number < self.loaded:
            raise Violation(
                f"{run.name} seals step {step}, and run number {self.loaded} has loaded"
            )
        if incarnation and self.owner is run and incarnation != self.incarnations:
            raise Violation(
                f"incarnation {incarnation} seals step {step}, {self.incarnations} is launched"
            )
        there = self.sealed.get(one.key)
        self.known[one.attempt] = one
        if there is not None and there.is_later(one):
            return
        self.kernel.say(f"sealed on disk: step {step}, by {run.name}")
        self.sealed[one.key] = one
        self._written.add(one.attempt)
        self.check_line()

    def check_line(self) -> None:
        """Follow the parents of the newest checkpoint: all others are among them.

        Those of an earlier run may be others where a parent was in a memory tier only: manifests do
        not tell then, and they stay.
        """
        one: Checkpoint | None = self.sealed.get(self.newest)
        line = set()
        last: Checkpoint | None = None
        while one is not None:
            line.add(one.attempt)
            parent = self.known.get(one.parent)
            if last is None and parent is not None and parent.attempt not in self._written:
                last = one
            if one.parent and parent is None:
                raise Violation(f"step {one.key[1]} continues from what was never sealed")
            if parent is not None and (parent.key >= one.key or parent.run > one.run):
                raise Violation(f"step {one.key[1]} continues from a later one")
            one = parent
        for key, other in self.sealed.items():
            is_unknown = last is not None and key < last.key and other.run < last.run
            if other.attempt not in line and not is_unknown and not self.has_branches:
                raise Violation(f"step {key[1]} of run {other.run} is on another line")

    def go_back(self, key: Key, run: Run) -> None:
        """As ``run --from``."""
        self.kernel.say(f"{run.name} goes back to step {key[1]}")
        for each in [each for each in self.sealed if each > key]:
            one = self.sealed.pop(each)
            self.superseded[one.attempt] = one
        self.rewound = run.number
