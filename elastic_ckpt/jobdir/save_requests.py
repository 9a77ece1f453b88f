"""Requests of ``elastic-ckpt save``: one file each, so that they work from any host."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Final

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


LISTING_SECONDS: Final = 5.0
"""How often the requests are listed although nothing seems to have changed: a network file system
may remember a directory's time for some seconds, and a time may not tell two changes apart."""


class RequestWatch:
    """Looks for requests with one system call while there are no new ones."""

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        self._stamp: tuple[int, int] | None = None
        self._listed = -LISTING_SECONDS
        self._found: frozenset[str] = frozenset()

    def look(self, now: float) -> frozenset[str]:
        """Return as :func:`waiting_requests`; ``now`` is in monotonic seconds."""
        try:
            status = os.lstat(self._job.requests)
            stamp = (status.st_ino, status.st_mtime_ns)
        except OSError:
            stamp = None
        if stamp != self._stamp or now >= self._listed + LISTING_SECONDS:
            self._stamp, self._listed = stamp, now  # before the listing: what comes then changes it
            self._found = waiting_requests(self._job)
        return self._found


def remove_requests(job: JobDirectory, names: Collection[str]) -> None:
    """Remove requests that are being served."""
    for path in job.found(job.requests, "save-*"):  # nothing if it has become a link meanwhile
        if path.name in names:
            with contextlib.suppress(OSError):
                path.unlink()
