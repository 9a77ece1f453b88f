"""Whether a job's directory is still the one in which the run started.

While a job runs, its directory may be moved or deleted, and its disk unmounted. Then the path leads
to nothing, or to another directory: an empty mount point. A directory that was moved or copied has
the records of runs that were somewhere else.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.answering import require_answer
from elastic_ckpt.jobdir.node_record import NodeRecord, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import write_shared

_ANSWER_SECONDS: Final = 2.0


def moved_from(job: JobDirectory, record: NodeRecord | None) -> str:
    """Return the directory of a record's run, if this one was moved or copied from there since;
    else ""."""
    place = record.command.place if record is not None and record.command is not None else ""
    if place in ("", str(job.home)):
        return ""
    with contextlib.suppress(OSError, DirectoryUnusable):
        require_answer(Path(place), _ANSWER_SECONDS)
        if Path(place).samefile(job.home):
            return ""
    return place


def record_at(place: str, record: NodeRecord) -> NodeRecord | None:
    """Return what the directory at ``place`` has of a record's run; None for nothing."""
    with contextlib.suppress(OSError, DirectoryUnusable):
        require_answer(Path(place), _ANSWER_SECONDS)
        found = read_record(JobDirectory(Path(place)).node_record(record.node))
        return found if found is not None and found.run_id == record.run_id else None
    return None


class JobPlace:
    """The directory in which a run started.

    Attributes:
        is_original: whether the path led to it when last checked.
    """

    def __init__(self, job: JobDirectory) -> None:
        """Remember the directory; it has to be prepared.

        Raises:
            OSError: it cannot be read.
        """
        self._job = job
        self._identity = _identity(job)
        self._first = self._now = os.stat(job.root).st_ino
        self.is_original = True

    def check(self) -> str:
        """Return what happened to the directory since the last call, in one line; else "".

        A mount that comes back may have another device, so inode and identity are compared.

        Raises:
            OSError: the storage does not answer.
        """
        root = self._job.root
        try:
            inode = os.stat(root).st_ino
        except (FileNotFoundError, NotADirectoryError):
            inode = 0
        known = _identity(self._job)
        self._identity = self._identity or known
        if inode == self._now and (known == self._identity or not inode):
            return ""
        if inode == self._first == self._now:
            return f"{self._job.control} was deleted while the job runs: it starts anew there"
        was_original = self.is_original
        self._now, self.is_original = inode, inode == self._first and known == self._identity
        if self.is_original:
            return f"{root} is again the directory in which this run started"
        if not was_original and inode:
            return ""  # it was reported, and has been made again since
        if inode and known == self._identity:
            return (
                f"{root} was replaced while the job runs, by a copy of its own: saves continue in "
                "the copy; what was saved before and is not in it is wherever the old one is now"
            )
        return (
            f"{root} was moved, deleted or unmounted while the job runs: saves continue in a new "
            "directory there, or in memory until its disk is mounted; what was saved before is "
            "wherever the old one is now"
        )

    def restore(self) -> None:
        """Make the directory again if it is missing, as that of the same job.

        Raises:
            DirectoryUnusable: it cannot be made.
            OSError: the storage failed.
        """
        self._job.prepare()
        if self._identity and _identity(self._job) != self._identity:
            # Other nodes do the same.
            path = self._job.control / "identity"
            write_shared(path, self._identity.encode(), replaces=True)
        self._now = os.stat(self._job.root).st_ino


def _identity(job: JobDirectory) -> str:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return job.known_identity()
    return ""
