"""Where the time of a recovery went, from a failure to the end of the next optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final

_NANOSECONDS: Final = 1e9


@dataclass(frozen=True)
class Marks:
    """Moments of one rank's start, nanoseconds on the monotonic clock; 0 for what was not.

    Attributes:
        entered: the worker's first line.
        group_began, group_ended: the default process group was made.
        joined: the Session began, with what it needs built.
        loaded: the state is in place.
        stepped: the first optimizer step is finished.
    """

    entered: int = 0
    group_began: int = 0
    group_ended: int = 0
    joined: int = 0
    loaded: int = 0
    stepped: int = 0


@dataclass(frozen=True)
class Breakdown:
    """Seconds of each stage of one recovery; a stage that did not happen has 0.

    Attributes:
        detect: until the agent knew of the failure.
        stop: until the last process of the old incarnation was gone.
        spawn: until the slowest new worker ran, a back-off before the launch included.
        imports: from a worker's first line until it makes the process group.
        rendezvous: making the process group.
        build: model, optimizer and data, until the Session begins.
        load: verifying and loading the checkpoint.
        first_step: from there to the end of the first optimizer step.
    """

    detect: float = 0.0
    stop: float = 0.0
    spawn: float = 0.0
    imports: float = 0.0
    rendezvous: float = 0.0
    build: float = 0.0
    load: float = 0.0
    first_step: float = 0.0

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by the stage's name, in order."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {("import" if name == "imports" else name): value for name, value in named.items()}

    @property
    def total(self) -> float:
        """Seconds in all: the sum of the stages."""
        return sum(self.stages.values())


def slowest(ranks: Iterable[Marks]) -> Marks:
    """For each moment the last rank that came to it."""
    found = list(ranks) or [Marks()]
    return Marks(
        **{
            field.name: max(getattr(marks, field.name) for marks in found)
            for field in fields(Marks)
        }
    )


def breakdown(failed_at: int, noticed_at: int, gone_at: int, marks: Iterable[Marks]) -> Breakdown:
    """Lay the moments end to end, so that no second counts twice and none is left out.

    A moment that is missing leaves its time to the next one that is there. One that lies before
    its forerunner, as when ranks overtake each other, counts as the same moment.

    Args:
        failed_at, noticed_at, gone_at: when the worker failed, when the agent knew, when the
            last process was gone; nanoseconds on the monotonic clock.
        marks: one for each rank of the new incarnation.
    """
    last = slowest(marks)
    ends = {
        "detect": noticed_at,
        "stop": gone_at,
        "spawn": last.entered,
        "imports": last.group_began,
        "rendezvous": last.group_ended,
        "build": last.joined,
        "load": last.loaded,
        "first_step": last.stepped,
    }
    here, seconds = failed_at, {}
    for stage, end in ends.items():
        seconds[stage] = max(0, end - here) / _NANOSECONDS
        here = max(here, end)
    return Breakdown(**seconds)
