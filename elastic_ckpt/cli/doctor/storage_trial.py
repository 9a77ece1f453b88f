"""What a storage does of all that checkpoints rely upon, and how fast it takes one: tried out.

``docs/filesystems.md`` says what is relied upon, and for what.
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

from elastic_ckpt.checkpoint.hashed_file import HashedFile
from elastic_ckpt.util.files import create_file, remove_tree, sync_directory

PREFIX: Final = ".elastic-ckpt-trial-"
"""Of the directory that all of it happens in; nobody takes it for a checkpoint."""

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Written at once, as a save does."""

_POOL_CHUNKS: Final = 8
"""Different ones; what compresses or shares equal blocks must not gain by it."""


class Making(msgspec.Struct, frozen=True, tag=True):
    """The directory that is made now, and is gone in the end."""

    path: str


class Begun(msgspec.Struct, frozen=True, tag=True):
    """What is tried now; if nothing follows, the storage does not answer to this."""

    what: str


class Tried(msgspec.Struct, frozen=True, tag=True):
    """What came of it.

    Attributes:
        why: what is wrong; empty if all is well.
        errno: of the call that failed; 0 if it did something else than it should.
    """

    what: str
    why: str = ""
    errno: int = 0


class Skew(msgspec.Struct, frozen=True, tag=True):
    """Seconds that the file system's clock is ahead of this host's."""

    seconds: float


class Wrote(msgspec.Struct, frozen=True, tag=True):
    """What is on the disk by now.

    Attributes:
        seconds: for these bytes.
        least_seconds: for the first chunk.
    """

    bytes: int
    seconds: float
    least_seconds: float


class Writing(msgspec.Struct, frozen=True, tag=True):
    """So many bytes of so many at the most were written, and may not be on the disk yet."""

    bytes: int
    most_bytes: int


TrialEvent = Making | Begun | Tried | Skew | Wrote | Writing


class _Wrong(Exception):
    """A call succeeded that must not, or the other way round."""


def try_storage(place: Path, most_bytes: int, seconds: float) -> Generator[TrialEvent, None, None]:
    """Try all of it in a directory of its own, which is gone when this ends, in whatever way.

    Args:
        place: a directory.
        most_bytes: to write at the most, to see how fast that is.
        seconds: after which that ends.

    Raises:
        OSError: nothing can be made in ``place``.
    """
    directory = place / f"{PREFIX}{secrets.token_hex(8)}"
    yield Making(str(directory))
    os.mkdir(directory, 0o700)
    try:
        for what, trial in TRIALS.items():
            yield Begun(what)
            yield _outcome(what, trial, directory)
        yield from _compare_clocks(directory)
        yield from _write(directory / "written", most_bytes, seconds)
    finally:
        remove_tree(directory)


def _outcome(what: str, trial: Callable[[Path], None], directory: Path) -> Tried:
    place = directory / what
    try:
        os.mkdir(place, 0o700)
        trial(place)
    except OSError as error:
        return Tried(what, error.strerror or str(error), error.errno or 0)
    except _Wrong as error:
        return Tried(what, str(error))
    return Tried(what)


def _try_fsync(place: Path) -> None:
    fd = create_file(place / "file")
    try:
        os.write(fd, b"durable")
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(place)


def _try_rename(place: Path) -> None:
    """Of a file over another one, as each control file is; of a directory, as a seal is."""
    (place / "old").write_bytes(b"old")
    (place / "new").write_bytes(b"new")
    os.replace(place / "new", place / "old")
    if (place / "old").read_bytes() != b"new" or (place / "new").exists():
        raise _Wrong("a file that was renamed over another one is not in its place")
    for name in ("attempts", "attempts/1", "attempts/2"):
        os.mkdir(place / name)
    (place / "attempts/1/manifest").write_bytes(b"1")
    os.rename(place / "attempts/1", place / "sealed")
    if (place / "sealed/manifest").read_bytes() != b"1" or (place / "attempts/1").exists():
        raise _Wrong("a directory that was renamed is not in its place")
    with contextlib.suppress(OSError):
        os.rename(place / "attempts/2", place / "sealed")
        raise _Wrong("a directory replaces another one that is not empty")


def _try_exclusive(place: Path) -> None:
    os.close(create_file(place / "file"))
    os.mkdir(place / "directory")
    with contextlib.suppress(FileExistsError):
        os.close(create_file(place / "file"))
        raise _Wrong("a file is made whose name is taken")
    with contextlib.suppress(FileExistsError):
        os.mkdir(place / "directory")
        raise _Wrong("a directory is made whose name is taken")


def _try_nofollow(place: Path) -> None:
    os.close(create_file(place / "file"))
    try:
        os.symlink("file", place / "link")
    except OSError:
        return  # no links, none to follow
    with contextlib.suppress(OSError):
        os.close(os.open(place / "link", os.O_RDONLY | os.O_NOFOLLOW))
        raise _Wrong("a link is followed that must not be")


def _try_locks(place: Path) -> None:
    path = place / "lock"
    os.close(create_file(path))
    lock = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    with _held_elsewhere(path, fcntl.LOCK_EX), contextlib.suppress(filelock.Timeout):
        lock.acquire()
        raise _Wrong("two processes hold one lock")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _Wrong("a lock stays whose holder has ended") from None
    lock.release()
    fd = os.open(path, os.O_RDWR)
    try:
        with _held_elsewhere(path, fcntl.LOCK_SH):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise _Wrong("what one process reads another one may lock for itself")
    finally:
        os.close(fd)


@contextlib.contextmanager
def _held_elsewhere(path: Path, kind: int) -> Iterator[None]:
    """Another process holds a lock, until the block or this process ends.

    Raises:
        OSError: it cannot be had.
    """
    told, telling = os.pipe()
    waited_for, waiting = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(waiting)  # so that the end of the parent is heard
        _hold(path, kind, telling, waited_for)
    os.close(telling)
    os.close(waited_for)
    try:
        said = os.read(told, 8)
        if said != b"0":
            number = int(said or errno.EIO)
            raise OSError(number, os.strerror(number))
        yield
    finally:
        os.close(told)
        os.close(waiting)
        os.waitpid(holder, 0)


def _hold(path: Path, kind: int, telling: int, until: int) -> None:
    try:
        fcntl.flock(os.open(path, os.O_RDWR), kind | fcntl.LOCK_NB)
        os.write(telling, b"0")
        os.read(until, 1)
    except OSError as error:
        os.write(telling, str(error.errno).encode())
    finally:
        os._exit(0)


def _try_modes(place: Path) -> None:
    path = place / "file"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise _Wrong(f"a file for its owner alone gets the mode {mode:04o}")


TRIALS: Final[Mapping[str, Callable[[Path], None]]] = {
    "fsync": _try_fsync,
    "rename": _try_rename,
    "O_EXCL": _try_exclusive,
    "O_NOFOLLOW": _try_nofollow,
    "locks": _try_locks,
    "modes": _try_modes,
}
"""By what they are called; each has a directory of its own."""


def _compare_clocks(directory: Path) -> Iterator[Skew]:
    """Nothing where a file cannot be made durable, which the trial of fsync has said."""
    path = directory / "now"
    with contextlib.suppress(OSError):
        before = time.time()
        fd = create_file(path)
        try:
            os.write(fd, b"now")
            os.fsync(fd)  # a file server has it now, and says when
        finally:
            os.close(fd)
        written, now = os.stat(path).st_mtime, time.time()
        yield Skew(written - min(max(written, before), now))


def _write(path: Path, most_bytes: int, seconds: float) -> Iterator[TrialEvent]:
    """Write what cannot be compressed, hashed and durable, as a save does; ever more at a time.

    After each sync comes what it took so far; the next piece is no larger than what should fit
    into the time that is left.
    """
    most = most_bytes // CHUNK_BYTES
    if most < 1:
        return
    yield Begun("writing")
    pool = _incompressible()
    try:
        file = HashedFile(path, most * CHUNK_BYTES)
        try:
            done, piece, least = 0, 1, 0.0
            began = time.monotonic()
            while piece >= 1:
                for _ in range(piece):
                    file.write(pool[done % _POOL_CHUNKS])
                    done += 1
                    yield Writing(done * CHUNK_BYTES, most * CHUNK_BYTES)
                    if time.monotonic() - began > seconds:
                        break
                file.sync()
                took = time.monotonic() - began
                least = least or took
                yield Wrote(done * CHUNK_BYTES, took, least)
                fits = int((seconds - took) * done / took)
                piece = min(2 * piece, most - done, fits)
        finally:
            file.close()
    except OSError as error:
        yield Tried("writing", error.strerror or str(error), error.errno or 0)


def _incompressible() -> list[memoryview]:
    """Chunks, each at the address of a page, which direct writes ask for."""
    chunks = []
    for _ in range(_POOL_CHUNKS):
        chunk = mmap.mmap(-1, CHUNK_BYTES)
        chunk.write(os.urandom(CHUNK_BYTES))
        chunks.append(memoryview(chunk))
    return chunks
