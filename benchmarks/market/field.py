"""One contender in the market: hosts come and go as the trace says, and the job's account."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from market.contenders import Contender
from market.traces import Change

NOTICE_SECONDS = 30.0
"""The longest that a host stays after its notice; a notice is not compressed."""
AGAIN_SECONDS = 1.0
"""After which a launcher that ended is started again, as a service manager does."""
CLOSE_SECONDS = 120.0
GAP_SECONDS = 1.0
"""Without a step: the job stood still."""
SAVE_SECONDS = 3.0
"""A longer gap is no save."""
KINDS = ("lost", "notice", "came")
"""Of what stops a job, the worst first."""


@dataclass
class Outcome:
    """What became of the job.

    Attributes:
        available: seconds that hosts were there, summed over them.
        made: steps that were made, those included that were lost.
        seconds: in which a host was there.
        verdict: what the state at the end says: steps, taken, repeated, skipped, torn.
        gaps: seconds without a step while a host was there, by what began them.
        ended: how often a launcher ended by itself on a host that stayed.
        presence: how many hosts were there, from when on.
        progress: the samples in the state, over time.
    """

    available: float = 0.0
    made: int = 0
    seconds: float = 0.0
    verdict: dict[str, Any] = field(default_factory=dict)
    gaps: dict[str, list[float]] = field(default_factory=dict)
    ended: int = 0
    note: str = ""
    presence: list[tuple[float, int]] = field(default_factory=list)
    progress: list[tuple[float, int]] = field(default_factory=list)

    @property
    def lost_steps(self) -> int:
        """Made, and not in the state at the end."""
        return self.made - int(self.verdict.get("steps", self.made))

    @property
    def samples(self) -> int:
        """In the state at the end; of a job that stood still for good, after its last step."""
        return int(self.verdict.get("taken", self.progress[-1][1] if self.progress else 0))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "lost_steps": self.lost_steps}


class Field:
    """The hosts of one contender, while a trace is played."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.outcome = Outcome()
        self.began = time.monotonic()
        self._up: dict[str, float] = {}
        self._leaving: dict[str, float] = {}
        self._again: dict[str, float] = {}
        self._marks: list[tuple[float, str]] = []
        self._presence: list[tuple[float, int]] = []

    def play(self, changes: list[Change], seconds: float) -> Outcome:
        """All changes, at their time; then the job is told to end.

        Args:
            changes: with times in seconds from now.
            seconds: when the market closes.
        """
        self.began = time.monotonic()
        for change in changes:
            self._wait_until(change.at)
            if change.comes:
                self._come(f"h{change.node}")
            elif change.notice:
                self._warn(f"h{change.node}")
            else:
                self._go(f"h{change.node}", "lost")
        self._wait_until(seconds)
        self._close()
        return self.outcome

    def rest(self, seconds: float) -> None:
        """Nothing happens."""
        self._wait_until(time.monotonic() - self.began + seconds)

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for that."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                raise TimeoutError(f"no {what} in {seconds} s:\n{self.contender.output()}")
            self._tend()
            time.sleep(0.05)

    def _wait_until(self, at: float) -> None:
        while (left := self.began + at - time.monotonic()) > 0:
            self._tend()
            time.sleep(min(0.05, left))

    def _tend(self) -> None:
        """See to launchers that ended, and to hosts whose notice is over."""
        now = time.monotonic()
        for host in list(self._up):
            over = self.contender.ended(host) is not None
            if host in self._leaving:
                if over or now >= self._leaving[host]:
                    self._go(host, "left")
            elif over and host not in self._again:
                self.outcome.ended += 1
                self._again[host] = now + AGAIN_SECONDS
            elif over and now >= self._again[host]:
                del self._again[host]
                self.contender.come(host)

    def _come(self, host: str) -> None:
        if host in self._leaving:  # its place is needed
            self._go(host, "left")
        self._mark("came")
        self.contender.come(host)
        self._up[host] = time.monotonic()
        self._note_presence()

    def _warn(self, host: str) -> None:
        self._mark("notice")
        self.contender.warn(host)
        self._leaving[host] = time.monotonic() + NOTICE_SECONDS

    def _go(self, host: str, why: str) -> None:
        if host not in self._up:
            return
        if why == "lost":
            self._mark(why)
        self.contender.go(host)
        self.outcome.available += time.monotonic() - self._up.pop(host)
        self._leaving.pop(host, None)
        self._again.pop(host, None)
        self._note_presence()

    def _mark(self, what: str) -> None:
        self._marks.append((time.monotonic(), what))

    def _note_presence(self) -> None:
        self._presence.append((time.monotonic(), len(self._up)))

    def _close(self) -> None:
        closed = time.monotonic()
        self.outcome.available += sum(closed - since for since in self._up.values())
        self.contender.end.touch()
        if not self._up:
            self._come("h1")
        result = self.contender.result
        while not result.exists() and time.monotonic() < closed + CLOSE_SECONDS:
            self._tend()
            time.sleep(0.05)
        if result.exists():
            self.outcome.verdict = json.loads(result.read_text())
        else:
            self.outcome.note = f"stood still at the end, and {CLOSE_SECONDS:.0f} s longer"
        self._account(closed)

    def _account(self, closed: float) -> None:
        """Count steps, and the gaps between them."""
        steps = read_steps(Path(f"{self.contender.root}/trace.0"))
        out = self.outcome
        out.made = len(steps)
        out.seconds = self._with_hosts(self.began, closed)
        out.presence = [(round(at - self.began, 1), up) for at, up in self._presence]
        out.progress = [(round(at - self.began, 1), taken) for at, taken in thinned(steps)]
        times = [self.began, *(at for at, _ in steps if at < closed), closed]
        for before, after in itertools.pairwise(times):
            gap = self._with_hosts(before, after)
            if gap >= GAP_SECONDS:
                kind = "start" if before == self.began else self._kind(before, after)
                out.gaps.setdefault(kind, []).append(round(gap, 2))

    def _kind(self, before: float, after: float) -> str:
        """What began a gap. A launcher on a new host takes some seconds until the others know."""
        within = {what for at, what in self._marks if before - 0.5 <= at <= after}
        if after - before >= SAVE_SECONDS:
            within |= {
                what for at, what in self._marks if before - 40 <= at <= after and what == "came"
            }
        return next((one for one in KINDS if one in within), "other")

    def _with_hosts(self, begin: float, end: float) -> float:
        """Seconds between two moments in which a host was there."""
        times = [*self._presence, (end, 0)]
        spans = ((a, b) for (a, up), (b, _) in itertools.pairwise(times) if up)
        return sum(max(0.0, min(end, after) - max(begin, before)) for before, after in spans)


def read_steps(path: Path) -> list[tuple[float, int]]:
    """When each step was made that rank 0 wrote down, and the samples in the state after it."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 3:  # a killed rank may have written half a line
                found.append((float(words[1]), int(words[2])))
    return sorted(found)


def thinned(steps: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Two a second at the most, and both sides of each gap and each step back."""
    kept: list[tuple[float, int]] = []
    for before, here, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
        edge = (
            before is None or after is None or after[1] < here[1] or before[1] > here[1]
            or after[0] - here[0] > GAP_SECONDS or here[0] - before[0] > GAP_SECONDS
        )  # fmt: skip
        if edge or here[0] - kept[-1][0] >= 0.5:
            kept.append(here)
    return kept
