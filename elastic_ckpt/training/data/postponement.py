"""Saves that wait for a step boundary at which the state is that of a position in the data."""

from __future__ import annotations

import logging
from typing import Any, Final

from elastic_ckpt.training.data.consumption import Consumption, sample_state
from elastic_ckpt.training.runtime import Runtime

log = logging.getLogger(__name__)

MAX_TRIES: Final = 64
MAX_HURRIED_TRIES: Final = 8
"""Steps that a save is postponed at most; the second before a stop, where a deadline runs."""

_DOCS: Final = "docs/troubleshooting.md#a-save-waits-for-the-optimizer"


class Postponement:
    """Decides whether a save can be made now, and warns once per Session about each cause.

    Saves are postponed on all ranks alike, so that ``tries`` is the same on all of them.
    """

    def __init__(self, consumption: Consumption, runtime: Runtime, optimizer: Any) -> None:
        self._consumption = consumption
        self._runtime = runtime
        self._optimizer = optimizer
        self._tries = 0
        self._sample: tuple[int, list[float]] | None = None
        self._warned: set[str] = set()

    def is_ready(self, *, hurried: bool) -> bool:
        """Return whether this rank can save now.

        Args:
            hurried: a stop waits for the save.
        """
        used = self._consumption
        if used.ready(self._tries):
            if used.counts and used.consumed < used.handed:
                self._warn(
                    "ahead",
                    f"the script requests batches before the optimizer has used those that it has "
                    f"({used.handed} handed out, {used.consumed} used): checkpoints hold the "
                    "position of the last optimizer step",
                )
            return True
        if self._steps_unseen():
            used.watched = False
            self._warn(
                "unseen",
                "the optimizer's state changes without a step that can be seen (a CUDA graph?): "
                "checkpoints hold the position of the loop",
            )
            return True
        if self._tries < (MAX_HURRIED_TRIES if hurried else MAX_TRIES):
            return False
        used.ignore_stepless()
        return True

    def count(self, step: int, reason: str) -> None:
        """Count a save that all ranks have postponed."""
        self._tries += 1
        log.info("the save after step %d (%s) waits for an optimizer step", step, reason)
        if self._tries == 2:  # one skipped step is nothing to speak of
            self._warn(
                "waits",
                f"the optimizer did not step with the batches before step {step}, so the save "
                "waits until it has: if the script accumulates gradients, pass "
                "accumulation_steps to Session",
            )

    def end(self, step: int) -> None:
        """Note that the save is made."""
        used = self._consumption
        if self._tries >= MAX_HURRIED_TRIES and used.counts and not used.stepped_since:
            log.warning("saved after step %d as of the last optimizer step", step)
        self._tries, self._sample = 0, None

    def _steps_unseen(self) -> bool:
        """Whether the state has changed since the last try, although no hook was called."""
        sample, before = sample_state(self._optimizer), self._sample
        steps = self._consumption.steps
        self._sample = None if sample is None else (steps, sample)
        return None not in (sample, before) and before[0] == steps and before[1] != sample  # type: ignore[index]

    def _warn(self, cause: str, text: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            self._runtime.leader_says(f"warning: {text}; see {_DOCS}")
