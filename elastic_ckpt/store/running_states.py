"""``running_states.json``: the place in the data as ColossalAI's own scripts write it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_NUMBER
from elastic_ckpt.util.text import printable
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded

NAME: Final = "running_states.json"
_MAX_BYTES: Final = 64 * 1024


class RunningStates(msgspec.Struct, frozen=True):
    """In the seed's keys and units; keys that are not known are ignored."""

    epoch: int
    step: int
    sample_start_index: int


def decode_running_states(data: bytes) -> RunningStates:
    """Decode and check.

    Raises:
        CheckpointRejected: it is not of this shape.
    """
    try:
        found = msgspec.json.decode(data, type=RunningStates)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"{NAME} is not readable: {printable(str(error), 200)}") from None
    values = (found.epoch, found.step, found.sample_start_index)
    if min(values) < 0 or max(values) > MAX_NUMBER:
        raise CheckpointRejected(f"{NAME} holds a position that no job has")
    return found


def read_running_states(checkpoint: Path) -> RunningStates:
    """Those of a checkpoint.

    Raises:
        CheckpointRejected: there are none, or they are not to be trusted.
        OSError: the file could not be read.
    """
    try:
        return decode_running_states(read_bounded(checkpoint / NAME, _MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointRejected(f"{NAME} is missing") from None
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL, errno.ELOOP, errno.ENXIO):
            raise CheckpointRejected(f"{NAME}: {error.strerror}") from None
        raise
