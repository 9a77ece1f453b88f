"""Counts over all runs in a job's journal, and its newest checkpoints."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import PurePath
from typing import Final, get_args

from msgspec.structs import replace

from elastic_ckpt.checkpoint.manifest import Reason
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.journal.events import (
    AttemptRecovered,
    Crashed,
    Drained,
    DrainFailed,
    JournalEvent,
    MemoryRefused,
    Quarantined,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailure,
    WorkersLaunched,
)
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.time_account import TimeAccount
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.policy.own_saves import step_of

BOUNDS_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Buckets of save and drain durations, from a small model in memory to a large one on disk."""

OTHER: Final = "other"
"""The label for values that this version does not know, so that labels stay few."""

CAUSES: Final = ("failure", "preemption", "resize", OTHER)
"""Causes of a restart: a failure or kill; a notice; a change of nodes or settings; ``other`` if the
job had ended and was run again."""

REASONS: Final = (*get_args(Reason), "script", OTHER)
"""Why a checkpoint was made; ``script`` for what the script writes itself."""

TIERS: Final = ("memory", "disk", "bucket")
CRASHES: Final = (*(kind.value for kind in FailureClass), OTHER)

_PREEMPTED: Final = (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED)
_REMEMBERED: Final = 64
"""Checkpoints kept for each tier, in case the newer ones are set aside."""

_Key = tuple[int, int]


class Durations:
    """A histogram of durations, in seconds."""

    def __init__(self) -> None:
        self.sum = 0.0
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.sum += seconds
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus has them."""
        names = [*(str(bound) for bound in BOUNDS_SECONDS), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint of a tier, sealed at ``wall`` seconds since the epoch."""

    step: int
    wall: float
    bytes: int | None
    session: str = ""


class JobCounts:
    """Counts the events of a job, in order of time; ignores those of nodes that do not lead.

    Attributes:
        time: where the job's time went.
        restarts: launches after the first, by cause.
        crashes: failed incarnations, by class.
        saves: sealed checkpoints, by reason and tier.
        save_durations: by tier.
    """

    def __init__(self) -> None:
        self.time = TimeAccount()
        self.restarts = dict.fromkeys(CAUSES, 0)
        self.crashes = dict.fromkeys(CRASHES, 0)
        self.saves = dict.fromkeys(product(REASONS, TIERS), 0)
        self.save_failures = self.drain_failures = self.quarantined = 0
        self.save_durations = {tier: Durations() for tier in TIERS}
        self.drain_durations = Durations()
        self.stall_seconds = 0.0
        self._sealed: dict[str, dict[str, dict[_Key, NewestCheckpoint]]] = {
            tier: {} for tier in TIERS
        }  # by session
        self._launched = self._running = False
        self._exit_code: int | None = None  # of the last run
        self._cause = ""  # of the next launch; empty if unknown

    def observe(self, entry: JournalEntry, wall: float | None = None) -> None:
        """Count the next entry, at ``wall`` for the account of time; by default the entry's own
        time."""
        event = entry.event
        if event.follows:
            return
        self.time.observe(entry if wall is None else replace(entry, wall=wall))
        self._count_restart(event)
        match event:
            case Saved(tier="own"):
                self._count_save(entry.wall, replace(event, tier="disk"))
            case Saved():
                self._count_save(entry.wall, event)
            case SaveFailure():
                self.stall_seconds += event.stall_seconds
                self.save_failures += 1
            case Drained(bytes=size):
                self.drain_durations.add(event.seconds)
                self._seal("disk", event.path, _key(event.path), entry.wall, size)
            case DrainFailed():
                self.drain_failures += 1
            case AttemptRecovered(what="sealed"):
                self._seal("disk", event.path, _key(event.path), entry.wall, None)
            case Quarantined():
                self.quarantined += 1
                path = PurePath(event.path)
                key, session = checkpoint_key(path.name), session_of(event.path)
                for found in self._sealed.values():
                    found.get(session, {}).pop(key or (0, step_of(path.name)), None)
            case MemoryRefused():
                self._sealed["memory"].clear()

    def newest(self, tier: str) -> NewestCheckpoint | None:
        """Return what a restart would load from this tier, of the session that was saved last;
        None if nothing."""
        held = [found[max(found)] for found in self._sealed[tier].values() if found]
        return max(held, key=lambda one: one.wall, default=None)

    def _count_restart(self, event: JournalEvent) -> None:
        match event:
            case RunStarted():
                self._cause = self._why_again()
                self._running = True
                self._sealed["memory"].clear()  # memory is lost with a run
            case Crashed():
                kind = _known(event.kind, CRASHES)
                self.crashes[kind] += 1
                self._cause = "resize" if kind == FailureClass.MEMBERSHIP.value else "failure"
            case WorkersLaunched():
                if self._launched:
                    self.restarts[self._cause or "resize"] += 1
                self._launched, self._cause = True, ""
            case RunEnded():
                self._running = False
                self._exit_code = event.exit_code

    def _why_again(self) -> str:
        """Return the cause of another run."""
        if self._running:
            return "failure"  # the previous run was killed: it has no end
        return "preemption" if self._exit_code in _PREEMPTED else OTHER

    def _count_save(self, wall: float, event: Saved) -> None:
        self.stall_seconds += event.stall_seconds or 0.0
        if event.tier not in TIERS:
            return
        self.saves[_known(event.reason, REASONS), event.tier] += 1
        self.save_durations[event.tier].add(event.seconds)
        self._seal(event.tier, event.path, (event.epoch, event.step), wall, event.bytes or 0)

    def _seal(self, tier: str, path: str, key: _Key | None, wall: float, size: int | None) -> None:
        if key is None:
            return
        session = session_of(path)
        found = self._sealed[tier].setdefault(session, {})
        found[key] = NewestCheckpoint(key[1], wall, size, session)
        if len(found) > _REMEMBERED:
            del found[min(found)]


def session_of(path: str) -> str:
    """Return the name of the session whose checkpoint this is; empty for the unnamed one."""
    place = PurePath(path).parent
    return place.name if place.parent.name == "sessions" else ""


def _key(path: str) -> _Key | None:
    return checkpoint_key(PurePath(path).name)


def _known(word: str, words: Iterable[str]) -> str:
    return word if word in words else OTHER
