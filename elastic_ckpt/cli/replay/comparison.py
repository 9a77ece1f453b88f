"""Whether a part of a job that was trained again is what it was: a comparison of digests."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from elastic_ckpt.journal.audit_events import StateDigest
from elastic_ckpt.journal.events import CheckpointLoaded
from elastic_ckpt.journal.line import JournalEntry

NORM_TOLERANCE: Final = 1e-3
LOSS_TOLERANCE: Final = 1e-2
"""Relative; where other hardware or another torch computes, which cannot give equal bits."""

_SHORT_BYTES: Final = 4

Chain = Mapping[tuple[int, int], StateDigest]
"""By step and rank."""


class Difference(NamedTuple):
    """The first one that was found."""

    step: int
    rank: int
    what: str

    def __str__(self) -> str:
        return f"step {self.step}, rank {self.rank}: {self.what}"


def read_chain(entries: Iterable[JournalEntry], first: int, ranks: int) -> Chain:
    """Return the digests after step ``first`` up to where the number of ranks changes; of a step
    that was trained more than once the last, and nothing that the job has gone back behind."""
    found: dict[tuple[int, int], tuple[int, StateDigest]] = {}
    loads: dict[int, int] = {}  # by incarnation, the step that it loaded
    for entry in entries:
        event = entry.event
        if isinstance(event, CheckpointLoaded) and event.step is not None:
            loads[entry.incarnation] = event.step
        if isinstance(event, StateDigest) and event.step > first:
            here = event.step, entry.rank
            if here not in found or found[here][0] <= entry.incarnation:
                found[here] = entry.incarnation, event
    return _complete(
        {
            (step, rank): event
            for (step, rank), (incarnation, event) in found.items()
            if all(one <= incarnation or step <= loaded for one, loaded in loads.items())
        },
        ranks,
    )


def _complete(found: Chain, ranks: int) -> Chain:
    complete: dict[tuple[int, int], StateDigest] = {}
    for step, at in groupby(sorted(found), key=lambda one: one[0]):
        here = list(at)
        if [rank for _, rank in here] != list(range(ranks)):
            break
        complete |= {(step, rank): found[step, rank] for _, rank in here}
    return complete


def spacing(chain: Chain) -> int:
    """Return a number of steps after each of which a replay has to note digests to have all."""
    return math.gcd(*(step for step, _ in chain))


def bounds_of(before: Chain, now: Chain) -> str:
    """Return why bits cannot be expected to be equal; empty if they can."""
    devices = {one.device for one in before.values()} | {one.device for one in now.values()}
    return "" if len(devices) < 2 else f"computed by {' and by '.join(sorted(devices))}"


def first_difference(
    before: Chain, now: Chain, names: Mapping[int, Sequence[str]]
) -> Difference | None:
    """Return the first difference among the digests that both have; ``names`` are those of each
    rank's tensors, in the order of their digests."""
    inexact = bool(bounds_of(before, now))
    for step, rank in sorted(before.keys() & now.keys()):
        one, other = before[step, rank], now[step, rank]
        what = _place(one, other)
        what = what or (_values(one, other) if inexact else _bits(one, other, names.get(rank, ())))
        if what:
            return Difference(step, rank, what)
    return None


def _place(one: StateDigest, other: StateDigest) -> str:
    if one.order != other.order:
        return "the data, or the order of its samples"
    before, now = (one.epoch, one.sample_start_index), (other.epoch, other.sample_start_index)
    if before != now:
        return f"the samples: epoch {before[0]}, sample {before[1]}, and now {now[0]}, {now[1]}"
    return ""


def _bits(one: StateDigest, other: StateDigest, names: Sequence[str]) -> str:
    if (one.parameters, one.optimizer) != (other.parameters, other.optimizer):
        return _tensor(one, other, names)
    return "" if one.loss == other.loss else f"the loss: {one.loss}, and now {other.loss}"


def _tensor(one: StateDigest, other: StateDigest, names: Sequence[str]) -> str:
    part = "parameters" if one.parameters != other.parameters else "the optimizer's state"
    before, now = _digests(one), _digests(other)
    if len(before) != len(now) or not before:
        return part
    pairs = zip(before, now, strict=True)
    different = [index for index, (was, found) in enumerate(pairs) if was != found]
    if not different or different[0] >= len(names):
        return part
    more = f" and {len(different) - 1} more tensors" if len(different) > 1 else ""
    return f"{names[different[0]]}{more}"


def _digests(one: StateDigest) -> list[bytes]:
    data = base64.b64decode(one.tensors)
    return [data[at : at + _SHORT_BYTES] for at in range(0, len(data), _SHORT_BYTES)]


def _values(one: StateDigest, other: StateDigest) -> str:
    if not math.isclose(one.norm, other.norm, rel_tol=NORM_TOLERANCE):
        return f"the parameters' norm: {one.norm:.6g}, and now {other.norm:.6g}"
    before, now = one.loss, other.loss
    if before is None or now is None:
        return ""
    is_close = math.isclose(before, now, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE)
    return "" if is_close else f"the loss: {before:.6g}, and now {now:.6g}"
