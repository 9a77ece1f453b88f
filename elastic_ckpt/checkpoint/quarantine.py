"""Quarantine: checkpoints that failed verification, with the reason; never deleted or loaded."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import secrets
import time
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.verify import unmark
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.util.files import (
    read_bounded,
    remove_temporaries,
    sync_directory,
    write_atomic,
)
from elastic_ckpt.util.text import encodable, printable

MAX_SHOWN: Final = 1000
"""The maximum number of reasons that are read."""

_MAX_BYTES: Final = 64 * 1024
_STAMP: Final = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{12}$")


class Rejected(msgspec.Struct, frozen=True):
    """Why a checkpoint was set aside; stored next to it as ``<name>.json``."""

    path: str
    reason: str
    at: str
    line: str = ""  # what was superseded together; alone without it


def original_name(aside: Path) -> str:
    """Return the name that a checkpoint had, or has, where it was written."""
    return _STAMP.sub("", aside.name)


def is_scripts(path: Path) -> bool:
    """Return whether the script wrote a checkpoint itself, by the name that it has or had."""
    return checkpoint_key(original_name(path)) is None


def set_aside(
    job: JobDirectory,
    checkpoint: Path,
    reason: str,
    place: Path | None = None,
    name: str = "",
    line: str = "",
) -> Path:
    """Move a checkpoint to quarantine or ``place`` unless another process did it first, under
    ``name`` if it is not the directory's. DirectoryUnusable if a link stands there, OSError if it
    cannot be moved."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    place = place or job.quarantine
    job.require(place)
    target = place / f"{name or checkpoint.name}-{stamp}-{secrets.token_hex(6)}"
    record = Rejected(encodable(str(target)), encodable(reason), stamp, line)
    write_atomic(target.with_name(target.name + ".json"), msgspec.json.encode(record))
    try:
        os.rename(checkpoint, target)
    except FileNotFoundError:
        target.with_name(target.name + ".json").unlink(missing_ok=True)
        return target
    unmark(job, checkpoint)  # if it is put back, it counts as not verified
    sync_directory(place)
    sync_directory(checkpoint.parent)
    return target


def rejected(job: JobDirectory, place: Path | None = None) -> list[Rejected]:
    """Return what is in quarantine, or in another such place, oldest first; the latest of many."""
    found: list[Rejected] = []
    place = place or job.quarantine
    for path in heapq.nlargest(MAX_SHOWN, job.found(place, "*.json"), key=_changed):
        place = path.with_suffix("")
        if not os.path.lexists(place):
            continue  # killed before the move: it was not set aside after all
        try:
            record = msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=Rejected)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
            record = Rejected("", "its reason is not readable", "")
        # The job directory may have been moved since.
        why = printable(record.reason)
        found.append(Rejected(str(place), why, record.at, record.line or place.name))
    return sorted(found, key=lambda entry: (entry.at, _changed(Path(f"{entry.path}.json"))))


def _changed(path: Path) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0


def forget_unfinished(job: JobDirectory) -> None:
    """Remove reasons whose checkpoint was not moved after all, because of a kill in between. For
    the holder of the job's lock, while no process sets anything aside."""
    for place in (job.quarantine, job.superseded):
        remove_temporaries(place)
        for path in job.found(place, "*.json"):
            if not os.path.lexists(path.with_suffix("")):
                with contextlib.suppress(OSError):  # a directory is none of ours
                    path.unlink()
