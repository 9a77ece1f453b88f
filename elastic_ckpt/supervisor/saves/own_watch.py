"""Watches the checkpoints that the script writes itself, in a thread: storage may not answer."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.own.announced import announced
from elastic_ckpt.checkpoint.own.claim import Claim
from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.checkpoint.own.seal import OwnSeal
from elastic_ckpt.errors import ElasticCkptError, ExitCode, LockHeld, UsageError
from elastic_ckpt.jobdir.node_record import OwnTrouble
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import CheckpointLoaded, Quarantined, Saved
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.own_saves import OwnSaves
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.util.change_bell import ChangeBell
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.progress import in_lines

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
HURRIED_SECONDS: Final = 0.2
"""Between two looks at what the script writes; the second one under a notice."""

POLL_SECONDS: Final = 10.0
"""Between two looks for an announcement that has not rung, and how long each look is made after
something rang: the announcement is written somewhat later."""

RETRY_SECONDS: Final = (0.5, 2.0)
"""Waits between attempts to verify what is there before a start; storage may recover."""

SETTLE_SECONDS: Final = 1800.0
"""How long sealing may take after the script has ended, if no deadline is near."""


class OwnWatch:
    """The real ``OwnPort``. One thread of its own does all the reading, in order."""

    def __init__(
        self,
        job: JobDirectory,
        rules: OwnSaves,
        run: int,
        retention: Retention,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
    ) -> None:
        """Without ``rules`` it goes by what the script announces. ``run`` is this run's number.
        ``say`` shows one line to the user, ``wake`` ends the loop's wait; the thread calls both."""
        self._job, self._given = job, bool(rules)
        self._journal, self._say, self._wake = journal, say, wake
        mistakes = say if rules else _say_nothing  # what a framework announces is right
        reports = Reports(self._sealed, self._aside, in_lines(say), mistakes)
        self._base, self._claim = Path.cwd(), Claim()
        self._keeper = OwnKeeper(job, rules, self._base, run, retention, reports)
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._watching = self._closing = self._hurried = False
        self._prepared = False
        self.failed, self.failed_code = "", ExitCode.UNAVAILABLE
        self._settled_by: float | None = None  # monotonic; None while nothing is settled
        self._path = ""
        self._bell = ChangeBell(job.control)
        self._rang = self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="own", daemon=True)

    # -- what the loop asks for: see ports.py ---------------------------------------------------

    @property
    def is_on(self) -> bool:
        return bool(self._keeper.rules)

    def start(self) -> None:
        self._thread.start()

    def prepare(self, hurry: Callable[[], bool]) -> None:
        self._prepared = False

        def work() -> None:
            try:
                self._prepare(hurry)
            finally:
                self._prepared = True
                self._wake()

        self._soon(work)

    def _prepare(self, hurry: Callable[[], bool]) -> None:
        self.failed, self.failed_code, self._path = "", ExitCode.UNAVAILABLE, ""
        for wait in (*RETRY_SECONDS, None):
            try:
                self._learn()
                self._claim.take(self._keeper.rules.watch, self._base)
                self._path = self._keeper.prepare(hurry) if self.is_on else ""
                return
            except UsageError as error:
                self.failed, self.failed_code = str(error), error.exit_code
                return
            except (OSError, ElasticCkptError) as error:
                log.warning("the script's checkpoints could not be verified: %s", error)
                if wait is None or hurry():
                    self.failed = (
                        str(error)
                        if isinstance(error, LockHeld)
                        else (
                            f"the script's checkpoints could not be verified: {error}; fix the "
                            "storage, then rerun the same command"
                        )
                    )
                    return
            time.sleep(wait)

    @property
    def prepared(self) -> bool:
        return self._prepared

    @property
    def is_finished(self) -> bool:
        sign = self._keeper.rules.finished_when
        return bool(sign) and os.path.lexists(self._base / Path(sign).expanduser())

    @property
    def has_sign(self) -> bool:
        return bool(self._keeper.rules.finished_when)

    @property
    def arguments(self) -> tuple[str, ...]:
        return self._keeper.rules.arguments(self._path)

    def launched(self, incarnation: int) -> None:
        self._keeper.incarnation = incarnation
        self._settled_by = None
        self._watching = True
        newest = self._keeper.newest
        if self._path and newest is not None:
            size = newest.total_bytes
            self._journal.write(
                CheckpointLoaded(path=self._path, step=newest.step, tier="own", bytes=size)
            )

    def mark(self) -> None:
        self._hurried, came = True, time.time()

        def work() -> None:
            self._learn()
            self._keeper.mark(time.monotonic(), came)

        self._soon(work)

    def ended(self, *, left_well: bool) -> None:
        self._watching = False
        self._settled_by = time.monotonic() + SETTLE_SECONDS

        def work() -> None:
            try:
                self._learn()
                self._keeper.settle(left_well=left_well)
            finally:
                self._settled_by = None
                self._wake()

        self._soon(work)

    @property
    def settled(self) -> bool:
        by = self._settled_by
        return by is None or time.monotonic() > by

    @property
    def saved(self) -> bool:
        return self._keeper.since_mark

    @property
    def trouble(self) -> OwnTrouble | None:
        return self._keeper.mistakes.trouble if self._given else None

    def newest(self) -> Key:
        return _key(self._keeper.newest)

    def newest_marked(self) -> Key:
        return _key(self._keeper.newest_marked)

    @property
    def newest_name(self) -> str:
        newest = self._keeper.newest
        return Path(newest.path).name if newest else ""

    def fall_back(self, why: str) -> str:
        fallen = self._keeper.fall_back(why)
        newest = self._keeper.newest
        if fallen is None or newest is None:
            return ""
        older = Path(newest.path).name
        return f"{why}: setting {Path(fallen.path).name} aside, resuming from {older}"

    def close(self, seconds: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._claim.release()

    # -- the thread -----------------------------------------------------------------------------

    def _soon(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                if not self._work:
                    self._changed.wait(HURRIED_SECONDS if self._hurried else LOOK_SECONDS)
                work = list(self._work)
                self._work.clear()
            if self._watching and not work:
                work.append(self._look)
            for one in work:
                try:
                    one()
                except (OSError, ElasticCkptError) as error:
                    log.warning("the script's checkpoints: %s", error)
                except Exception:
                    log.exception("the script's checkpoints")
        self._bell.close()

    def _look(self) -> None:
        if self.is_on or self._may_be_announced():
            self._learn()
        with contextlib.suppress(LockHeld):  # the output is new: whoever starts later is told
            self._claim.take(self._keeper.rules.watch, self._base)
        if self.is_on:
            self._keeper.look(time.monotonic())

    def _may_be_announced(self) -> bool:
        now = time.monotonic()
        if self._bell.rang():
            self._rang = now
        if self._rang + POLL_SECONDS < now < self._looked + POLL_SECONDS:
            return False
        self._looked = now
        return True

    def _learn(self) -> None:
        """Read what the script has announced, unless the run was told."""
        if not self._given:
            self._keeper.rules = announced(self._job)

    def _sealed(self, sealed: OwnSeal) -> None:
        self._journal.write(
            Saved(
                step=sealed.step,
                path=sealed.path,
                reason=sealed.reason,
                tier="own",
                bytes=sealed.total_bytes,
                seconds=max(0.0, time.time() - sealed.changed / 1e9),
                stall_seconds=0.0,
            )
        )
        log.info("sealed %s as number %d", sealed.path, sealed.number)
        self._wake()

    def _aside(self, path: Path, target: Path, why: str) -> None:
        self._journal.write(Quarantined(path=str(path), to=str(target), reason=why))
        self._say(warning(f"set {path} aside, in {target}: {why}"))


class NoOwnSaves:
    """The ``OwnPort`` of a run that watches nothing."""

    is_on = is_finished = has_sign = saved = False
    prepared = settled = True
    arguments: tuple[str, ...] = ()
    newest_name = failed = ""
    trouble: OwnTrouble | None = None
    failed_code = ExitCode.UNAVAILABLE

    def start(self) -> None:
        return

    def prepare(self, hurry: Callable[[], bool]) -> None:
        return

    def launched(self, incarnation: int) -> None:
        return

    def mark(self) -> None:
        return

    def ended(self, *, left_well: bool) -> None:
        return

    def newest(self) -> Key:
        return NO_CHECKPOINT

    def newest_marked(self) -> Key:
        return NO_CHECKPOINT

    def fall_back(self, why: str) -> str:
        return ""

    def close(self, seconds: float) -> None:
        return


def _key(seal: OwnSeal | None) -> Key:
    return seal.age if seal else NO_CHECKPOINT


def _say_nothing(line: str) -> None:
    del line
