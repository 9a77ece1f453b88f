"""The quick half of ``doctor``'s checks of the storage, at each start of a run."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.cli.doctor.directory import nearest
from elastic_ckpt.cli.doctor.filesystem import check_filesystem, mount_of
from elastic_ckpt.cli.doctor.storage import judge
from elastic_ckpt.cli.doctor.storage_trial import TrialEvent, TrialResult, try_storage
from elastic_ckpt.errors import BucketFailed, DirectoryUnusable
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.notices.signals import is_held
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answers

TRIAL_SECONDS: Final = 10.0
"""How long a run waits for the trial of a storage that is not a local disk."""

BUCKET_SECONDS: Final = 15.0
"""How long a run waits for the trial of its bucket."""

_LOSING: Final = frozenset({"fsync", "rename", "O_EXCL"})
"""Tests without which no save is sealed, or what is sealed is not there."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def check_storage(directory: Path, proc: Path = Path("/proc")) -> str:
    """Return what is wrong with the storage of a job directory, in one line; else empty.

    A local disk is judged by its mount options; anything else is tried out for some milliseconds.

    Raises:
        DirectoryUnusable: no save on this storage can be loaded again.
    """
    mount = mount_of(str(directory), proc)
    if mount is None or "ro" in mount.options:  # the run itself says so
        return ""
    found = check_filesystem(str(directory), proc=proc)
    problems = [f"{found.text}: {found.todo}"] * (found.state != "ok")
    if not mount.is_known:
        for failed in _failures(directory):
            judged = judge(failed)
            if failed.what in _LOSING and failed.errno not in _FULL:
                raise DirectoryUnusable(
                    f"{directory} is on {mount.kind} ({mount.source}), where {failed.what} "
                    f"failed: {judged.text}; {judged.todo}"
                )
            problems.append(f"{failed.what}: {judged.text}: {judged.todo}")
    return f"warning: {directory}: {'; '.join(problems)}" if problems else ""


def check_bucket(directory: Path, url: str) -> str:
    """Return why a bucket cannot be written to now, in one line; empty if it can.

    Raises:
        BucketRefused: it is missing, not permitted, or ignores conditions; or another machine has
            continued the job there.
        UsageError: the extra is not installed, or a setting is missing.
    """
    from elastic_ckpt.checkpoint.bucket.object_store import open_store
    from elastic_ckpt.checkpoint.bucket.probe import probe
    from elastic_ckpt.checkpoint.bucket.take import require_step
    from elastic_ckpt.checkpoint.bucket.url import BucketUrl

    store = open_store(BucketUrl.parse(url), make=True)

    def look() -> None:
        probe(store)
        require_step(JobDirectory(directory), store)

    failed = ask(look, url, Patience(leaves=is_held))
    return f"{failed}: the job begins without it" if failed else ""


def ask(look: Callable[[], object], url: str, patience: Patience) -> BucketFailed | None:
    """Do something with a bucket within ``BUCKET_SECONDS``; return that it does not answer now, and
    raise what will not change, or StopAborted on a signal."""
    found: list[BaseException] = []

    def work() -> None:
        try:
            look()
        except BaseException as error:  # whatever it is, the caller tells it
            found.append(error)

    thread = threading.Thread(target=work, name="bucket", daemon=True)
    thread.start()
    until = time.monotonic() + BUCKET_SECONDS
    while thread.is_alive() and time.monotonic() < until:
        patience.check(url)
        thread.join(0.2)
    if thread.is_alive():
        return BucketFailed(f"{url} has not answered for {BUCKET_SECONDS:.0f} s")
    for error in found:
        if isinstance(error, BucketFailed):
            return error
        raise error
    return None


def _failures(directory: Path) -> Iterator[TrialResult]:
    """Yield the failed tests; a trial that cannot begin or end fails no test."""

    def trial() -> Generator[object, None, None]:
        yield from try_storage(nearest(directory), max_bytes=0, seconds=0.0)

    try:
        with answers(trial, TrialEvent, TRIAL_SECONDS) as events:
            for event in events:
                if isinstance(event, TrialResult) and event.why and event.what != "modes":
                    yield event
    except (NoAnswer, WorkFailed):
        return  # the run says what it cannot write, and waits for what does not answer
