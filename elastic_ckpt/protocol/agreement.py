"""The stop-step agreement: at which step do all ranks save, without a rank waiting for a rank?

Ranks of synchronous training are coupled: no rank finishes a step before all have entered it. A
rank that waited at a step boundary for the others' answer could therefore wait for one that waits
inside the next step for *it*. So a process that never computes answers, the watcher:

1. A rank that is about to begin step ``s`` first writes ``entered = s``, then reads the flag.
2. The watcher sets the flag, waits a moment, then reads the largest ``entered`` of its node and
   posts it. The maximum over the nodes is the answer, the same on every node.
3. A rank that sees the flag before it begins a step waits for the answer only, trains up to and
   including that step, and acts at the boundary after it.

A rank that wrote ``entered`` before the watcher read it is counted; one that wrote it later reads
the flag after the watcher set it. So no rank can begin a step beyond the answer unaware.

Requests are numbered. Several may be open (a save, then a stop); a rank that wakes up late finds
all answers in a short ring and serves each one, because its peers do.

``Agenda`` is a rank's side and :func:`answer_step` the watcher's; the real code and the
simulation in ``tests/unit/protocol/test_agreement.py`` run these same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Final

NOTHING_ENTERED: Final = -1
"""What a rank's slot holds before the rank knows where it starts."""

RING: Final = 8
"""Number of answers kept for late ranks: more than can be open at a time."""


class RequestKind(IntEnum):
    """What a request asks all ranks to do at the agreed step."""

    SAVE = 1  # a save of the interval
    STOP = 2
    SAVE_NOW = 3  # for a user or a drill: saves as before a stop, but training continues


class ActionKind(Enum):
    """What a rank does at its current step boundary."""

    GO = "go"
    WAIT = "wait"
    SAVE = "save"
    SAVE_NOW = "save-now"
    STOP = "stop"


@dataclass(frozen=True)
class RequestAnswer:
    """The watcher's answer to one request: at the end of ``step``, do ``kind``."""

    number: int
    kind: RequestKind
    step: int


@dataclass(frozen=True)
class StepAction:
    """What to do now; ``number`` is the newest request that it serves, 0 for none."""

    kind: ActionKind
    number: int = 0


def answer_step(entered: Iterable[int]) -> int:
    """Return the step at which to serve a request: the largest that a rank entered. It is
    ``NOTHING_ENTERED`` if no rank has begun a step: all stop where they start."""
    return max(entered, default=NOTHING_ENTERED)


@dataclass
class Agenda:
    """One rank's view of the requests.

    ``seen`` is the newest request whose answer the rank has; ``open`` the answered ones whose
    step it has not reached: at most one save, which the watcher ensures, and a stop.
    """

    seen: int = 0
    open: list[RequestAnswer] = field(default_factory=list)

    def decide(self, finished: int, flag: int, answers: Mapping[int, RequestAnswer]) -> StepAction:
        """Return what to do before beginning step ``finished + 1``.

        Args:
            finished: optimizer steps that this rank has finished.
            flag: the number of the newest request that is flagged.
            answers: the posted answers, by number.

        Returns:
            WAIT while the answer to a flagged request is missing; SAVE, SAVE_NOW or STOP if an
            answered request is due, STOP before SAVE_NOW before SAVE; else GO.
        """
        while self.seen < flag:
            answer = answers.get(self.seen + 1)
            if answer is None:
                return StepAction(ActionKind.WAIT)
            self.open.append(answer)
            self.seen += 1
        due = [answer for answer in self.open if answer.step <= finished]
        if not due:
            return StepAction(ActionKind.GO)
        self.open = [answer for answer in self.open if answer.step > finished]
        kinds = {answer.kind for answer in due}
        kind = next(action for request, action in _SERVED_BY.items() if request in kinds)
        return StepAction(kind, due[-1].number)


_SERVED_BY: Final = {
    RequestKind.STOP: ActionKind.STOP,
    RequestKind.SAVE_NOW: ActionKind.SAVE_NOW,
    RequestKind.SAVE: ActionKind.SAVE,
}
"""Each serves those after it, too."""
