"""How long a save will take, learned from earlier saves.

Each route has a rate that follows the measurements, and a margin that follows the error of the
rate. Both adapt faster to bad news: a prediction that is too long costs an opportunity, one that is
too short costs the save.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

import msgspec

FIRST_MARGIN: Final = 1.5
"""The margin after a single measurement."""

MIN_MARGIN: Final = 1.1
MAX_MARGIN: Final = 3.0

_RISE: Final = 0.5
"""Weight of a measurement that was slower than expected."""

_FALL: Final = 0.25
"""Weight of a faster one."""

_NARROW: Final = 0.02
"""Share of its slack that the margin loses after a prediction that was long enough."""

_SHORTEST_SECONDS: Final = 1e-6
_LONGEST_SECONDS: Final = 86400.0
_LARGEST_BYTES: Final = 2**60
"""Values outside these limits are not measurements of a save."""


class Route(str, Enum):
    """A way to write bytes, with its own speed."""

    MEMORY = "memory"  # a save into the memory tier
    DISK = "disk"  # a save straight to the disk
    DRAIN = "drain"  # from the memory tier to the disk
    UPLOAD = "upload"  # from the disk to the bucket that is the job's place
    PEER = "peer"  # from the memory of one node to another's


STAND_INS: Final = {
    Route.MEMORY: (Route.DRAIN, Route.DISK),
    Route.DRAIN: (Route.DISK,),
    Route.DISK: (Route.DRAIN,),
    Route.UPLOAD: (),
    Route.PEER: (),
}
"""Routes to use for one that was never measured: of the same disk, or slower."""


_PARTIAL: Final = (Route.UPLOAD, Route.PEER)
"""What is not the whole of the last save, or not of the last one."""


class RouteModel(msgspec.Struct):
    """The learned speed of one route.

    Attributes:
        seconds_per_byte: smoothed rate.
        least_seconds: the shortest measured duration, a lower bound for small writes.
        margin: factor from the expected to the predicted duration.
    """

    seconds_per_byte: float
    least_seconds: float
    margin: float = FIRST_MARGIN

    def expected(self, size: float) -> float:
        """Return the expected seconds for this many bytes, without a margin."""
        return max(self.least_seconds, self.seconds_per_byte * max(0.0, size))

    def observe(self, size: float, seconds: float) -> None:
        """Learn from one measurement.

        Afterwards a prediction for this size is at least ``seconds``, within ``MAX_MARGIN``.
        """
        before = self.expected(size)
        # A small write may be slow for reasons other than its size, so it only lowers the rate.
        if seconds / size < self.seconds_per_byte:
            self.seconds_per_byte += _FALL * (seconds / size - self.seconds_per_byte)
        elif seconds > before:
            self.seconds_per_byte *= 1 + _RISE * (seconds / before - 1)
        self.least_seconds = min(self.least_seconds, seconds)
        if seconds > before * self.margin:
            needed = MIN_MARGIN * seconds / self.expected(size)
            self.margin = min(MAX_MARGIN, max(self.margin, needed))
        else:
            enough = max(MIN_MARGIN, seconds / before)
            self.margin -= _NARROW * (self.margin - enough)

    @property
    def is_sane(self) -> bool:
        """Whether the values are plausible; a file may contain anything."""
        return (
            _SHORTEST_SECONDS / _LARGEST_BYTES <= self.seconds_per_byte <= _LONGEST_SECONDS
            and _SHORTEST_SECONDS <= self.least_seconds <= _LONGEST_SECONDS
            and MIN_MARGIN <= self.margin <= MAX_MARGIN
        )


class Predictor(msgspec.Struct):
    """The predictor of save durations; one per job, kept across runs.

    Attributes:
        routes: the models learned so far.
        last_bytes: size of the last save; 0 if there was none.
    """

    routes: dict[Route, RouteModel] = {}
    last_bytes: int = 0

    def observe(self, route: Route, size: float, seconds: float) -> None:
        """Learn from one measurement; an implausible one is ignored.

        Args:
            size: bytes written.
            seconds: how long that took.
        """
        if not 1 <= size <= _LARGEST_BYTES:
            return
        if not _SHORTEST_SECONDS <= seconds <= _LONGEST_SECONDS:
            return
        if route not in _PARTIAL:
            self.last_bytes = int(size)
        model = self.routes.get(route)
        if model is None:
            self.routes[route] = RouteModel(seconds / size, seconds)
        else:
            model.observe(size, seconds)

    def expect(self, route: Route, size: float) -> float | None:
        """Return the seconds without a margin; None if neither route nor stand-in was measured."""
        model = self._model(route)
        return None if model is None else model.expected(size)

    def margin(self, route: Route) -> float:
        """Return the margin of a route, or of its stand-in."""
        model = self._model(route)
        return FIRST_MARGIN if model is None else model.margin

    def checked(self) -> Predictor:
        """Return a copy with only the plausible values."""
        sane = {route: model for route, model in self.routes.items() if model.is_sane}
        return Predictor(sane, self.last_bytes if 0 < self.last_bytes <= _LARGEST_BYTES else 0)

    def _model(self, route: Route) -> RouteModel | None:
        for candidate in (route, *STAND_INS[route]):
            if candidate in self.routes:
                return self.routes[candidate]
        return None


def rest_of_step(step_seconds: float, elapsed: float) -> float:
    """Return the seconds until the current step is finished.

    A step that takes longer than usual is assumed to need as long again as it is over its time, a
    whole step at most.

    Args:
        step_seconds: how long a step takes; 0 if unknown.
        elapsed: how long this one has been running.
    """
    if not math.isfinite(step_seconds) or step_seconds <= 0:
        return 0.0
    return min(step_seconds, abs(step_seconds - elapsed)) if elapsed >= 0 else step_seconds
