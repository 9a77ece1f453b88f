"""The learned durations of saves, kept from run to run."""

from __future__ import annotations

import contextlib
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.util.files import read_bounded, write_atomic

_MAX_BYTES: Final = 64 * 1024


def read_predictor(job: JobDirectory) -> Predictor:
    """Return what earlier runs learned; nothing if the file is missing or invalid."""
    try:
        if job.owns(job.control):
            data = read_bounded(job.prediction, _MAX_BYTES)
            return msgspec.json.decode(data, type=Predictor).checked()
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return Predictor()


def write_predictor(job: JobDirectory, predictor: Predictor) -> None:
    """Keep it for the next run; for the holder of the job's lock.

    If the disk refuses, the next run only starts without experience.
    """
    with contextlib.suppress(OSError):
        if job.owns(job.control):
            write_atomic(job.prediction, msgspec.json.encode(predictor))
