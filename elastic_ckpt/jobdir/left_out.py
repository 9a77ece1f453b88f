"""The nodes that a job leaves out: one file each. To delete one is to let its node in again, from
any host, and whether the job runs or not."""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_record
from elastic_ckpt.util.text import printable

MAX_NOTE_BYTES: Final = 64 * 1024
_MAX_NODES: Final = 4096
_SUFFIX: Final = ".json"


class LeftOutNode(msgspec.Struct, frozen=True):
    """A node that is left out.

    Attributes:
        node: its name.
        why: one line.
        since: seconds since the epoch.
        failed_check: because of its own check, so that it is let in once that passes.
        url: the bucket that has the same note, for nodes that share no directory; else empty.
    """

    node: str
    why: str
    since: float
    failed_check: bool = False
    url: str = ""


def encode_note(node: LeftOutNode) -> bytes:
    """Return a note's bytes."""
    return msgspec.json.encode(node)


def decode_note(data: bytes) -> LeftOutNode | None:
    """Return a note from outside, with safe text; None if it is invalid."""
    try:
        found = msgspec.json.decode(data, type=LeftOutNode)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return replace(found, node=printable(found.node), why=printable(found.why))


def names_left_out(job: JobDirectory) -> set[str]:
    """Return the names of all nodes that are left out; OSError without the job directory."""
    os.lstat(job.control)
    if not job.owns(job.left_out):
        return set()
    names = (one.name for one in islice(os.scandir(job.left_out), _MAX_NODES))
    return {one.removesuffix(_SUFFIX) for one in names if not one.startswith(".")}


def read_left_out(job: JobDirectory) -> list[LeftOutNode]:
    """Return the notes that can be read, by name."""
    found: list[LeftOutNode] = []
    with contextlib.suppress(OSError):
        for name in sorted(names_left_out(job)):
            with contextlib.suppress(OSError):
                note = decode_note(read_bounded(_path(job, name), MAX_NOTE_BYTES))
                found += [note] if note is not None and note.node == name else []
    return found


def write_left_out(job: JobDirectory, node: LeftOutNode) -> None:
    """Note that a node is left out; OSError if that cannot be written."""
    try:
        job.require(job.left_out)
    except ElasticCkptError as error:
        raise OSError(str(error)) from None
    write_record(_path(job, node.node), encode_note(node))


def remove_left_out(job: JobDirectory, name: str) -> None:
    """Let a node in again; nothing if it is not left out."""
    if job.owns(job.left_out):
        _path(job, name).unlink(missing_ok=True)


def _path(job: JobDirectory, name: str) -> Path:
    return job.left_out / f"{name}{_SUFFIX}"
