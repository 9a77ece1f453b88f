"""Requests from ``elastic-ckpt save``: a file each, so that they work from any host."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file


def ask_for_save(job: JobDirectory) -> Path:
    """Leave a request; the running supervisor takes it up within its tick."""
    job.require(job.requests)
    path = job.requests / f"save-{secrets.token_hex(4)}"
    os.close(create_file(path))  # the name says it all
    return path


def take_requests(job: JobDirectory) -> bool:
    """Whether there was a request; takes all of them."""
    found = False
    for path in job.found(job.requests, "save-*"):
        with contextlib.suppress(OSError):
            path.unlink()  # what cannot be taken would be asked for again and again
            found = True
    return found
