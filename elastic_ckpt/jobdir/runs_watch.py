"""Whether the directory of the run records is as it was, found out by one call with each beat."""

from __future__ import annotations

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.directory_stamp import Stamp, stamp_of


class RunsWatch:
    """Saves a run the full check: no newer run has come, its own record is there, and the path
    still leads to the same directory on the same mount, as long as the stamp stays.

    A full check counts only for a stamp that is at least one beat old: a file system's clock may
    not tell two changes in the same tick apart.
    """

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        self._now: Stamp | None = None
        self._checked: Stamp | None = None  # as of the newest full check
        self._calm: Stamp | None = None  # of a full check that was at least one beat after a change

    def is_calm(self) -> bool:
        """Look; return whether nothing has changed since the last full check. If not, the caller
        makes one and then calls :meth:`checked`."""
        try:
            self._now = stamp_of(self._job.runs)
        except OSError:  # the full check says why
            self._now = None
        return self._now is not None and self._now == self._calm

    def checked(self) -> None:
        """Note that a full check has found nothing since the last look."""
        self._calm = self._now if self._now == self._checked else None
        self._checked = self._now
