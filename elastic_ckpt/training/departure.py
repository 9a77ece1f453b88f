"""How a script leaves a Session by ``sys.exit(0)``: all ranks together, or it is an error."""

from __future__ import annotations

import os
import time
from typing import Final

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import UnequalSteps
from elastic_ckpt.protocol.slot import Outcome, Phase
from elastic_ckpt.training.runtime import Runtime

APART_STEPS: Final = 10.0
"""How many steps ranks may be apart; usually they wait for each other in each."""

MIN_SECONDS: Final = 10.0
UNKNOWN_SECONDS: Final = 60.0
"""For ranks of other nodes, and if a step's duration is not known yet."""

EVALUATION_SECONDS: Final = 1800.0
"""How long to wait for a rank that evaluates."""

NAME_SECONDS: Final = 5.0
"""After this long, say who is waited for."""


def is_exit(error: BaseException | None) -> bool:
    """Return whether this ends a script with code 0."""
    return isinstance(error, SystemExit) and error.code in (None, 0)


def leave_together(runtime: Runtime, step: int) -> None:
    """Wait until every rank leaves its Session after ``step``; then they can save together.

    Raises:
        UnequalSteps: a rank trains on, or does not leave within the time of ten steps.
    """
    what = f"rank {runtime.peers.rank} left its Session with exit code 0 after step {step}"
    _meet(runtime, f"exit/{runtime.name}/{step}", what, "end all ranks at the same step")


def end_together(runtime: Runtime, place: Position) -> None:
    """Wait until every rank has read its stream to the end of the epoch, at the same step.

    Raises:
        UnequalSteps: a rank trains on, or does not get there within the time of ten steps.
    """
    if runtime.peers.world_size == 1:
        return
    here = f"epoch {place.epoch} after step {place.step}"
    what = f"the data of rank {runtime.peers.rank} ended in {here}"
    todo = "give every rank equally many batches, as with drop_last, or a loader with len()"
    _meet(runtime, f"end/{runtime.job.name}/{place.epoch}/{place.step}", what, todo)


def _meet(runtime: Runtime, meeting: str, what: str, todo: str) -> None:
    peers, began, first, named = runtime.peers, time.monotonic(), 0, False
    peers.arrive(meeting)
    while True:
        absent, elsewhere = peers.absent(meeting, first)
        if absent < 0:
            return
        first, waited = absent, time.monotonic() - began
        ahead = absent if elsewhere else _ahead(runtime)
        if ahead >= 0 and peers.absent(meeting, first)[0] != absent:
            continue  # it came, all were there, and it has gone on since
        if ahead >= 0 or waited > _limit_seconds(runtime):
            others = f"rank {ahead} trains on" if ahead >= 0 else f"rank {absent} did not"
            raise UnequalSteps(f"{what}, but {others}: {todo}")
        if waited > NAME_SECONDS and not named:
            named = True
            runtime.say(f"{what}; waiting for rank {absent}")
        peers.await_arrival(meeting, absent)


def _limit_seconds(runtime: Runtime) -> float:
    slots = runtime.board.read_slots()
    if any(slot.phase is Phase.EVALUATING for slot in slots):
        return EVALUATION_SECONDS
    step_ns = max(slot.step_ns for slot in slots)
    elsewhere = runtime.peers.world_size > len(slots)
    least = UNKNOWN_SECONDS if elsewhere or not step_ns else MIN_SECONDS
    return max(least, APART_STEPS * step_ns / 1e9)


def _ahead(runtime: Runtime) -> int:
    """Return a rank of this node that has begun a later step than this one; -1 if there is none."""
    slots = runtime.board.read_slots()
    mine = next(slot for slot in slots if slot.pid == os.getpid())
    ahead = (
        slot.rank for slot in slots
        if slot.outcome is Outcome.NONE and slot.entered > mine.entered
    )  # fmt: skip
    return next(ahead, -1)
