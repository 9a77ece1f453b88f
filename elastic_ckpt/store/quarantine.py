"""What failed verification is set aside with its reason, never deleted, never chosen."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import msgspec

from elastic_ckpt.store.files import sync_directory, write_atomic
from elastic_ckpt.store.layout import JobDirectory


class Rejected(msgspec.Struct, frozen=True):
    """Why a checkpoint was set aside; kept beside it as ``<name>.json``."""

    path: str
    reason: str
    at: str


def set_aside(job: JobDirectory, checkpoint: Path, reason: str) -> Path:
    """Move a checkpoint into quarantine; a race that somebody else won is no error."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = job.quarantine / f"{checkpoint.name}-{stamp}-{secrets.token_hex(2)}"
    job.quarantine.mkdir(exist_ok=True)
    record = Rejected(str(target), reason, stamp)
    write_atomic(target.with_name(target.name + ".json"), msgspec.json.encode(record))
    try:
        os.rename(checkpoint, target)
    except FileNotFoundError:
        target.with_name(target.name + ".json").unlink(missing_ok=True)
        return target
    sync_directory(job.quarantine)
    sync_directory(checkpoint.parent)
    return target


def rejected(job: JobDirectory) -> list[Rejected]:
    """Everything in quarantine, oldest first."""
    found: list[Rejected] = []
    for path in sorted(job.quarantine.glob("*.json")):
        place = path.with_suffix("")
        if not os.path.lexists(place):
            continue  # killed before the move: it was not set aside after all
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Rejected)
        except (OSError, msgspec.MsgspecError):
            record = Rejected("", "its reason is not readable", "")
        # The job directory may have been moved since.
        found.append(msgspec.structs.replace(record, path=str(place)))
    return sorted(found, key=lambda entry: (entry.at, entry.path))
