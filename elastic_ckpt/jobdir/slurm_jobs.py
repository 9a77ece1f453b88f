"""The directories of SLURM jobs: one small file each in the user's state directory.

With a shared home directory ``elastic-ckpt status JOBID`` so works on a login node, also after
the job has left the queue.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.util.files import read_bounded, write_atomic

MAX_KEPT: Final = 1000
_NUMBER: Final = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})?", re.ASCII)


def is_job_number(text: str) -> bool:
    """Whether the text is a job number: ``1234``, or ``1234_5`` for a task of an array."""
    return _NUMBER.fullmatch(text) is not None


def remember_job(number: str, directory: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Record a job's directory; if that fails, ``status`` needs the directory instead."""
    place = _place(environ)
    if not is_job_number(number) or place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(place / number, os.fsencode(directory))
        kept = sorted(place.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[:-MAX_KEPT]:
            old.unlink(missing_ok=True)


def find_job(number: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return a job's directory; None if it is unknown."""
    place = _place(environ)
    if not is_job_number(number) or place is None:
        return None
    try:
        return Path(os.fsdecode(read_bounded(place / number, 4096)))
    except OSError:
        return None


def _place(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("HOME")
    state = environ.get("XDG_STATE_HOME") or (f"{home}/.local/state" if home else "")
    return Path(state) / "elastic-ckpt" / "slurm" if state.startswith("/") else None
