"""Retention while a job runs: behind each save, in a thread of whoever sealed it on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.util.progress import in_lines
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.checkpoint.prune import prune

_POLL_SECONDS: Final = 0.05
_PATIENCE_SECONDS: Final = 5.0
_FINISH_SECONDS: Final = 600.0


class Retainer:
    """Deletes what the rule lets go; the training does not wait for it.

    The process may end at any moment of it: what was renamed away is deleted at the next start.

    Attributes:
        rule: what to keep; the default keeps everything.
    """

    def __init__(self, job: JobDirectory, journal: Journal, say: Callable[[str], None]) -> None:
        self.rule = Retention()
        self._job = job
        self._journal = journal
        self._say = say
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()
        self._due = False
        self._works = False

    def after_save(self) -> None:
        """Begin; if the last time is still under way, once more behind it."""
        if not self.rule:
            return
        with self._guard:
            self._due = True
            if self._works and self._thread is not None and self._thread.is_alive():
                return
            self._works = True
        self._thread = threading.Thread(target=self._work, name="retention", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """Do it now, and return when it is done.

        What is under way is waited for, but not for long: a deadline may be near, and two passes
        do not disturb each other.
        """
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        if self.rule:
            self._prune()

    def finish(self, hurry: Callable[[], bool]) -> None:
        """Wait for what is under way, because nothing follows that would do it; but not for ever.

        Args:
            hurry: asked again and again; True leaves it undone.
        """
        limit = time.monotonic() + _FINISH_SECONDS
        while self._thread is not None and self._thread.is_alive() and not hurry():
            if time.monotonic() > limit:
                self._say(f"deleting old checkpoints takes over {_FINISH_SECONDS:.0f} s: left")
                return
            self._thread.join(_POLL_SECONDS)

    def _work(self) -> None:
        while self._take():
            self._prune()

    def _take(self) -> bool:
        with self._guard:
            self._works, self._due = self._due, False
            return self._works

    def _prune(self) -> None:
        try:
            done = prune(self._job, self.rule, watch=in_lines(self._say))
        except (OSError, RuntimeError) as error:  # RuntimeError: Python ends, and hashing with it
            self._journal.write("prune_failed", error=str(error))
            return
        for one in done:
            if one.failed:
                self._journal.write("prune_failed", path=str(one.path), error=one.why)
            elif not one.keep:
                self._journal.write("pruned", path=str(one.path), step=one.step, bytes=one.bytes)
