"""The supervisor's states as data: a transition table and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class RunState(Enum):
    """What the supervisor is doing; the values are what ``status`` shows."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    BACKING_OFF = "backing-off"
    FINISHED = "finished"
    PREEMPTED = "preempted"
    FAILED = "failed"


TERMINAL: Final = frozenset({RunState.FINISHED, RunState.PREEMPTED, RunState.FAILED})


class Event(Enum):
    """What happens to the supervisor."""

    STEPPING = "stepping"  # a worker entered its first step
    NOTICE = "notice"  # this node will be preempted
    COMPLETED = "completed"  # every worker finished its work
    STOPPED = "stopped"  # every worker left at the agreed stop step
    CRASH = "crash"  # a worker or the agent died
    REGROUP = "regroup"  # the incarnation ended, and one with other nodes follows
    ABANDONED = "abandoned"  # the other nodes did not come in time
    RETRY = "retry"  # the back-off is over
    GIVE_UP = "give-up"  # no budget left, or a failure that a retry cannot fix
    EXPIRED = "expired"  # the deadline has passed


TRANSITIONS: Final[Mapping[tuple[RunState, Event], RunState]] = {
    (RunState.STARTING, Event.STEPPING): RunState.RUNNING,
    (RunState.STARTING, Event.ABANDONED): RunState.PREEMPTED,
    (RunState.STARTING, Event.NOTICE): RunState.DRAINING,
    (RunState.STARTING, Event.COMPLETED): RunState.FINISHED,
    (RunState.STARTING, Event.CRASH): RunState.BACKING_OFF,
    (RunState.STARTING, Event.GIVE_UP): RunState.FAILED,
    (RunState.RUNNING, Event.REGROUP): RunState.STARTING,
    (RunState.RUNNING, Event.ABANDONED): RunState.PREEMPTED,
    (RunState.RUNNING, Event.NOTICE): RunState.DRAINING,
    (RunState.RUNNING, Event.COMPLETED): RunState.FINISHED,
    (RunState.RUNNING, Event.CRASH): RunState.BACKING_OFF,
    (RunState.RUNNING, Event.GIVE_UP): RunState.FAILED,
    (RunState.DRAINING, Event.COMPLETED): RunState.FINISHED,
    (RunState.DRAINING, Event.STOPPED): RunState.PREEMPTED,
    # A crash during a notice never turns into a plain restart: the node is going away.
    (RunState.DRAINING, Event.CRASH): RunState.PREEMPTED,
    (RunState.DRAINING, Event.ABANDONED): RunState.PREEMPTED,
    (RunState.DRAINING, Event.GIVE_UP): RunState.FAILED,
    (RunState.DRAINING, Event.EXPIRED): RunState.PREEMPTED,
    (RunState.BACKING_OFF, Event.RETRY): RunState.STARTING,
    (RunState.BACKING_OFF, Event.ABANDONED): RunState.PREEMPTED,
    (RunState.BACKING_OFF, Event.NOTICE): RunState.DRAINING,
    (RunState.BACKING_OFF, Event.GIVE_UP): RunState.FAILED,
}
"""A pair that is not listed leaves the state unchanged; a test walks all of them."""


def advance(state: RunState, event: Event) -> RunState:
    """Return the state after ``event``."""
    return TRANSITIONS.get((state, event), state)
