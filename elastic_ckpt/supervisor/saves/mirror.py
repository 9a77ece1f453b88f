"""The mirror: copies sealed checkpoints from the disk into a bucket while the job trains.

In a thread of its own, which talks to nothing else of the run: the loop tells it that something
was sealed and asks what to show. Whatever happens to the bucket, training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from elastic_ckpt.checkpoint.bucket.catalog import newest
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim, claim_after, new_owner
from elastic_ckpt.checkpoint.bucket.retain import prune, sweep
from elastic_ckpt.checkpoint.bucket.source import in_directory
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.take import note_own, note_pending, require_step, take_for
from elastic_ckpt.checkpoint.bucket.transfer import push
from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.checkpoint.ownership.read_lock import BeingRemoved, ReadLock
from elastic_ckpt.errors import (
    BucketFailed,
    BucketRefused,
    CheckpointRejected,
    ElasticCkptError,
    RunSuperseded,
    StopAborted,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.retention_file import read_rule
from elastic_ckpt.journal.bucket_events import Mirrored, MirrorFailed
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.lease import BUCKET_BEAT_SECONDS
from elastic_ckpt.policy.pace import Pace, Throttle, drops_for_newer
from elastic_ckpt.supervisor.saves.history_copy import HistoryCopy
from elastic_ckpt.supervisor.saves.mirror_port import forever
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes

log = logging.getLogger(__name__)

_T = TypeVar("_T")

FLUSH_SECONDS: Final = 600.0
"""How long a run that has ended waits for its bucket, without a deadline."""

RETRY_SECONDS: Final = (2.0, 5.0, 15.0, 60.0)
"""Between tries of what failed; the last one from then on."""


class _Dropped(Exception):
    """What is being copied is not worth it any more: something newer is there, or time is up."""


class Mirror:
    """See ``MirrorPort``. The loop's thread calls the public methods."""

    def __init__(
        self,
        settings: RunSettings,
        store: Bucket,
        run_id: str,
        journal: Journal,
        finished: Callable[[], int],
        say: Callable[[str], None],
        wake: Callable[[], None],
        ping: Callable[[], None],
        claim: BucketClaim | None = None,
    ) -> None:
        """Start nothing yet. The settings have a mirror.

        Args:
            finished: returns the steps that all ranks have finished.
            say: shows one line to the user; called in the loop's thread.
            wake: ends the loop's wait.
            ping: is called at least every second while :meth:`close` waits.
            claim: to the bucket, if it was taken already; else it is taken in the thread.
        """
        self._job = JobDirectory(settings.directory)
        self._store = store
        self._every = settings.mirror.every if settings.mirror else 0.0
        self._rate = settings.mirror.rate if settings.mirror else 0.0
        self._retention = settings.retention
        self._owner = new_owner(run_id, settings.node)
        self._journal = journal
        self._finished, self._say, self._wake, self._ping = finished, say, wake, ping
        self._bell, self._hurry = threading.Event(), threading.Event()
        self._left: Callable[[], float] = forever
        self._claim = claim
        self._pace = Pace()
        self._ends = False
        self._is_copying = False
        self._done: dict[str, str] = {}  # newest attempt that is there, by session
        self._sealed: dict[str, tuple[int, int]] = {}  # newest that this claim has sealed, likewise
        self._last = 0.0  # when the last copy was done
        self._lines: deque[str] = deque()
        self._known: object = None
        self._state = "nothing copied yet"
        # A bucket that is the job's place is asked to have everything, and answers once it has.
        self._is_place = settings.mirror is not None and settings.mirror.is_place
        self._asked = self._answered = 0
        self._flush_until = 0.0
        self._is_off = self._stays = False
        self.lost = ""
        self._history = HistoryCopy(self._job, store, self._rate)
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    # -- the loop's side ------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def serve(self, newest: object) -> str:
        self._pace.feed(time.monotonic(), self._finished(), copying=self._is_copying)
        while self._lines:
            self._say(self._lines.popleft())
        if newest != self._known:
            self._known = newest
            self._bell.set()
        return f"{self._store.url}: {self._state}"

    def flush(self) -> None:
        self._asked += 1
        self._flush_until = time.monotonic() + FLUSH_SECONDS
        self.hurry()

    @property
    def flushed(self) -> bool:
        is_late = time.monotonic() > self._flush_until
        return not self._is_place or self._answered == self._asked or self._is_off or is_late

    @property
    def lacks(self) -> str:
        is_there = self._asked and self._answered == self._asked
        if not self._is_place or is_there:
            return ""
        return f"{self._store.url} lacks it: {self._state}"

    def hurry(self, left: Callable[[], float] = forever) -> None:
        if left is not forever:
            self._left = left
        self._hurry.set()
        self._bell.set()

    def close(self, left: Callable[[], float]) -> None:
        self._ends = True
        self.hurry()
        while self._thread.is_alive() and (seconds := left()) > 0:
            self._ping()
            self._thread.join(min(0.2, seconds))
        self.serve(self._known)
        if self._thread.is_alive():
            self._say(
                warning(f"mirror: the time is up, what {self._store.url} lacks stays on the disk")
            )

    def close_history(self, left: Callable[[], float]) -> None:
        self._history.close(left, self._ping)

    # -- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            self._mirror(self._claim or self._again(self._take))
        except RunSuperseded as error:
            self._show(f"off: {error}")
            self.lost = str(error) if self._is_place else ""
            self._tell(f"mirror: {error}" + "; the job trains on without it" * (not self.lost))
        except StopAborted:
            self._tell("mirror: the run ended before the bucket was free; nothing was copied")
        except (ElasticCkptError, OSError) as error:  # for good: another run, or no permission
            self._fail(error, None)
            self._show(f"off: {error}")
            goes_on = (
                "what it lacks stays on the disk" if self._ends else "the job trains on without it"
            )
            self._tell(f"mirror: {error}; {goes_on}")
        except Exception as error:
            log.exception("the mirror failed")
            self._tell(f"mirror: {type(error).__name__}, see the log; the job trains on without it")
        self._is_off = not self._ends or self._answered != self._asked
        self._wake()

    def _take(self) -> BucketClaim:
        require_step(self._job, self._store)
        patience = Patience(self._tell, lambda: self._ends)
        claim = take_for(self._job, self._store, self._owner, patience)
        try:
            require_step(self._job, self._store, claim)
        except BucketRefused:
            claim.beat(ended=True)
            raise
        note_own(self._job, claim)
        return claim

    def _mirror(self, claim: BucketClaim) -> None:
        self._history.offer(claim.number)
        for one in self._job.sessions():
            there = self._again(partial(newest, self._store, one.name, claim.newest))
            self._done[one.name] = there.attempt if there else ""
            self._delete(partial(sweep, claim, one.name))
        while True:
            asked = self._asked
            for path, manifest in self._missing():
                if _key(manifest) <= self._sealed.get(manifest.session, (-1, -1)):
                    claim = self._again(partial(self._claim_again, claim))
                self._again(partial(self._copy, claim, path, manifest))
            if asked and not self._missing():
                self._answered = asked
                self._wake()
            if self._ends and not self._missing():
                break
            self._bell.wait(BUCKET_BEAT_SECONDS)
            self._bell.clear()
            self._again(claim.beat)
        with contextlib.suppress(OSError):
            claim.beat(ended=True)

    def _claim_again(self, claim: BucketClaim) -> BucketClaim:
        """Claim the next number: the job has gone back behind what this one has sealed, which must
        not be the newest any more."""
        owner = new_owner(claim.owner.run_id, claim.owner.node)
        note_pending(self._job, self._store, owner)
        found = claim_after(self._store, claim.number, owner)
        note_own(self._job, found)
        self._sealed.clear()
        return found

    def _missing(self) -> list[tuple[Path, Manifest]]:
        """Return the newest checkpoint of each session that the bucket lacks, if it is due. One
        that somebody has asked for always is."""
        now = time.monotonic()
        waits = not self._hurry.is_set() and self._last and now - self._last < self._every
        found = [(one.name, newest_intact(one)) for one in self._job.sessions()]
        return [
            (view.path, view.manifest)
            for name, view in found
            if view is not None
            and isinstance(view.manifest, Manifest)
            and view.manifest.attempt != self._done.get(name)
            and not (waits and view.manifest.reason != "manual")
        ]

    def _copy(self, claim: BucketClaim, path: Path, manifest: Manifest) -> None:
        began = time.monotonic()
        throttle = Throttle(self._rate, began)
        sent, paused = 0, 0.0
        found: int | None = None  # bytes that an earlier try has left there: the first count
        self._is_copying = True

        def advance(count: int) -> None:
            nonlocal found, sent, paused
            found = count if found is None else found
            sent += count
            now = time.monotonic()
            self._show(f"step {manifest.step}, {human_bytes(sent)} of {human_bytes(total)}")
            if self._hurry.is_set() and (newer := self._newer(manifest)):
                rate = (sent - found) / max(1e-3, now - began - paused)
                if drops_for_newer(rate, newer.total_bytes, self._left()):
                    raise _Dropped
            seconds = throttle.pause(count, now, slowed=self._pace.is_slowed)
            if seconds > 0:
                self._hurry.wait(seconds)
                paused += time.monotonic() - now

        total = manifest.total_bytes
        try:
            lock = ReadLock(path)
        except BeingRemoved:
            return  # retention was faster: there is a newer one
        try:
            seal = push(claim, in_directory(path), manifest, claim.beating(advance))
        except _Dropped:
            return
        except CheckpointRejected as error:
            self._fail(error, manifest.step)
            self._tell(
                f"mirror: step {manifest.step} is left out: {error}; elastic-ckpt verify "
                f"--full {self._job.root} looks at all"
            )
            self._done[manifest.session] = manifest.attempt
            return
        finally:
            lock.release()
            self._is_copying = False
        seconds = time.monotonic() - began
        self._last = time.monotonic()
        self._done[manifest.session] = manifest.attempt
        self._sealed[manifest.session] = _key(manifest)
        self._journal.write(
            Mirrored(
                path=f"{self._store.url}/{seal.key}", step=manifest.step,
                bytes=manifest.total_bytes, sent_bytes=sent - (found or 0), seconds=seconds,
                paused_seconds=paused,
            )
        )  # fmt: skip
        self._show(f"step {manifest.step}, sealed {time.strftime('%H:%M:%S')}")
        self._history.offer(claim.number)
        self._retain(claim, manifest.session)

    def _newer(self, manifest: Manifest) -> Manifest | None:
        """Return what has become the newest since a copy began; None if it still is."""
        found = newest_intact(self._job.session(manifest.session))
        newer = found.manifest if found is not None else None
        is_newer = isinstance(newer, Manifest) and newer.attempt != manifest.attempt
        return newer if is_newer and isinstance(newer, Manifest) else None

    def _retain(self, claim: BucketClaim, session: str) -> None:
        """Delete what no rule keeps: that of the run, else that of the script, else our own."""
        if not self._ends:
            rule = self._retention or read_rule(self._job.session(session))
            self._delete(partial(prune, claim, session, rule))

    def _delete(self, do: Callable[[], object]) -> None:
        """Do it; a store that deletes nothing, or not now, is named once, and gets its copies."""
        try:
            do()
        except (BucketFailed, BucketRefused) as error:
            if not self._stays:
                self._fail(error, None)
                self._tell(f"mirror: old checkpoints stay there: {error}; copies are made")
            self._stays = True

    def _again(self, do: Callable[[], _T]) -> _T:
        """Do something until the bucket answers; raises what will not change."""
        tries = 0
        while True:
            try:
                return do()
            except BucketFailed as error:
                seconds = RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)]
                tries += 1
                if tries == 1:
                    self._fail(error, None)
                    self._tell(warning(f"mirror: {error}"))
                self._show(f"failing for {tries} tries: {error}")
                if self._ends and tries > len(RETRY_SECONDS):
                    raise
                if self._hurry.wait(seconds):
                    time.sleep(min(seconds, RETRY_SECONDS[0]))

    def _fail(self, error: Exception, step: int | None) -> None:
        with contextlib.suppress(OSError):
            self._journal.write(MirrorFailed(step=step, error=printable(str(error), 500)))

    def _show(self, what: str) -> None:
        self._state = what

    def _tell(self, line: str) -> None:
        self._lines.append(line)
        self._wake()


def _key(manifest: Manifest) -> tuple[int, int]:
    return manifest.epoch, manifest.step
