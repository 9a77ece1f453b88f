"""What must hold of a job directory after anything: a kill, an error, a power cut.

Functions return complaints instead of raising, so that one test can name every bad case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from elastic_ckpt.checkpoint.catalog import newest_intact, scan
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, verify_full
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import FILES, open_job, tree
from tests.faults.store_writer import NEW, NEXT, OLD, contents, recover_attempts, save

State = dict[str, bytes]
"""Files of a checkpoint that hold the training's state, and their bytes."""


def state_of(checkpoint: Path) -> State:
    """Return a checkpoint's files without the seal and the part manifests."""
    return {
        name: data
        for name, data in tree(checkpoint).items()
        if isinstance(data, bytes)
        and not name.startswith("parts/")
        and not name.startswith(MANIFEST_NAME)
    }


def prepare(root: Path) -> State:
    """Make a job directory with the older checkpoint; return what every checkpoint adds to it.

    The rest, the ranks' own files, is the same at every step.
    """
    job = open_job(root)
    # Its group may read: so the calls that pass this on to new files are among the traced ones.
    for directory in (root, *filter(Path.is_dir, root.rglob("*"))):
        directory.chmod(0o750)
    save(root, OLD)
    ours = state_of(job.checkpoint(0, OLD))
    assert {name: ours.get(name) for name in FILES} == contents(OLD)
    return {name: data for name, data in ours.items() if name not in FILES}


@contextmanager
def without_waiting_for_the_disk() -> Iterator[None]:
    """Skip fsync in the checks' own saves, which need not survive a power cut."""
    with mock.patch.multiple(os, fsync=lambda fd: None, fdatasync=lambda fd: None):
        yield


class Aftermath:
    """Looks at one job directory after something happened to it.

    ``common`` is what :func:`prepare` returned; ``broken``, an invalid checkpoint that was there
    before: it may stand where it stood or be in quarantine, as it was.
    """

    def __init__(
        self,
        root: Path,
        common: State,
        *,
        broken: dict[str, bytes | str] | None = None,
        contents_of: Callable[[int], State] = contents,
        next_save: Callable[[Path, int], None] = save,
    ) -> None:
        self._job = JobDirectory.at(root)
        self._common = common
        self._broken = broken
        self._newest = 0
        self._contents = contents_of
        self._save = next_save
        self.complaints: list[str] = []

    def newest(self, allowed: Collection[int]) -> int:
        """Return the newest intact checkpoint's step, which must be one of these; 0 for none."""
        found = newest_intact(self._job)
        if found is None:
            self._complain("there is no intact checkpoint")
            return 0
        if found.step not in allowed:
            self._complain(f"the newest intact checkpoint is of step {found.step}")
        if found.step < self._newest:
            self._complain(f"step {self._newest} was intact and is gone")
        self._newest = found.step
        self._check_bytes(found.path, found.step)
        return found.step

    def go_on(
        self, *, clean_first: bool, step: int = NEXT, allowed: Collection[int] = (OLD, NEW)
    ) -> None:
        """Make the next save, with one clean-up before or after it."""
        if clean_first:
            self._clean()
            self.newest(allowed)
        try:
            self._save(self._job.root, step)
        except (OSError, ElasticCkptError) as error:
            self._complain(f"the next save failed: {error}")
        self.newest({step})
        if not clean_first:
            self._clean()
            self.newest({step})
        self._nothing_left_behind()

    def _check_bytes(self, path: Path, step: int) -> None:
        if why := _why_invalid(path):
            self._complain(f"{path.name} is not intact: {why}")
        expected = {**self._common, **self._contents(step)}
        found = state_of(path)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                self._complain(f"{path.name}/{name} does not hold what was saved")

    def _clean(self) -> None:
        lock = HeldLock(self._job.lock, "aftermath")
        try:
            for place, what in recover_attempts(self._job):
                if what.startswith("left"):
                    self._complain(f"clean-up: {place.name}: {what}")
            before = tree(self._job.root)
            recover_attempts(self._job)
            if tree(self._job.root) != before:
                self._complain("a second clean-up changed something")
        finally:
            lock.release()

    def _nothing_left_behind(self) -> None:
        job = self._job
        self._complain_of("attempts", job.attempts.iterdir())
        self._complain_of("temporary files", job.root.rglob(".tmp-*"))
        # A power cut before the move leaves a reason without its entry, which no command lists.
        entries = [path for path in job.quarantine.iterdir() if path.is_dir()]
        unknown = (path for path in entries if tree(path) != self._broken)
        self._complain_of("quarantine entries", unknown)
        checkpoints = scan(job)
        known = {job.control, job.quarantine, *checkpoints}
        strangers = (
            path for path in job.root.iterdir() if path not in known and not _is_empty_place(path)
        )
        self._complain_of("strange files", strangers)
        for path in checkpoints:
            why = _why_invalid(path)
            if not why:
                self._check_bytes(path, verify_full(path).step)
            elif tree(path) != self._broken:
                self._complain(f"{path.name} stands there and is not intact: {why}")

    def _complain_of(self, what: str, found: Iterable[Path]) -> None:
        names = sorted(path.relative_to(self._job.root).as_posix() for path in found)
        if names:
            self._complain(f"{what} left behind: {', '.join(names)}")

    def _complain(self, what: str) -> None:
        if what not in self.complaints:
            self.complaints.append(what)


def _why_invalid(path: Path) -> str:
    try:
        verify_full(path)
    except (OSError, ElasticCkptError) as error:
        return str(error)
    return ""


def _is_empty_place(path: Path) -> bool:
    """Whether this is an empty directory of the store's own, such as that of the attempts."""
    return path.name.startswith(".") and path.is_dir() and not any(path.iterdir())
