"""How long a save will take, from how long saves took.

Each route that bytes take has a rate, which follows what is measured, and a margin, which follows
how wrong the rate was. Both are quicker to believe bad news: a prediction that is too long costs a
chance, one that is too short costs the save.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

import msgspec

FIRST_MARGIN: Final = 1.5
"""One measurement says little about the next one."""

LEAST_MARGIN: Final = 1.1
MOST_MARGIN: Final = 3.0

_RISE: Final = 0.5
"""What a slower save than expected moves the rate, of the way to it."""

_FALL: Final = 0.25
"""The same for a faster one."""

_NARROW: Final = 0.02
"""What a prediction that was long enough takes off the margin, of what it could have been less."""

_SHORTEST_SECONDS: Final = 1e-6
_LONGEST_SECONDS: Final = 86400.0
_LARGEST_BYTES: Final = 2**60
"""Beyond these something else was measured than a save."""


class Route(str, Enum):
    """A way for bytes to go, with a speed of its own."""

    MEMORY = "memory"  # a save into the memory tier
    DISK = "disk"  # a save straight to the disk
    DRAIN = "drain"  # from the memory tier to the disk


STAND_INS: Final = {
    Route.MEMORY: (Route.DRAIN, Route.DISK),
    Route.DRAIN: (Route.DISK,),
    Route.DISK: (Route.DRAIN,),
}
"""What to go by where a route has not been measured: one with the same disk, or a slower one."""


class RouteModel(msgspec.Struct):
    """What is known of one route.

    Attributes:
        seconds_per_byte: smoothed.
        least_seconds: the shortest that was seen; fewer bytes take no less.
        margin: what an expectation is multiplied by to be a prediction.
    """

    seconds_per_byte: float
    least_seconds: float
    margin: float = FIRST_MARGIN

    def expected(self, size: float) -> float:
        """Seconds for so many bytes, as likely too long as too short."""
        return max(self.least_seconds, self.seconds_per_byte * max(0.0, size))

    def observe(self, size: float, seconds: float) -> None:
        """Learn from one measurement.

        Afterwards a prediction for this size is not below it, short of ``MOST_MARGIN``.
        """
        before = self.expected(size)
        # Few bytes may take long for other reasons than their number, never less than its share.
        if seconds / size < self.seconds_per_byte:
            self.seconds_per_byte += _FALL * (seconds / size - self.seconds_per_byte)
        elif seconds > before:
            self.seconds_per_byte *= 1 + _RISE * (seconds / before - 1)
        self.least_seconds = min(self.least_seconds, seconds)
        if seconds > before * self.margin:
            needed = LEAST_MARGIN * seconds / self.expected(size)
            self.margin = min(MOST_MARGIN, max(self.margin, needed))
        else:
            enough = max(LEAST_MARGIN, seconds / before)
            self.margin -= _NARROW * (self.margin - enough)

    @property
    def is_sane(self) -> bool:
        """Whether it can have come from measurements; a file may say anything."""
        return (
            _SHORTEST_SECONDS / _LARGEST_BYTES <= self.seconds_per_byte <= _LONGEST_SECONDS
            and _SHORTEST_SECONDS <= self.least_seconds <= _LONGEST_SECONDS
            and LEAST_MARGIN <= self.margin <= MOST_MARGIN
        )


class Predictor(msgspec.Struct):
    """Predicts saves; one for a job, kept from run to run.

    Attributes:
        routes: what was measured so far.
        last_bytes: what the last save wrote; 0 if there was none.
    """

    routes: dict[Route, RouteModel] = {}
    last_bytes: int = 0

    def observe(self, route: Route, size: float, seconds: float) -> None:
        """Learn from one measurement; what cannot be one changes nothing.

        Args:
            size: bytes that went this way.
            seconds: how long they took.
        """
        if not 1 <= size <= _LARGEST_BYTES:
            return
        if not _SHORTEST_SECONDS <= seconds <= _LONGEST_SECONDS:
            return
        self.last_bytes = int(size)
        model = self.routes.get(route)
        if model is None:
            self.routes[route] = RouteModel(seconds / size, seconds)
        else:
            model.observe(size, seconds)

    def expect(self, route: Route, size: float) -> float | None:
        """Seconds without a margin; None if neither the route nor a stand-in was measured."""
        model = self._model(route)
        return None if model is None else model.expected(size)

    def predict(self, route: Route, size: float, rest_of_step: float = 0.0) -> float | None:
        """Seconds to count on, with the route's margin; None if nothing is known.

        Args:
            size: bytes to go.
            rest_of_step: seconds until the step that runs is done.
        """
        model = self._model(route)
        return None if model is None else rest_of_step + model.margin * model.expected(size)

    def margin(self, route: Route) -> float:
        """The margin of a route, or of what stands in for it."""
        model = self._model(route)
        return FIRST_MARGIN if model is None else model.margin

    def checked(self) -> Predictor:
        """Only what can have come from measurements."""
        sane = {route: model for route, model in self.routes.items() if model.is_sane}
        return Predictor(sane, self.last_bytes if 0 < self.last_bytes <= _LARGEST_BYTES else 0)

    def _model(self, route: Route) -> RouteModel | None:
        for candidate in (route, *STAND_INS[route]):
            if candidate in self.routes:
                return self.routes[candidate]
        return None


def rest_of_step(step_seconds: float, elapsed: float) -> float:
    """Seconds until the running step is done.

    Args:
        step_seconds: how long a step takes; 0 if that is not known.
        elapsed: how long this one has been running.

    Returns:
        What is left of a usual step. One that takes longer than usual may last as long again.
    """
    if not math.isfinite(step_seconds) or step_seconds <= 0:
        return 0.0
    return step_seconds - elapsed if 0 <= elapsed < step_seconds else step_seconds
