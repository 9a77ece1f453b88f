"""Why an incarnation failed: a class that a rule can be made for."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import Final


class FailureClass(str, Enum):
    """The values are what the journal and ``status`` show."""

    MEMBERSHIP = "membership"  # no failure of the job: a node vanished
    START_UP = "start-up"  # it raised, or left with a code, before any rank had begun a step
    ERROR = "error"  # it did so later, or left without a word
    NON_FINITE = "non-finite"  # the script reported a loss that is no number
    DEVICE_MEMORY = "device-memory"  # the GPU's is used up
    HOST_MEMORY = "host-memory"  # the kernel killed it to have memory
    FAULT = "fault"  # a signal that a process brings upon itself
    SIGNAL = "signal"  # any other one, or the agent was lost
    HANG = "hang"  # no rank did anything for longer than a step ever takes
    STORAGE = "storage"  # the storage refused a load, or a save that somebody relied on


_FAULTS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS}
)
_SAID: Final = (
    ("NonFiniteLoss", FailureClass.NON_FINITE),
    ("OutOfMemoryError", FailureClass.DEVICE_MEMORY),
    ("CUDA out of memory", FailureClass.DEVICE_MEMORY),
    ("StorageFailed", FailureClass.STORAGE),
)
"""Words of a worker's last line: the exception's name comes first in it."""


@dataclass(frozen=True)
class Failure:
    """One incarnation that ended badly.

    Attributes:
        rank: the rank that went first, or -1 when it was not a worker.
        exit_code: its exit code; negative is the signal that killed it.
        message: one line.
        stepped: whether any rank of the incarnation had begun a step.
        steps: steps finished in the incarnation.
        step: the step that failed, in the job's counting; 0 if nobody knows.
        out_of_memory: whether the kernel killed something for memory meanwhile.
        hung: whether it was killed because it hung.
        lost: names of the nodes that vanished.
        tail: the last lines that the rank printed.
    """

    rank: int
    exit_code: int
    message: str
    stepped: bool
    steps: int = 0
    step: int = 0
    out_of_memory: bool = False
    hung: bool = False
    lost: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()

    @property
    def kind(self) -> FailureClass:
        """Its class."""
        if self.lost:
            return FailureClass.MEMBERSHIP
        if self.hung:
            return FailureClass.HANG
        if self.exit_code < 0:
            number = -self.exit_code
            if number == signal.SIGKILL and self.out_of_memory and self.rank >= 0:
                return FailureClass.HOST_MEMORY
            return FailureClass.FAULT if number in _FAULTS else FailureClass.SIGNAL
        said = next((kind for words, kind in _SAID if words in self.message), None)
        if said is not None:
            return said
        if not self.stepped and self.exit_code > 0:
            return FailureClass.START_UP
        return FailureClass.ERROR
