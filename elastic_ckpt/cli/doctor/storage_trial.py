"""Probe the file system guarantees that checkpoints need, and the write speed.

``docs/filesystems.md`` explains what each guarantee is for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

import filelock
import msgspec

from elastic_ckpt.checkpoint.disk.hashed_file import HashedFile
from elastic_ckpt.util.files import create_file, let_group_in, remove_tree, sync_directory

PREFIX: Final = ".elastic-ckpt-trial-"
"""Prefix of the trial's directory, which is not a checkpoint's."""

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Written at a time, as in a save."""

_POOL_CHUNKS: Final = 8
"""Different chunks, so that compression and deduplication do not help."""


class TrialDirectory(msgspec.Struct, frozen=True, tag=True):
    """The trial directory, which is about to be created and is removed in the end."""

    path: str


class TrialStarted(msgspec.Struct, frozen=True, tag=True):
    """A test started; if no event follows, the storage does not answer."""

    what: str


class TrialResult(msgspec.Struct, frozen=True, tag=True):
    """The result of a test.

    Attributes:
        why: the problem; empty on success.
        errno: of the failed call; 0 if a call succeeded with a wrong result.
    """

    what: str
    why: str = ""
    errno: int = 0


class ClockSkew(msgspec.Struct, frozen=True, tag=True):
    """How far the file system's clock is ahead of this host's, in seconds."""

    seconds: float


class WriteSpeed(msgspec.Struct, frozen=True, tag=True):
    """What is durable so far.

    Attributes:
        bytes: written and synced.
        seconds: for these bytes.
        least_seconds: for the first chunk.
    """

    bytes: int
    seconds: float
    least_seconds: float


class WriteProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes written, of at most ``max_bytes``; they may not be durable yet."""

    bytes: int
    max_bytes: int


TrialEvent = TrialDirectory | TrialStarted | TrialResult | ClockSkew | WriteSpeed | WriteProgress


class _TrialFailed(Exception):
    """A call succeeded that must fail, or had the wrong effect."""


def try_storage(parent: Path, max_bytes: int, seconds: float) -> Generator[TrialEvent, None, None]:
    """Run all tests in a new directory, which is always removed at the end.

    Args:
        parent: where to create it.
        max_bytes: how much to write to measure the speed.
        seconds: how long to write.

    Raises:
        OSError: cannot create the directory.
    """
    directory = parent / f"{PREFIX}{secrets.token_hex(8)}"
    yield TrialDirectory(str(directory))
    os.mkdir(directory, 0o700)
    try:
        for what, trial in TRIALS.items():
            yield TrialStarted(what)
            yield _outcome(what, trial, directory)
        yield from _compare_clocks(directory)
        yield from _write(directory / "written", max_bytes, seconds)
    finally:
        remove_tree(directory)


def _outcome(what: str, trial: Callable[[Path], None], directory: Path) -> TrialResult:
    folder = directory / what
    try:
        os.mkdir(folder, 0o700)
        trial(folder)
    except OSError as error:
        return TrialResult(what, error.strerror or str(error), error.errno or 0)
    except _TrialFailed as error:
        return TrialResult(what, str(error))
    return TrialResult(what)


def _try_fsync(place: Path) -> None:
    fd = create_file(place / "file")
    try:
        os.write(fd, b"durable")
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(place)


def _try_rename(place: Path) -> None:
    """Replace a file, as control files do, and rename a directory, as a seal does."""
    (place / "old").write_bytes(b"old")
    (place / "new").write_bytes(b"new")
    os.replace(place / "new", place / "old")
    if (place / "old").read_bytes() != b"new" or (place / "new").exists():
        raise _TrialFailed("a renamed file did not replace the target")
    for name in ("attempts", "attempts/1", "attempts/2"):
        os.mkdir(place / name)
        let_group_in(place / name)
    (place / "attempts/1/manifest").write_bytes(b"1")
    os.rename(place / "attempts/1", place / "sealed")
    if (place / "sealed/manifest").read_bytes() != b"1" or (place / "attempts/1").exists():
        raise _TrialFailed("a renamed directory is not at its new path")
    with contextlib.suppress(OSError):
        os.rename(place / "attempts/2", place / "sealed")
        raise _TrialFailed("a renamed directory replaced one that is not empty")


def _try_exclusive(place: Path) -> None:
    os.close(create_file(place / "file"))
    os.mkdir(place / "directory")
    with contextlib.suppress(FileExistsError):
        os.close(create_file(place / "file"))
        raise _TrialFailed("created a file that already exists")
    with contextlib.suppress(FileExistsError):
        os.mkdir(place / "directory")
        raise _TrialFailed("created a directory that already exists")


def _try_nofollow(place: Path) -> None:
    os.close(create_file(place / "file"))
    try:
        os.symlink("file", place / "link")
    except OSError:
        return  # no links, so none to follow
    with contextlib.suppress(OSError):
        os.close(os.open(place / "link", os.O_RDONLY | os.O_NOFOLLOW))
        raise _TrialFailed("followed a link")


def _try_locks(place: Path) -> None:
    path = place / "lock"
    os.close(create_file(path))
    lock = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    with _held_elsewhere(path, fcntl.LOCK_EX), contextlib.suppress(filelock.Timeout):
        lock.acquire()
        raise _TrialFailed("two processes hold the same lock")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _TrialFailed("a lock outlives its holder") from None
    lock.release()
    fd = os.open(path, os.O_RDWR)
    try:
        with _held_elsewhere(path, fcntl.LOCK_SH):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise _TrialFailed("an exclusive lock ignores a shared one")
    finally:
        os.close(fd)


@contextlib.contextmanager
def _held_elsewhere(path: Path, kind: int) -> Iterator[None]:
    """Hold a lock in another process until the block or this process ends.

    Raises:
        OSError: the lock is not available.
    """
    result, result_writer = os.pipe()
    release, release_writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(release_writer)  # so that the parent's end closes the pipe
        _hold(path, kind, result_writer, release)
    os.close(result_writer)
    os.close(release)
    try:
        answer = os.read(result, 8)
        if answer != b"0":
            number = int(answer or errno.EIO)
            raise OSError(number, os.strerror(number))
        yield
    finally:
        os.close(result)
        os.close(release_writer)
        os.waitpid(holder, 0)


def _hold(path: Path, kind: int, result: int, release: int) -> None:
    try:
        fcntl.flock(os.open(path, os.O_RDWR), kind | fcntl.LOCK_NB)
        os.write(result, b"0")
        os.read(release, 1)
    except OSError as error:
        os.write(result, str(error.errno).encode())
    finally:
        os._exit(0)


def _try_modes(place: Path) -> None:
    path = place / "file"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise _TrialFailed(f"a private file gets mode {mode:04o}")


TRIALS: Final[Mapping[str, Callable[[Path], None]]] = {
    "fsync": _try_fsync,
    "rename": _try_rename,
    "O_EXCL": _try_exclusive,
    "O_NOFOLLOW": _try_nofollow,
    "locks": _try_locks,
    "modes": _try_modes,
}
"""The tests by name; each runs in its own directory."""


def _compare_clocks(directory: Path) -> Iterator[ClockSkew]:
    """Yield the clock skew; nothing if fsync fails, which its own test reports."""
    path = directory / "now"
    with contextlib.suppress(OSError):
        before = time.time()
        fd = create_file(path)
        try:
            os.write(fd, b"now")
            os.fsync(fd)  # now a file server has set the time
        finally:
            os.close(fd)
        written, now = os.stat(path).st_mtime, time.time()
        yield ClockSkew(written - min(max(written, before), now))


def _write(path: Path, max_bytes: int, seconds: float) -> Iterator[TrialEvent]:
    """Write incompressible data as a save does, hashed and synced, in growing pieces.

    After each sync the speed so far is yielded; the next piece is at most what should fit into the
    remaining time.
    """
    chunks = max_bytes // CHUNK_BYTES
    if chunks < 1:
        return
    yield TrialStarted("writing")
    pool = _incompressible()
    try:
        file = HashedFile(path, chunks * CHUNK_BYTES)
        try:
            done, piece, least = 0, 1, 0.0
            began = time.monotonic()
            while piece >= 1:
                for _ in range(piece):
                    file.write(pool[done % _POOL_CHUNKS])
                    done += 1
                    yield WriteProgress(done * CHUNK_BYTES, chunks * CHUNK_BYTES)
                    if time.monotonic() - began > seconds:
                        break
                file.sync()
                took = time.monotonic() - began
                least = least or took
                yield WriteSpeed(done * CHUNK_BYTES, took, least)
                fits = int((seconds - took) * done / took)
                piece = min(2 * piece, chunks - done, fits)
        finally:
            file.close()
    except OSError as error:
        yield TrialResult("writing", error.strerror or str(error), error.errno or 0)


def _incompressible() -> list[memoryview]:
    """Return random chunks, page-aligned as direct writes require."""
    chunks = []
    for _ in range(_POOL_CHUNKS):
        chunk = mmap.mmap(-1, CHUNK_BYTES)
        chunk.write(os.urandom(CHUNK_BYTES))
        chunks.append(memoryview(chunk))
    return chunks
