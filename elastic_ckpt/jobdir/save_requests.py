"""Requests of ``elastic-ckpt save``: one file each, so that they work from any host."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Final

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.change_bell import ChangeBell
from elastic_ckpt.util.directory_stamp import Stamp, stamp_of
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


POLL_SECONDS: Final = 1.0
"""How often the directory's stamp is read, for requests from other hosts. One from this host rings
a bell."""

SETTLED_SECONDS: Final = 5.0
"""Age from which a stamp tells each later change: the clock of a file system may tick slowly."""

LISTING_SECONDS: Final = 60.0
"""How often the requests are listed although the stamp stays: some file systems have no times."""

_EARLY_SECONDS: Final = 0.25
"""A look that comes this early counts as the next one: looks come at intervals of their own."""


class RequestWatch:
    """Looks for requests with at most one system call while there are no new ones."""

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        self._bell = ChangeBell(job.requests)
        self._stamp: Stamp | None = None
        self._changed = -SETTLED_SECONDS
        self._listed = -LISTING_SECONDS
        self._looked = -POLL_SECONDS
        self._found: frozenset[str] = frozenset()

    def look(self, now: float) -> frozenset[str]:
        """Return as :func:`waiting_requests`, or what that returned while nothing has changed;
        ``now`` is in monotonic seconds."""
        if not self._bell.rang() and now < self._looked + POLL_SECONDS - _EARLY_SECONDS:
            return self._found
        self._looked = now
        try:
            stamp = stamp_of(self._job.requests)
        except OSError:
            stamp = None
        if stamp != self._stamp:
            self._stamp, self._changed = stamp, now
            self._bell.hang()  # it may be another directory
        if self._listed < self._changed + SETTLED_SECONDS or now >= self._listed + LISTING_SECONDS:
            self._listed = now
            self._found = waiting_requests(self._job)
        return self._found

    def close(self) -> None:
        """Give up what it holds."""
        self._bell.close()


def remove_requests(job: JobDirectory, names: Collection[str]) -> None:
    """Remove requests that are being served."""
    for path in job.found(job.requests, "save-*"):  # nothing if it has become a link meanwhile
        if path.name in names:
            with contextlib.suppress(OSError):
                path.unlink()
