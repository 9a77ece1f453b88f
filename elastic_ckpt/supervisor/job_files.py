"""The job directory as the supervisor's loop uses it: from a thread, for storage may not answer.

One thread does all reading and writing, in order; it polls for what others leave there. The loop
finds the results in memory. What must be known at the end of a run is waited for, bounded.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from elastic_ckpt.checkpoint.ownership.job_lock import RunLocks
from elastic_ckpt.errors import ElasticCkptError, RunSuperseded
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.place import JobPlace
from elastic_ckpt.jobdir.prediction_file import read_predictor, write_predictor
from elastic_ckpt.jobdir.runs_watch import RunsWatch
from elastic_ckpt.jobdir.save_requests import RequestWatch, ask_for_save, remove_requests
from elastic_ckpt.jobdir.worker_logs import forget_old_logs
from elastic_ckpt.journal.events import Drained, Saved
from elastic_ckpt.journal.journal import Journal, JournalTail, read_journal
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.lease import BEAT_SECONDS
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.protocol.succession import Leader
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key, OwnPort
from elastic_ckpt.supervisor.saves.checkpoints import DirectoryCheckpoints, JobCheckpoints
from elastic_ckpt.supervisor.saves.fall_back import FallBack
from elastic_ckpt.util.change_bell import ChangeBell
from elastic_ckpt.util.journald import warning

log = logging.getLogger(__name__)

REQUESTS_SECONDS: Final = 0.5
EVENTS_SECONDS: Final = 1.0
"""How often the thread looks for save requests, and into the journal, if something rang."""

EVENTS_POLL_SECONDS: Final = 30.0
"""How often it looks into the journal of this host's processes although nothing rang."""

_WAIT_SECONDS: Final = 0.05

_SEALS: Final = (Saved, Drained)
"""Events after which the disk may have a newer checkpoint."""


class JobFiles:
    """The real ``DirectoryPort``. One thread of the supervisor calls all public methods."""

    def __init__(
        self,
        job: JobDirectory,
        node: str,
        locks: RunLocks,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
        own: OwnPort,
        checkpoints: JobCheckpoints | None = None,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        """``locks`` are held until :meth:`close`; ``checkpoints`` are the directory's by default.
        The thread calls ``say``, which shows a line to the user, and ``wake``, which ends the
        loop's wait. An owner beats each ``beat_seconds``."""
        self._job = job
        self._node = node
        self._locks = locks
        self._journal = journal
        self._say = say
        self._wake = wake
        self._own = own
        own_place = DirectoryCheckpoints(job, locks, journal, say)
        self._checkpoints: JobCheckpoints = checkpoints or own_place
        self._journal_bell = ChangeBell(job.journal(node).parent)
        self._journal_poll = 0.0
        self._tail = JournalTail(job, node)
        self._runs_watch = RunsWatch(job)
        self._place = JobPlace(job)
        self._newest: Key = NO_CHECKPOINT  # of the last scan that worked
        self._left_behind: Key | None = None  # the newest in the directory that is not there now
        self._record: NodeRecord | None = None  # to be written
        self._last_record: NodeRecord | None = None
        self._request_watch = RequestWatch(job)
        self._requests: frozenset[str] = frozenset()  # as of the last look
        self._taken: set[str] = set()  # for good, even if one cannot be removed
        self._events: deque[JournalEntry] = deque()
        self._work: deque[Callable[[], object]] = deque()
        self._cleaning: threading.Thread | None = None
        self._fall_back = FallBack()
        self._identities: SimpleQueue[tuple[str, ...]] | None = None  # while they are read
        self._changed = threading.Condition()
        self._closing = False
        self._lost = ""
        self._leader: Leader | None = None  # as of the last look, until it is taken
        self._looks, self._passed_on, self._beat_seconds = False, False, beat_seconds
        self._thread = threading.Thread(target=self._run, name="files", daemon=True)

    def start(self) -> None:
        """Scan once, and start the thread."""
        self._try(self._scan)
        self._thread.start()

    # -- what the loop asks for: see ports.py ---------------------------------------------------

    @property
    def lost(self) -> str:
        return self._lost

    def leader(self) -> Leader | None:
        def look() -> None:
            try:
                self._leader = self._checkpoints.leader()
            finally:
                self._looks = False
            self._wake()

        found, self._leader = self._leader, None
        if not self._looks and found is None:
            self._looks = True
            self.later(look)
        return found

    def pass_on(self) -> None:
        self._passed_on = True

    def write_record(self, record: NodeRecord) -> None:
        with self._changed:
            self._record = self._last_record = record
            self._changed.notify_all()

    def record_incarnation(self, number: int) -> None:
        self.later(lambda: self._locks.record(number))

    def take_save_request(self) -> bool:
        """Return whether a save was requested. The other nodes' requests stay where they are:
        all nodes see the directory, and only the one that serves a request may remove it."""
        new = self._requests - self._taken
        if new:
            self._taken |= new
            self.later(partial(remove_requests, self._job, new))
        return bool(new)

    def request_save(self) -> None:
        def leave() -> None:
            with contextlib.suppress(OSError, ElasticCkptError):  # one that is there counts
                ask_for_save(self._job)

        self.later(leave)

    @property
    def left_behind(self) -> Key | None:
        return self._left_behind

    def newest(self) -> Key:
        return max(self._newest, self._own.newest())

    def scan(self) -> None:
        self.later(self._scan)

    def scan_now(self, left: Callable[[], float]) -> Key | None:
        found: list[Key] = []

        def look() -> None:
            found.append(self._scan())
            self._try(self._check)  # last: what was found is not another run's

        done = self._within(look, left)
        return found[0] if done and found else None

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        def work() -> None:
            clean_up = partial(self._checkpoints.clean_up, hurry, spare)
            for one in (clean_up, partial(forget_old_logs, self._job), self._scan):
                self._try(one)
            self._wake()

        self._cleaning = threading.Thread(target=work, name="clean-up", daemon=True)
        self._cleaning.start()

    @property
    def cleaned(self) -> bool:
        return self._cleaning is None or not self._cleaning.is_alive()

    def fall_back(self, why: str, forget: Callable[[Key], bool], session: str) -> None:
        started = self._fall_back = FallBack()

        def work() -> None:
            try:
                started.line = self._set_aside(why, forget, session, started)
            finally:
                started.line = started.line or ""
                self._wake()

        self.later(work)

    @property
    def fallen_back(self) -> str | None:
        return self._fall_back.line

    def cancel_fall_back(self) -> bool:
        return self._fall_back.cancel()

    def _set_aside(
        self, why: str, forget: Callable[[Key], bool], session: str, started: FallBack
    ) -> str:
        with contextlib.suppress(OSError):  # what cannot be set aside is tried once more
            if self._own.newest() > self._newest:
                return self._own.fall_back(why) if started.may_act() else ""
            line = self._checkpoints.fall_back(
                why, lambda key: started.may_act() and forget(key), session
            )
            if line:
                self._try(self._scan)
            return line
        return ""

    def events(self) -> list[JournalEntry]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def catch_up(self, left: Callable[[], float]) -> None:
        self._within(self._read_events, left)

    def history(self) -> Iterable[JournalEntry]:
        return read_journal(self._job, marks=False)

    def read_predictor(self) -> Predictor:
        return read_predictor(self._job)

    def write_predictor(self, predictor: Predictor) -> None:
        self.later(lambda: write_predictor(self._job, predictor))

    def identity(self) -> str:
        with contextlib.suppress(OSError):
            return self._checkpoints.identity()
        return ""

    def known_identities(self, seconds: float) -> tuple[str, ...] | None:
        def read() -> None:
            identities: tuple[str, ...] = ()
            with contextlib.suppress(OSError):
                identities = self._checkpoints.known_identities()
            answers.put(identities)
            self._wake()

        if self._identities is None:
            self._identities = SimpleQueue[tuple[str, ...]]()
            self.later(read)
        answers = self._identities
        try:
            found = answers.get(timeout=seconds)
        except Empty:
            return None
        self._identities = None
        return found

    def close(self, left: Callable[[], float]) -> None:
        self.cancel_fall_back()

        def release() -> None:
            self._try(lambda: self._checkpoints.end(passed_on=self._passed_on))
            self._locks.release(passed_on=self._passed_on)

        if not self._within(release, left):
            log.warning("the storage does not answer; leaving without its last write")
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # -- the thread -----------------------------------------------------------------------------

    def later(self, work: Callable[[], object]) -> None:
        """Have the thread do something, after all that it has been given before."""
        with self._changed:
            self._work.append(work)
            self._changed.notify_all()

    def _within(self, work: Callable[[], None], left: Callable[[], float]) -> bool:
        """Have the thread do it after all that waits; return whether it was done in time. ``left``
        is asked again and again, because a notice may shorten the wait."""
        done = threading.Event()

        def do() -> None:
            try:
                work()
            finally:
                done.set()

        self.later(do)
        while not done.wait(min(_WAIT_SECONDS, max(0.0, left()))):
            if left() <= 0:
                return False
        return True

    def _run(self) -> None:
        next_requests = next_events = 0.0
        next_beat = time.monotonic() + self._beat_seconds
        while not self._closing:
            with self._changed:
                if self._record is None and not self._work:
                    due = min(next_requests, next_events, next_beat)
                    self._changed.wait(max(0.0, due - time.monotonic()))
                record, self._record = self._record, None
                work = list(self._work)
                self._work.clear()
            if record is not None:
                work.insert(0, partial(record.write, self._job.node_record(self._node)))
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat_seconds
                work.insert(0, self._beat)
            if now >= next_requests:
                next_requests = now + REQUESTS_SECONDS
                work.append(self._look_for_requests)
            if now >= next_events:
                next_events = now + EVENTS_SECONDS
                work.append(self._look_for_events)
            for one in work:
                self._try(one)
        self._request_watch.close()
        self._journal_bell.close()

    def _try(self, work: Callable[[], object]) -> bool:
        """Do one thing, and return whether it was done; the next one may get there in any case."""
        try:
            work()
            return True
        except RunSuperseded as error:
            self._lost = str(error)
            self._wake()
        except OSError:  # a full disk, for example, must not keep the job from being saved
            log.debug("a file of the job directory", exc_info=True)
        except Exception:
            log.exception("a file of the job directory")
        return False

    def _check(self) -> None:
        if self._locks.ownership is not None:
            self._locks.ownership.check()
        self._checkpoints.check()

    def _beat(self) -> None:
        ownership = self._locks.ownership
        is_calm = self._runs_watch.is_calm() and (ownership is None or ownership.shows_changes)
        is_placed = is_calm or self._try(self._check_place)
        if ownership is not None and not self._lost:
            (ownership.beat if is_calm else ownership.beat_and_check)()
            self._checkpoints.beat()
        if is_placed and not is_calm:
            self._runs_watch.checked()

    def _check_place(self) -> None:
        """Report a directory that was moved, deleted or unmounted, and put ours in its place."""
        said = self._place.check()
        if not said:
            return
        if self._place.is_original:
            self._left_behind = None
        elif self._left_behind is None:
            self._left_behind = self._newest
        log.warning("%s", said)
        self._say(warning(said))
        ownership = self._locks.ownership
        if ownership is not None:
            ownership.check_place()  # nothing is written where a disk was unmounted
        self._place.restore()
        self._journal_bell.hang()
        if self._last_record is not None:
            self._last_record.write(self._job.node_record(self._node))
        if ownership is not None:
            ownership.beat_and_check()

    def _look_for_requests(self) -> None:
        self._requests = self._request_watch.look(time.monotonic())
        if self._requests - self._taken:
            self._wake()

    def _look_for_events(self) -> None:
        now = time.monotonic()
        if self._journal_bell.rang() or now >= self._journal_poll:
            self._journal_poll = now + EVENTS_POLL_SECONDS
            self._read_events()

    def _read_events(self) -> None:
        found = self._tail.read()
        self._events.extend(found)
        if any(isinstance(entry.event, _SEALS) for entry in found):
            self._scan()

    def _scan(self) -> Key:
        self._try(self._check_place)
        self._newest = self._checkpoints.newest()
        return self._newest
