"""What a script announces about its own checkpoints, for a run that was told nothing of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import OwnSaves, parse_complete_when
from elastic_ckpt.util.files import read_bounded, write_atomic

_MAX_BYTES: Final = 64 * 1024


class _Announced(msgspec.Struct, frozen=True):
    watch: tuple[str, ...]
    complete_when: str


def announce(job: JobDirectory, pattern: str, complete_when: str) -> None:
    """Have the job's runs, this one and later ones, seal what matches an absolute pattern.

    Args:
        complete_when: as the option.

    Raises:
        OSError: the job directory cannot be written.
    """
    job.require(job.own_seals)
    said = _Announced((pattern,), complete_when)
    if _read(job) != said:
        write_atomic(_path(job), msgspec.json.encode(said))


def announced(job: JobDirectory) -> OwnSaves:
    """Return what was announced; nothing to watch if nothing was, if it is not
    readable, or if another user wrote it."""
    said = _read(job)
    with contextlib.suppress(UsageError):
        if said is not None and all(one.startswith("/") for one in said.watch):
            return OwnSaves(said.watch, parse_complete_when(said.complete_when))
    return OwnSaves()


def _path(job: JobDirectory) -> Path:
    return job.own_seals / "announced.json"


def _read(job: JobDirectory) -> _Announced | None:
    if job.owns(job.own_seals):
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
            # Another user's word must not have this user's files moved.
            if os.lstat(_path(job)).st_uid == os.geteuid():
                return msgspec.json.decode(read_bounded(_path(job), _MAX_BYTES), type=_Announced)
    return None
