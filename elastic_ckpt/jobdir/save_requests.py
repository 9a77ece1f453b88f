"""Requests of ``elastic-ckpt save``: one file each, so that they work from any host."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file


def ask_for_save(job: JobDirectory) -> Path:
    """Create a request, which the running supervisor serves at its next tick."""
    job.require(job.requests)
    path = job.requests / f"save-{secrets.token_hex(4)}"
    os.close(create_file(path))  # the name is the request
    return path


def take_requests(job: JobDirectory) -> bool:
    """Remove all requests; whether there was any."""
    found = False
    for path in job.found(job.requests, "save-*"):
        with contextlib.suppress(OSError):
            path.unlink()  # a request that cannot be removed would be served again and again
            found = True
    return found
