"""Retention while a job runs: behind each save, in a thread of the leader's."""

from __future__ import annotations

import threading
from collections.abc import Callable

from elastic_ckpt.core.progress import in_lines
from elastic_ckpt.core.retention import Retention
from elastic_ckpt.store.journal import Journal
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.prune import prune


class Retainer:
    """Deletes what the rule lets go. Leader only; the training does not wait for it.

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

    def after_save(self) -> None:
        """Begin, unless the last time is still under way: the next save will do."""
        if not self.rule or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._prune, name="retention", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """Do it now, and return when it is done."""
        if self._thread is not None:
            self._thread.join()
        if self.rule:
            self._prune()

    def _prune(self) -> None:
        try:
            done = prune(self._job, self.rule, watch=in_lines(self._say))
        except OSError as error:
            self._journal.write("prune_failed", error=str(error))
            return
        for one in done:
            if not one.keep:
                self._journal.write("pruned", path=str(one.path), step=one.step, bytes=one.bytes)
