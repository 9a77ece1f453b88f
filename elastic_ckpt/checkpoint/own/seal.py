"""The seal of a checkpoint that the script wrote: it lies in the job directory, not beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec

from elastic_ckpt.checkpoint.disk.hashed_file import digest_file
from elastic_ckpt.checkpoint.disk.side_by_side import side_by_side
from elastic_ckpt.checkpoint.manifest import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    MAX_NUMBER,
    FileEntry,
    check_files,
    decode_signed,
    encode,
)
from elastic_ckpt.checkpoint.own.files import changed_at, stamps_of
from elastic_ckpt.checkpoint.verify import check_size, verify_files
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import FileStamps
from elastic_ckpt.util.files import read_bounded, sync_directory, write_atomic
from elastic_ckpt.util.progress import Advance
from elastic_ckpt.util.text import printable


class OwnSeal(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the script's own checkpoints holds.

    Attributes:
        number: counts the job's; the newest has the largest.
        path: absolute path of the file or directory.
        is_file: whether it is a single file, which is then its only entry.
        step: the last number in its name; 0 without one.
        files: paths are relative to the directory, or the file's name.
        created: RFC 3339, UTC; for people.
        run, incarnation: that sealed it.
        changed: newest time of change of its files, in ns since the epoch: another one is reason to
            read them again.
        copied: whether the job directory has a copy, because the script overwrites the original.
        second: the script may not be able to resume from it: ``{newest}`` means the first pattern
            of ``--watch``, and another one matched.
    """

    format: int = FORMAT
    number: int
    path: str
    is_file: bool
    step: int
    files: list[FileEntry]
    created: str
    run: int = 0
    incarnation: int = 0
    changed: int = 0
    copied: bool = False
    second: bool = False
    reason: str = "script"
    manifest_xxh3_128: str = "0" * 32

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders the job's checkpoints: the newest has the largest."""
        return (-1 if self.second else 0, self.number, self.step)

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry.bytes for entry in self.files)

    @property
    def root(self) -> Path:
        """What the paths of its files are relative to."""
        return Path(self.path).parent if self.is_file else Path(self.path)


def seal_path(job: JobDirectory, number: int) -> Path:
    """Return where a seal lies."""
    return job.own_seals / f"{number:06d}.json"


def copies_of(job: JobDirectory, number: int) -> Path:
    """Return the directory of a copy."""
    return job.own_copies / f"{number:06d}"


def seal(
    path: Path,
    stamps: FileStamps,
    *,
    number: int,
    step: int,
    run: int,
    incarnation: int,
    second: bool = False,
) -> OwnSeal:
    """Hash the files of a complete checkpoint, and make them durable.

    Raises:
        OSError: a file cannot be read, or has vanished.
    """
    is_file = not path.is_dir()
    root = path.parent if is_file else path
    files = side_by_side(
        partial(_entry_of, root), [name for name, *_ in stamps], sum(size for _, size, *_ in stamps)
    )
    for directory in {root, *((root / entry.path).parent for entry in files), path.parent}:
        sync_directory(directory)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return OwnSeal(
        number=number, path=str(path), is_file=is_file, step=step, files=files, created=created,
        run=run, incarnation=incarnation, changed=changed_at(stamps), second=second,
    )  # fmt: skip


def _entry_of(root: Path, file: str, advance: Advance) -> FileEntry:
    digest = digest_file(root / file, advance)
    _sync_file(root / file)
    return digest.entry(file, 0)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(job: JobDirectory, sealed: OwnSeal) -> None:
    """Put the seal into the job directory; from now on the checkpoint counts."""
    job.require(job.own_seals)
    data = encode(sealed)
    _decode(data)  # do not seal what cannot be read
    write_atomic(seal_path(job, sealed.number), data)


def forget(job: JobDirectory, sealed: OwnSeal) -> None:
    """Remove a seal, whose checkpoint no longer counts."""
    with contextlib.suppress(FileNotFoundError):
        seal_path(job, sealed.number).unlink()


def seals(job: JobDirectory) -> list[OwnSeal]:
    """Return the readable seals, newest first."""
    found = []
    for path in job.found(job.own_seals, "[0-9]*.json"):
        with contextlib.suppress(OSError, CheckpointError):
            one = _decode(read_bounded(path, MAX_MANIFEST_BYTES))
            if path == seal_path(job, one.number):
                found.append(one)
    return sorted(found, key=lambda one: one.age, reverse=True)


def newer(one: OwnSeal | None, other: OwnSeal) -> OwnSeal:
    """Return which of two seals a restart would use."""
    return other if one is None or other.age > one.age else one


def sort_anew(
    job: JobDirectory, every: Iterable[OwnSeal], is_second: Callable[[Path], bool]
) -> list[OwnSeal]:
    """Return seals in their order now that other patterns may be given, or in another order.

    Raises:
        OSError: one that has to be written anew cannot be.
    """
    found = []
    for one in every:
        second = is_second(Path(one.path))
        found.append(msgspec.structs.replace(one, second=second))
        if second != one.second:
            write(job, found[-1])
    return sorted(found, key=lambda one: one.age, reverse=True)


def _decode(data: bytes) -> OwnSeal:
    found = decode_signed(data, OwnSeal)
    check_files(found.files)
    if not 0 < found.number <= MAX_NUMBER or not 0 <= found.step <= MAX_NUMBER:
        raise CheckpointRejected("the seal holds a number beyond any job's")
    if not found.path.startswith("/") or (found.is_file and len(found.files) != 1):
        raise CheckpointRejected("the seal is of no path")
    return found


def verify(sealed: OwnSeal, advance: Advance | None = None, root: Path | None = None) -> None:
    """Check that a checkpoint is as it was sealed: sizes, and with ``advance`` every byte.

    Args:
        root: where its files are, if not where the script wrote them.

    Raises:
        CheckpointRejected: it is not.
        OSError: it cannot be read; it may still be good.
    """
    place = root or sealed.root
    inside = {place}
    for entry in sealed.files:
        check_size(place, entry, inside)
    if not sealed.is_file:
        listed = {entry.path for entry in sealed.files}
        added = next((name for name, *_ in stamps_of(place) if name not in listed), None)
        if added is not None:
            raise CheckpointRejected(f"{printable(added)} was added after the seal")
    if advance is not None:
        verify_files(place, sealed.files, advance)


def where_intact(job: JobDirectory, sealed: OwnSeal) -> Path:
    """Return where a checkpoint is intact: in its place, or in its copy; raises as :func:`verify`.

    A copy stands for an original that the script is overwriting at this moment.
    """
    path = Path(sealed.path)
    try:
        verify(sealed)
        if not sealed.copied or changed_at(stamps_of(path)) == sealed.changed:
            return path
    except (CheckpointError, OSError):
        if not sealed.copied:
            raise
    copy = copies_of(job, sealed.number)
    verify(sealed, root=copy)
    return copy / sealed.files[0].path if sealed.is_file else copy
