"""Which patterns a job has watched before a launch already.

What matches a new pattern was there before any run of this job could tear it: it is taken over.
What matches a known one and has no seal may be what a killed script left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic

_MAX_BYTES: Final = 1024 * 1024


def watched_before(job: JobDirectory) -> Set[str]:
    """Return the patterns, as absolute paths; nothing if they cannot be read."""
    if job.owns(job.own_seals):
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
            return msgspec.json.decode(read_bounded(_path(job), _MAX_BYTES), type=set[str])
    return set()


def note_watched(job: JobDirectory, patterns: Iterable[str]) -> None:
    """Remember patterns, as absolute paths. OSError if the job directory cannot be written."""
    before = watched_before(job)
    every = before | set(patterns)
    if every != before:
        job.require(job.own_seals)
        write_atomic(_path(job), msgspec.json.encode(sorted(every)))


def _path(job: JobDirectory) -> Path:
    return job.own_seals / "watched.json"
