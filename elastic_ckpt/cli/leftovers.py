"""What runs left in this machine's memory and no disk has, as ``status`` and ``doctor`` show it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.memory.leftover import leftovers
from elastic_ckpt.checkpoint.memory.room import is_memory
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.util.text import encodable, printable
from elastic_ckpt.util.units import human_bytes, human_duration

MEMORY: Final = Path("/dev/shm")


class LeftoverView(msgspec.Struct, frozen=True):
    """A memory tier that no run uses, with a checkpoint, or a node's share of one, that no disk has
    as far as this machine knows.

    Attributes:
        job: the job's directory, which may be unmounted; empty if unknown.
        step: None if this version cannot read the checkpoint.
        command: what deletes it.
        is_share: it is what one of several nodes had of a checkpoint.
    """

    path: str
    job: str
    step: int | None
    bytes: int
    age_seconds: float
    command: str
    is_share: bool = False

    @property
    def text(self) -> str:
        """What it is, in one line."""
        what = "a checkpoint" if self.step is None else f"step {self.step}"
        whose = printable(self.job) if self.job else "an unknown job"
        size, age = human_bytes(self.bytes), human_duration(self.age_seconds)
        if self.is_share:
            return f"a node's share of {what} of {whose} is in memory: {size}, {age} old"
        return f"{what} of {whose} is in memory only: {size}, {age} old"

    @property
    def todo(self) -> str:
        """What to do about it, in one line."""
        if self.is_share:
            return (
                "of use only if that job starts again on all the nodes that have the rest, before "
                f"it saves anything newer; else delete it: {self.command}"
            )
        rerun = "rerun that job on this machine to bring it to its disk, or " if self.job else ""
        return f"{rerun}delete it: {self.command}"


def view_leftovers(records: Iterable[NodeRecord] = (), place: Path = MEMORY) -> list[LeftoverView]:
    """Return what is in memory only, the largest first; looks at no job's directory. ``records``
    are those of a job, whose memory tiers may have been in other places."""
    places = [Path(one.memory).parent for one in records if one.memory]
    return [
        LeftoverView(
            encodable(str(one.tier)),
            encodable(one.job),
            one.step,
            one.bytes,
            one.age_seconds,
            f"elastic-ckpt prune --memory {one.tier}",
            one.is_share,
        )
        for one in leftovers([place, *filter(is_memory, places)])
    ]
