"""Requests of ``elastic-ckpt save``: one file each, so that they work from any host."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file


def ask_for_save(job: JobDirectory) -> Path:
    """Create a request, which the running supervisor of the head serves."""
    job.require(job.requests)
    path = job.requests / f"save-{secrets.token_hex(4)}"
    os.close(create_file(path))  # the name is the request
    return path


def waiting_requests(job: JobDirectory) -> frozenset[str]:
    """Return the names of all requests. Any node may look; only the one that serves removes."""
    return frozenset(path.name for path in job.found(job.requests, "save-*"))


def remove_requests(job: JobDirectory, names: Collection[str]) -> None:
    """Remove requests that are being served."""
    for path in job.found(job.requests, "save-*"):  # nothing if it has become a link meanwhile
        if path.name in names:
            with contextlib.suppress(OSError):
                path.unlink()
