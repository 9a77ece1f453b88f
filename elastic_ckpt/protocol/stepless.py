"""A script without a Session, or with one that shows no step: what it trains is never saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from elastic_ckpt.protocol.slot import Outcome, Phase, Slot

STEPLESS_SECONDS: Final = 60.0
"""After this long it is a warning."""

STEPLESS: Final = (
    "so nothing is saved: train on the batches of session.batches(loader), which counts the steps"
)

NO_SESSION: Final = "the script creates no Session, so there are no checkpoints"

CREATE_ONE: Final = (
    "create one around the training loop, or give run --watch the checkpoints it writes"
)

_OUTSIDE: Final = frozenset({Phase.LOADING, Phase.BETWEEN})
"""Phases of a Session outside of ``batches`` and of evaluations."""


def stepless_since(slots: Sequence[Slot]) -> int:
    """Return since when every running rank has an open Session without a step; 0 if one has not.

    A rank that waits for its first batch, or that is in its first step, is not counted.

    Returns:
        Monotonic nanoseconds.
    """
    running = [slot for slot in slots if slot.pid and slot.outcome is Outcome.NONE]
    opened = [slot.marks.loaded for slot in running if _is_stepless(slot)]
    return max(opened) if opened and len(opened) == len(running) else 0


def is_sessionless(slots: Sequence[Slot], now: int) -> bool:
    """Return whether all ranks have run without a Session for so long that it is a warning; ``now``
    in monotonic nanoseconds."""
    long_ago = now - int(STEPLESS_SECONDS * 1e9)
    return bool(slots) and all(
        slot.pid and not slot.attached and slot.beat < long_ago for slot in slots
    )


def _is_stepless(slot: Slot) -> bool:
    outside = slot.phase in _OUTSIDE and bool(slot.marks.loaded)
    return slot.declares and slot.attached and outside and slot.entered <= slot.start_step
