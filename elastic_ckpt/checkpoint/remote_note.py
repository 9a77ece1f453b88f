"""The newest checkpoint in the bucket of several nodes, noted in the head's own directory: for
``status`` and its like, which ask no bucket."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic

_MAX_BYTES: Final = 2 * MAX_MANIFEST_BYTES


class _Note(msgspec.Struct, frozen=True):
    url: str
    manifest: str


def note_remote(job: JobDirectory, url: str, manifest: Manifest) -> None:
    """Note that this is the newest one of a job in a bucket; OSError if that cannot be written."""
    note = _Note(url, encode(manifest).decode())
    write_atomic(_path(job), msgspec.json.encode(note))


def forget_remote(job: JobDirectory) -> None:
    """Note that there is none, or that the directory has the job's checkpoints."""
    _path(job).unlink(missing_ok=True)


def read_remote(job: JobDirectory) -> tuple[str, Manifest] | None:
    """Return the job's URL and the newest manifest; None without a note that can be read."""
    if not job.owns(job.control):
        return None
    try:
        note = msgspec.json.decode(read_bounded(_path(job), _MAX_BYTES), type=_Note)
        return note.url, decode_manifest(note.manifest.encode())
    except (OSError, ValueError, msgspec.MsgspecError, CheckpointError, RecursionError):
        return None


def noted_seconds_ago(job: JobDirectory) -> float | None:
    """Return the age of the note; None without one."""
    try:
        return max(0.0, time.time() - _path(job).lstat().st_mtime)
    except OSError:
        return None


def _path(job: JobDirectory) -> Path:
    return job.control / "remote.json"
