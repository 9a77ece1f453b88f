"""Copies for people: what happened to the job, in its bucket, for when the machine is gone.

In a thread of its own, so that no seal and no end of a run waits for it. Nothing rests on what it
writes: an object that is late, old or missing is a gap in a report.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import msgspec
import xxhash

from elastic_ckpt.checkpoint.bucket.keys import HISTORY, HistoryKey
from elastic_ckpt.checkpoint.bucket.ownership import KEPT_CLAIMS
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import rank_files
from elastic_ckpt.policy.pace import Throttle
from elastic_ckpt.util.files import read_tail
from elastic_ckpt.util.jsonl import older

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 60.0
"""Between two rounds, but for the last one of a run."""

JOURNAL_BYTES: Final = 4 * 1024 * 1024
"""The newest of all nodes' journals, in all."""

LOG_BYTES: Final = 1024 * 1024
"""The end of what a rank printed in the newest incarnation."""

ALL_LOGS_BYTES: Final = 16 * 1024 * 1024
"""The same of all ranks: of many, each has less."""

MAX_NODES: Final = 64
MAX_RANKS: Final = 256

_POLL_SECONDS: Final = 0.2


class HistoryCopy:
    """See the module. The mirror's thread offers, the loop's closes."""

    def __init__(self, job: JobDirectory, store: Bucket, rate: float) -> None:
        """
        Args:
            rate: bytes per second at most; 0 for no limit.
        """
        self._job = job
        self._store = store
        self._rate = rate
        self._claim = 0
        self._due = 0.0
        self._bell, self._ends = threading.Event(), threading.Event()
        self._sent: dict[str, int] = {}  # a digest of what is there, by key
        self._thread: threading.Thread | None = None

    def offer(self, claim: int) -> None:
        """Make a round soon for the owner of this number, unless one was just made."""
        self._claim = claim
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="history", daemon=True)
            self._thread.start()
        if time.monotonic() >= self._due:
            self._bell.set()

    def close(self, left: Callable[[], float], ping: Callable[[], None]) -> None:
        """Make the last round; give it up when ``left`` returns no seconds."""
        if self._thread is None:
            return
        self._ends.set()
        self._bell.set()
        while self._thread.is_alive() and left() > 0:
            ping()
            self._thread.join(_POLL_SECONDS)

    def _work(self) -> None:
        is_first = True
        while True:
            self._bell.wait()
            self._bell.clear()
            is_last = self._ends.is_set()
            self._due = time.monotonic() + EVERY_SECONDS
            try:
                self._round()
                if is_first:
                    self._forget()
                    is_first = False
            except (ElasticCkptError, OSError) as error:  # the next round tries again
                log.info("the history was not copied: %s", error)
            if is_last:
                return

    def _round(self) -> None:
        throttle = Throttle(self._rate, time.monotonic())
        keys = set()
        for kind, name, data in contents(self._job):
            key = HistoryKey(self._claim, kind, name).key
            digest = xxhash.xxh3_64_intdigest(data)
            keys.add(key)
            if self._sent.get(key) != digest:
                self._store.put(key, data)
                self._sent[key] = digest
                seconds = throttle.pause(len(data), time.monotonic(), slowed=False)
                self._ends.wait(seconds)
        gone = [key for key in self._sent if key not in keys]  # of earlier incarnations
        for key in gone:
            del self._sent[key]
        if gone:
            self._store.delete(gone)

    def _forget(self) -> None:
        """Delete the copies of owners whose records are deleted, too."""
        old = [
            one.key
            for page in self._store.listing(HISTORY)
            for one in page
            if (found := HistoryKey.parse(one.key)) and found.claim <= self._claim - KEPT_CLAIMS
        ]
        self._store.delete(old)


def contents(job: JobDirectory) -> Iterator[tuple[str, str, bytes]]:
    """Yield kind, name and bytes of each copy of a job directory, as ``HistoryKey`` has them. Of
    the records the command is left out: a script's arguments may hold a secret."""
    for record in islice(job_records(job), MAX_NODES):
        shown = msgspec.structs.replace(record, command=None, board="", memory="")
        yield "nodes", record.node, msgspec.json.encode(shown)
    paths = sorted(islice(job.found(job.control / "journal", "*.jsonl"), MAX_NODES))
    for path in paths:
        budget = JOURNAL_BYTES // len(paths)
        data = read_tail(path, budget)
        if len(data) < budget:
            data = read_tail(older(path), budget - len(data)) + data
        whole = len(data) < budget
        with contextlib.suppress(ValueError):
            data = data if whole else data[data.index(b"\n") + 1 :]
        yield "journal", path.name.removesuffix(".jsonl"), data
    every = rank_files(job, ".log")
    newest = max((incarnation for incarnation, _, _ in every), default=0)
    logs = [found for found in every if found[0] == newest][:MAX_RANKS]
    for incarnation, rank, path in logs:
        budget = min(LOG_BYTES, ALL_LOGS_BYTES // len(logs))
        data = read_tail(path, budget)
        if len(data) < budget:
            data = read_tail(older(path), budget - len(data)) + data
        yield "logs", f"{incarnation:06d}-{rank:05d}", data
