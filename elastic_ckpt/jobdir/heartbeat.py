"""A node's position, written every few seconds for hosts that only see the shared directory."""

from __future__ import annotations

import os
import time
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic

BEAT_SECONDS: Final = 10.0

SILENT_SECONDS: Final = 60.0
"""A supervisor without a heartbeat for this long may be dead."""

_MAX_BYTES: Final = 4096
_ROOM: Final = 192
"""Bytes of each heartbeat, filled with spaces: one is written over another."""

_MAX_COUNT: Final = 10**12


class Heartbeat(msgspec.Struct, frozen=True):
    """The position of the slowest rank; ``wall`` is seconds since the epoch."""

    wall: float
    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0

    @property
    def age_seconds(self) -> float:
        """Age by this host's clock; clocks differ, and a heartbeat from the future has age 0."""
        return max(0.0, time.time() - self.wall)


def write_heartbeat(job: JobDirectory, node: str, beat: Heartbeat) -> None:
    """Replace the node's heartbeat, whatever is there.

    Raises:
        OSError: the disk refuses.
    """
    write_atomic(job.heartbeat(node), _encode(beat))


def renew_heartbeat(job: JobDirectory, node: str, beat: Heartbeat) -> None:
    """Write over the heartbeat that this process has written; raises as :func:`write_heartbeat`.

    Three calls, and no fsync: after a power cut no supervisor beats any more. Closing the file
    sends it to a file server.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(job.heartbeat(node), flags)
        try:
            os.pwrite(fd, _encode(beat), 0)
        finally:
            os.close(fd)
    except OSError:  # it was removed, for example
        write_heartbeat(job, node, beat)


def _encode(beat: Heartbeat) -> bytes:
    return msgspec.json.encode(beat).ljust(_ROOM)


def read_heartbeat(job: JobDirectory, node: str) -> Heartbeat | None:
    """Return the node's newest heartbeat; None if it is missing or invalid.

    ``node`` may come from a record that another user wrote.
    """
    if os.sep in node or not job.owns(job.nodes):
        return None
    try:
        data = read_bounded(job.heartbeat(node), _MAX_BYTES)
        found = msgspec.json.decode(data, type=Heartbeat)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    counts = (found.epoch, found.step, found.sample_start_index)
    sane = min(counts) >= 0 and max(counts) < _MAX_COUNT and 0 <= found.wall < _MAX_COUNT
    return found if sane else None
