"""The stages of a recovery, from a failure to the end of the next optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final

_NANOSECONDS: Final = 1e9


@dataclass(frozen=True)
class Marks:
    """Moments of one rank's start, in monotonic nanoseconds; 0 for those not reached.

    Attributes:
        entered: the worker's first line.
        group_began, group_ended: creating the default process group.
        joined: the Session began, with model and optimizer built.
        loaded: the state was loaded.
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
        detect: until the agent noticed the failure.
        stop: until the last process of the old incarnation was gone.
        spawn: until the slowest new worker ran, including a back-off before the launch.
        imports: from a worker's first line until it creates the process group.
        rendezvous: creating the process group.
        build: building model, optimizer and data, until the Session begins.
        load: verifying and loading the checkpoint.
        first_step: from the load to the end of the first optimizer step.
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
        """Seconds by stage name, in order."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {("import" if name == "imports" else name): value for name, value in named.items()}

    @property
    def total(self) -> float:
        """The sum of the stages, in seconds."""
        return sum(self.stages.values())


def slowest(ranks: Iterable[Marks]) -> Marks:
    """Return for each moment the time of the last rank to reach it."""
    found = list(ranks) or [Marks()]
    return Marks(
        **{
            field.name: max(getattr(marks, field.name) for marks in found)
            for field in fields(Marks)
        }
    )


def breakdown(failed_at: int, noticed_at: int, gone_at: int, marks: Iterable[Marks]) -> Breakdown:
    """Return the seconds of each stage, so that each second counts exactly once.

    The time before a missing moment belongs to the next one that exists. A moment earlier than
    the one before it, as when ranks overtake each other, counts as the same moment.

    Args:
        failed_at, noticed_at, gone_at: when the worker failed, the agent noticed, and the last
            process was gone; monotonic nanoseconds.
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
