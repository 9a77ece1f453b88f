"""Why an incarnation failed, as a class that a restart rule applies to."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import Final


class FailureClass(str, Enum):
    """The class of a failure; the journal and ``status`` show these values."""

    MEMBERSHIP = "membership"  # a node vanished; not a failure of the job
    LAUNCH = "launch"  # the workers could not be launched
    START_UP = "start-up"  # exited with an error soon, before any rank started a step
    ERROR = "error"  # exited with an error later, or with code 0 too early
    NON_FINITE = "non-finite"  # the script reported a loss of nan or infinity
    DEVICE_MEMORY = "device-memory"  # out of GPU memory
    HOST_MEMORY = "host-memory"  # killed by the kernel's out-of-memory killer
    FAULT = "fault"  # a signal that the process caused itself, such as SIGSEGV
    SIGNAL = "signal"  # any other signal, or the agent was lost
    HANG = "hang"  # no rank made progress for longer than a step ever takes
    STORAGE = "storage"  # a load failed, or a save that had to succeed


NOTHING_SAVED: Final[tuple[int, ...]] = (-1, 0)
"""Sorts before the (epoch, step) of every checkpoint."""

LAUNCH_FAILED: Final = "the workers could not be launched"

_FAULTS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS}
)
SETTLED_SECONDS: Final = 60.0
"""A worker that fails later did not fail to start. A script without a Session shows no steps."""

_MESSAGE_MARKS: Final = (
    ("NonFiniteLoss", FailureClass.NON_FINITE),
    ("OutOfMemoryError", FailureClass.DEVICE_MEMORY),
    ("CUDA out of memory", FailureClass.DEVICE_MEMORY),
    ("StorageFailed", FailureClass.STORAGE),
)
"""Substrings of a worker's last line, which starts with the exception's name."""


@dataclass(frozen=True)
class Failure:
    """The failure of one incarnation.

    Attributes:
        rank: the first rank to fail, or -1 if it was not a worker.
        exit_code: its exit code; negative for the signal that killed it.
        message: one line.
        stepped: whether any rank of the incarnation had started a step.
        lived: seconds from the rank's start to its failure; 0 if unknown.
        steps: steps finished in the incarnation.
        step: the step that failed, as the script counts it over the whole job; 0 if unknown.
        newest: orders the checkpoint that the next incarnation would resume from.
        node: whose worker failed first; empty on one node, or if that is not known.
        at: when the job learned of it, in monotonic seconds.
        dispensable: whether there are enough other nodes to continue without that one.
        out_of_memory: whether the kernel killed a process for memory meanwhile.
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
    newest: tuple[int, ...] = NOTHING_SAVED
    lived: float = 0.0
    node: str = ""
    at: float = 0.0
    dispensable: bool = False

    @property
    def kind(self) -> FailureClass:
        """The class of this failure."""
        if self.message.startswith(LAUNCH_FAILED) and self.exit_code > 0 and self.rank < 0:
            return FailureClass.LAUNCH  # also after a hang, if a worker does not go
        if self.lost:
            return FailureClass.MEMBERSHIP
        if self.hung:
            return FailureClass.HANG
        if self.exit_code < 0:
            number = -self.exit_code
            if number == signal.SIGKILL and self.out_of_memory and self.rank >= 0:
                return FailureClass.HOST_MEMORY
            return FailureClass.FAULT if number in _FAULTS else FailureClass.SIGNAL
        known = next((kind for words, kind in _MESSAGE_MARKS if words in self.message), None)
        if known is not None:
            return known
        if not self.stepped and self.exit_code > 0 and self.lived < SETTLED_SECONDS:
            return FailureClass.START_UP
        return FailureClass.ERROR
