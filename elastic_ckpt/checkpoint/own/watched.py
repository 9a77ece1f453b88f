"""Which patterns a job has watched before a launch already, and on which boot of which machine.

What matches a new pattern was there before any run of this job could tear it: it is taken over.
What matches a known one and has no seal may be what a killed script left. Since another boot it may
also be what a power cut left: names and sizes on the disk, and not the bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.node_record import boot_id
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic

_MAX_BYTES: Final = 1024 * 1024


class Watched(msgspec.Struct, frozen=True):
    """What the last launch of a job watched.

    Attributes:
        patterns: absolute.
        boot: of the machine that it was made on; empty if unknown.
    """

    patterns: tuple[str, ...] = ()
    boot: str = ""

    @property
    def rebooted(self) -> bool:
        """Whether the machine went down since, or this is another one."""
        return bool(self.patterns) and self.boot != _boot()


def watched_before(job: JobDirectory) -> Watched:
    """Return what the last launch watched; nothing if that cannot be read."""
    if job.owns(job.own_seals):
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
            data = read_bounded(_path(job), _MAX_BYTES)
            found = msgspec.json.decode(data, type=Watched | tuple[str, ...])
            return found if isinstance(found, Watched) else Watched(found)  # of 0.1: a list
    return Watched()


def note_watched(job: JobDirectory, patterns: Iterable[str]) -> None:
    """Remember patterns, as absolute paths, for what is written from now on. OSError if the job
    directory cannot be written."""
    before = watched_before(job)
    noted = Watched(tuple(sorted({*before.patterns, *patterns})), _boot())
    if noted != before:
        job.require(job.own_seals)
        write_atomic(_path(job), msgspec.json.encode(noted))


def _boot() -> str:
    return boot_id().partition(" ")[0]  # a container that starts anew finds what was written


def _path(job: JobDirectory) -> Path:
    return job.own_seals / "watched.json"
