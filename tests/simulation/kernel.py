"""Virtual time: a queue of what happens next. Nothing in it depends on anything but the seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from elastic_ckpt.supervisor.ports import Clock


class Violation(AssertionError):
    """An invariant does not hold."""


class Kernel:
    """Runs events in the order of their virtual times, and of their creation at equal ones."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.log: list[str] | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have something happen, ``seconds`` from now."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, act))

    def run(self, until: float, over: Callable[[], bool]) -> None:
        """Run until nothing is left, or it is over, or late."""
        queue = self._queue
        while queue and queue[0][0] <= until and not over():
            self.now, _, act = heapq.heappop(queue)
            act()

    def say(self, line: str) -> None:
        """Note a line for who replays the seed."""
        if self.log is not None:
            self.log.append(f"{self.now:10.3f}  {line}")

    def between(self, low: float, high: float) -> float:
        """Draw a duration."""
        return self.random.uniform(low, high)

    def chance(self, share: float) -> bool:
        """Draw whether something happens."""
        return self.random.random() < share


class HostClock(Clock):
    """The clock of one host, which has nothing to do with another one's.

    Attributes:
        blocked: seconds that the running turn has been blocked for so far.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.offset = kernel.between(10.0, 1e6)
        self.blocked = self.wall_offset = 0.0

    def monotonic(self) -> float:
        return self._kernel.now + self.offset + self.blocked

    def monotonic_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    def wall(self) -> float:
        return 1e9 + self._kernel.now + self.blocked + self.wall_offset
