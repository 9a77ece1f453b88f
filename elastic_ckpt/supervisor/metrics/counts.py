"""What a job's journal adds up to: counts over all of its runs, and the newest of what there is."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from elastic_ckpt.checkpoint.manifest import Reason
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.journal.journal import JournalEvent
from elastic_ckpt.journal.time_account import TimeAccount, number
from elastic_ckpt.policy.failure import FailureClass

BOUNDS_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Of a save's and a drain's duration: a small model in memory, and a large one on a slow disk."""

OTHER: Final = "other"
"""What a journal says that this version does not know: labels stay few, whatever stands there."""

CAUSES: Final = ("failure", "preemption", "resize", OTHER)
"""Of a restart: something failed or was killed; a notice came; nodes came or went, or ranks were to
begin anew; somebody ran a job again that had ended otherwise."""

REASONS: Final = (*get_args(Reason), OTHER)
TIERS: Final = ("memory", "disk")
CRASHES: Final = (*(kind.value for kind in FailureClass), OTHER)

_PREEMPTED: Final = (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED)
_REMEMBERED: Final = 64
"""Checkpoints of a tier: those behind the newest count only once that is set aside."""

_Key = tuple[float, float]


class Durations:
    """How often what took how long, in seconds."""

    def __init__(self) -> None:
        self.sum = 0.0
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        """One more."""
        self.sum += seconds
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """How many took so long at most, as Prometheus counts."""
        names = [*(str(bound) for bound in BOUNDS_SECONDS), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


@dataclass(frozen=True)
class Newest:
    """A checkpoint.

    Attributes:
        wall: when it was sealed, in seconds since the epoch.
        bytes: None where nobody has said.
    """

    step: float
    wall: float
    bytes: float | None


class JobHistory:
    """Folds the events of a job, in order of time; what a node wrote that follows is left out.

    Attributes:
        time: where the job's time went.
        restarts: launches behind the first, by cause.
        crashes: by class.
        saves: sealed, by reason and tier.
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
        self._sealed: dict[str, dict[_Key, Newest]] = {tier: {} for tier in TIERS}
        self._launched = self._running = False
        self._exit_code: Any = None  # of the last run
        self._cause = ""  # of the next launch; empty if nobody has said why there should be one

    def observe(self, event: JournalEvent, wall: float | None = None) -> None:
        """Take the next event into account.

        Args:
            wall: when it was, for the account of time; as it says itself if not given.
        """
        if event.data.get("follows"):
            return
        self.time.observe(event if wall is None else msgspec.structs.replace(event, wall=wall))
        match event.event:
            case "start" | "launch" | "crash" | "end":
                self._count_restart(event.event, event.data)
            case "saved" | "save_failed":
                self._count_save(event)
            case "drained" | "drain_failed":
                self._count_drain(event)
            case "recovered" if event.data.get("what") == "sealed":
                self._seal("disk", _named(event.data), event.wall, None)
            case "quarantined":
                self.quarantined += 1
                for found in self._sealed.values():
                    found.pop(_named(event.data), None)
            case "memory_refused":
                self._sealed["memory"].clear()

    def newest(self, tier: str) -> Newest | None:
        """What a restart would take from there; None if the journal knows of none."""
        found = self._sealed[tier]
        return found[max(found)] if found else None

    # -- inside -------------------------------------------------------------------------------

    def _count_restart(self, what: str, data: dict[str, Any]) -> None:
        match what:
            case "start":
                self._cause = self._why_again()
                self._running = True
                self._sealed["memory"].clear()  # it ends with a run
            case "crash":
                kind = _known(data.get("kind"), CRASHES)
                self.crashes[kind] += 1
                self._cause = "resize" if kind == FailureClass.MEMBERSHIP.value else "failure"
            case "launch":
                if self._launched:
                    self.restarts[self._cause or "resize"] += 1
                self._launched, self._cause = True, ""
            case "end":
                self._running = False
                self._exit_code = data.get("exit_code")

    def _why_again(self) -> str:
        """Why there is another run."""
        if self._running:
            return "failure"  # the one before was killed, and could not say that it ends
        return "preemption" if self._exit_code in _PREEMPTED else OTHER

    def _count_save(self, event: JournalEvent) -> None:
        data = event.data
        self.stall_seconds += _amount(data.get("stall_seconds"))
        if event.event == "save_failed":
            self.save_failures += 1
            return
        tier = data.get("tier")
        if tier not in TIERS:
            return
        self.saves[_known(data.get("reason"), REASONS), tier] += 1
        self.save_durations[tier].add(_amount(data.get("seconds")))
        key = _amount(data.get("epoch")), _amount(data.get("step"))
        self._seal(tier, key, event.wall, _amount(data.get("bytes")))

    def _count_drain(self, event: JournalEvent) -> None:
        if event.event == "drain_failed":
            self.drain_failures += 1
            return
        self.drain_durations.add(_amount(event.data.get("seconds")))
        self._seal("disk", _named(event.data), event.wall, _amount(event.data.get("bytes")))

    def _seal(self, tier: str, key: _Key, wall: float, size: float | None) -> None:
        if key == _NO_KEY:
            return
        found = self._sealed[tier]
        found[key] = Newest(key[1], wall, size)
        if len(found) > _REMEMBERED:
            del found[min(found)]


_NO_KEY: Final = (-1.0, -1.0)


def _named(data: dict[str, Any]) -> _Key:
    """(epoch, step) of the checkpoint that an event is about, by its name."""
    path = data.get("path")
    found = checkpoint_key(Path(path).name) if isinstance(path, str) else None
    return _NO_KEY if found is None else (float(found[0]), float(found[1]))


def _known(word: Any, words: Iterable[str]) -> str:
    return word if isinstance(word, str) and word in words else OTHER


def _amount(value: Any) -> float:
    """A number that can be added up, whatever stands there."""
    found = number(value, 0.0)
    return found if 0.0 <= found < math.inf else 0.0
