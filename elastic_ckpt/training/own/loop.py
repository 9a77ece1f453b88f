"""When a loop that saves by itself saves and stops: on all ranks after the same step."""

from __future__ import annotations

from typing import Final

from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.own.checkpoints import OwnCheckpoints

_STOP: Final = ActionKind.STOP  # a name of its own, because looking a member up costs time


class OwnLoop:
    """The step agreement for one framework's loop; the integrations are built on it.

    Attributes:
        checkpoints: what the framework writes, once :meth:`watch` was called.
        stops: the job stops at the step that :meth:`after_step` was told last.
    """

    def __init__(self) -> None:
        """Join the job. Collective."""
        self._runtime = runtimes.joined()
        self._steps, self._slot = self._runtime.steps, self._runtime.slot
        self._calls = 0
        self._attached = False
        self.stops = False
        self.checkpoints: OwnCheckpoints | None = None

    def watch(self, pattern: str, complete_when: str) -> OwnCheckpoints:
        """Have what matches an absolute pattern sealed once ``complete_when``. Collective."""
        self.checkpoints = OwnCheckpoints(self._runtime, pattern, complete_when)
        return self.checkpoints

    def begin(self, step: int = 0) -> None:
        """Take part in the agreement, having resumed from ``step`` as the framework counts."""
        if not self._attached:
            self._attached = True
            self._steps.attach(0, declares=False)
        self._slot.own_step(step)

    def after_step(self, step: int) -> ActionKind:
        """Return what all ranks do after this optimizer step: GO, SAVE, SAVE_NOW, or STOP, which is
        to save and :meth:`leave`. No rank waits for another; a few microseconds while nothing is
        asked.

        Raises:
            StopAborted: a rank died during the agreement.
        """
        if not self._attached:
            self.begin(step)
        self._steps.stepped()
        self._slot.own_step(step)
        self._calls = finished = self._calls + 1
        kind = self._steps.enter(finished, comes_back=False).kind
        if kind is _STOP:
            self.stops = True
        return _STOP if self.stops else kind

    def meet(self, name: str) -> None:
        """Wait until all ranks have written their files, as before the one that is written last.

        Collective. Every rank gives the same name.
        """
        self._runtime.peers.collect(name, bytes)

    def say(self, line: str) -> None:
        """Print a line, on one rank."""
        self._runtime.leader_says(line)

    def saved(self, step: int) -> None:
        """Have what the framework has just written sealed. Collective."""
        if self.checkpoints is not None:
            self.checkpoints.written()
        self._runtime.slot.saved(step)

    def leave(self) -> None:
        """End this process after the save at a stop. Collective.

        Raises:
            SystemExit: always; 0 under a supervisor, which decides between 75 and 76, else 75.
        """
        self._runtime.leave(saved=True)
