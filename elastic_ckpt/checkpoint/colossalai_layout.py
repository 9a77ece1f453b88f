"""What an index of ColossalAI's layout speaks of."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, MAX_NUMBER, check_path
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable


@dataclass(frozen=True)
class Index:
    """One index file.

    Attributes:
        entries: the names of parameters, or the numbers of an optimizer's.
        files: the files' names, relative to the index; none of them leads out.
    """

    entries: frozenset[str]
    files: list[str]


def read_index(path: Path) -> Index:
    """Read an index; CheckpointRejected if it is not readable, or names a path outside."""
    try:
        index = _decode(json.loads(read_bounded(path, MAX_MANIFEST_BYTES)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointRejected(f"{path.parent.name}/{path.name} is not readable") from None
    for name in index.files:
        check_path(name)
    return index


def _decode(content: Any) -> Index:
    if not isinstance(content, dict):
        return Index(frozenset(), [])
    entries = content.get("weight_map", {})
    names = [*entries.values()]
    group = content.get("metadata", {}).get("param_groups")
    if group is not None:
        names.append(group)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a file's name is not text")
    return Index(frozenset(entries), names)


NAME: Final = "running_states.json"
_MAX_BYTES: Final = 64 * 1024


class RunningStates(msgspec.Struct, frozen=True):
    """In the seed's keys and units; keys that are not known are ignored."""

    epoch: int
    step: int
    sample_start_index: int


def decode_running_states(data: bytes) -> RunningStates:
    """Decode and check; CheckpointRejected if it is not of this shape."""
    try:
        found = msgspec.json.decode(data, type=RunningStates)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"{NAME} is not readable: {printable(str(error), 200)}") from None
    values = (found.epoch, found.step, found.sample_start_index)
    if min(values) < 0 or max(values) > MAX_NUMBER:
        raise CheckpointRejected(f"{NAME} holds a position that no job has")
    return found


def read_running_states(checkpoint: Path) -> RunningStates:
    """Read those of a checkpoint; CheckpointRejected if they are missing or invalid, OSError if the
    file could not be read."""
    try:
        return decode_running_states(read_bounded(checkpoint / NAME, _MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointRejected(f"{NAME} is missing") from None
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL, errno.ELOOP, errno.ENXIO):
            raise CheckpointRejected(f"{NAME}: {error.strerror}") from None
        raise
