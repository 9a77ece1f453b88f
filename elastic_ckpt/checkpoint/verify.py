"""Verification: a checkpoint is intact (sizes) and verified (every byte).

Nothing here unpickles, follows a link, or opens a path that the manifest's own check refused.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import stat
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.hashed_file import hash_file
from elastic_ckpt.checkpoint.disk.side_by_side import side_by_side
from elastic_ckpt.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    SealHeader,
    decode_manifest,
)
from elastic_ckpt.errors import CheckpointRejected, DirectoryUnusable, NotSealed
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.util.files import (
    files_below,
    open_regular,
    read_bounded,
    read_with_time,
    write_atomic,
)
from elastic_ckpt.util.progress import Advance, ignore
from elastic_ckpt.util.text import printable

MANIFEST_NAME: Final = "manifest.json"

_OPENING_BYTES: Final = 256 * 1024
"""Opening a file costs about as much as reading this many bytes."""

_LOADED: Final = ("modeling/", "optimizer/", "precision/", "lr_scheduler", "ranks/")
"""What an engine reads. A file here that the manifest does not list might get unpickled."""

_LOADED_NAMES: Final = frozenset({"running_states.json", "session_state.json"})


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointRejected: it is missing (NotSealed) or invalid.
        UnsupportedFormat: a newer version wrote it.
        OSError: it could not be read; the checkpoint may still be good.
    """
    return _read(checkpoint)[0]


def read_sealed(checkpoint: Path) -> tuple[Manifest, float]:
    """Return the manifest of a sealed checkpoint, whose files nothing is known of, and when it was
    written, in seconds since 1970. Raises as :func:`read_manifest`, and if it is another's."""
    manifest, written = _read(checkpoint)
    name = manifest.checkpoint_name
    # A superseded one has a suffix.
    if checkpoint.name.startswith("epoch-") and not f"{checkpoint.name}-".startswith(f"{name}-"):
        raise CheckpointRejected(f"its manifest says {name}: the directory was renamed or mixed up")
    return manifest, written


def _read(checkpoint: Path) -> tuple[Manifest, float]:
    try:
        data, written = read_with_time(checkpoint / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise NotSealed("not sealed: it has no manifest.json") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EINVAL):  # a link, a socket, a FIFO
            raise CheckpointRejected("manifest.json is not a regular file") from None
        if error.errno == errno.EFBIG:
            raise CheckpointRejected(f"manifest.json is {error.strerror}") from None
        raise
    return decode_manifest(data), written


def verify_quick(checkpoint: Path) -> Manifest:
    """Return the manifest of an intact checkpoint: sealed, every file with its size. Raises as
    :func:`read_manifest`."""
    manifest, _ = read_sealed(checkpoint)
    verify_sizes(checkpoint, manifest.files)
    return manifest


def verify_sizes(checkpoint: Path, entries: Iterable[FileEntry]) -> None:
    """Raise CheckpointRejected unless these files exist with their sizes, and no other that an
    engine would read."""
    inside: set[Path] = {checkpoint}
    listed: set[str] = set()
    for entry in entries:
        check_size(checkpoint, entry, inside)
        listed.add(entry.path)
    try:
        found = files_below(checkpoint)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise  # the storage's fault, not the checkpoint's
        raise CheckpointRejected(str(error.strerror)) from None
    for path in found:
        loaded = path.startswith(_LOADED) or path in _LOADED_NAMES
        if loaded and path not in listed and "/.nfs" not in path:
            raise CheckpointRejected(f"{printable(path)} is not in the manifest")


def verify_files(checkpoint: Path, entries: Iterable[FileEntry], advance: Advance = ignore) -> None:
    """Hash these files; a mismatch counts only if a second, fresh read confirms it.

    What was read stays in the page cache: a load that follows reads nothing from the disk again.

    Args:
        advance: called with each number of bytes read; may raise.

    Raises:
        CheckpointRejected: a file does not match the manifest.
        OSError: a file could not be read; the checkpoint may still be good.
    """
    listed = list(entries)
    total = sum(entry.bytes for entry in listed)
    side_by_side(partial(_verify_file, checkpoint), listed, total, advance)


def _verify_file(checkpoint: Path, file: FileEntry, advance: Advance) -> None:
    path = checkpoint / file.path
    expected = (file.bytes, file.xxh3_128)
    try:
        if hash_file(path, advance) == expected:
            return
        _forget_cache(path)
        if hash_file(path) == expected:
            return
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise
        # It was a regular file when the sizes were compared.
        raise CheckpointRejected(f"{file.path} is not a regular file") from None
    raise CheckpointRejected(f"{file.path} does not match its checksum")


def verify_full(checkpoint: Path, advance: Advance = ignore) -> Manifest:
    """Verify every byte of a checkpoint; raises as :func:`verify_quick`."""
    manifest = verify_quick(checkpoint)
    verify_files(checkpoint, manifest.files, advance)
    return manifest


def share_out(entries: Iterable[FileEntry], rank: int, world_size: int) -> list[FileEntry]:
    """Return the files that a rank hashes; all ranks read about the same number of bytes."""
    shares: list[list[FileEntry]] = [[] for _ in range(world_size)]
    loads = [(0, index) for index in range(world_size)]
    for entry in sorted(entries, key=lambda entry: (-entry.bytes, entry.path)):
        load, index = heapq.heappop(loads)
        shares[index].append(entry)
        heapq.heappush(loads, (load + entry.bytes + _OPENING_BYTES, index))
    return shares[rank]


class Unchanged:
    """Detects files that were written to after they were hashed.

    A name outside the checkpoint (a hard link) is enough to do that between the hashing and the
    load. A new time alone proves nothing, a backup makes one; so such a file is hashed again.
    """

    def __init__(self, checkpoint: Path, entries: Sequence[FileEntry]) -> None:
        self._checkpoint = checkpoint
        self._entries = entries
        self._before = self._stamps()

    def check(self) -> None:
        """Raise CheckpointRejected if a file is no longer what was hashed."""
        try:
            verify_files(self._checkpoint, self.touched())
        except (CheckpointRejected, FileNotFoundError) as error:
            raise CheckpointRejected(f"it was changed while it was loaded: {error}") from None

    def touched(self) -> list[FileEntry]:
        """Return the files that may have changed."""
        after = self._stamps()
        return [entry for entry in self._entries if self._before[entry] != after[entry]]

    def _stamps(self) -> dict[FileEntry, tuple[int, ...] | None]:
        return {entry: _stamp(self._checkpoint / entry.path) for entry in self._entries}


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_size(checkpoint: Path, entry: FileEntry, inside: set[Path]) -> None:
    """Raise CheckpointRejected unless a file is there, regular, with its size; ``inside`` has the
    directories that are known to be no links."""
    path = checkpoint / entry.path
    try:
        _check_parent(path.parent, entry, inside)
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointRejected(f"{entry.path} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointRejected(f"{entry.path} is not a regular file")
    if status.st_size != entry.bytes:
        raise CheckpointRejected(
            f"{entry.path} has {status.st_size} bytes instead of {entry.bytes}"
        )


def _check_parent(directory: Path, entry: FileEntry, inside: set[Path]) -> None:
    """Check from the top down, so that nothing is followed through a link."""
    if directory in inside:
        return
    _check_parent(directory.parent, entry, inside)
    if stat.S_ISLNK(os.lstat(directory).st_mode):
        raise CheckpointRejected(f"{entry.path} leads out of the checkpoint through a link")
    inside.add(directory)


def _forget_cache(path: Path) -> None:
    """Ask the kernel to read the file from its disk again."""
    with open(open_regular(path), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mark_verified(job: JobDirectory, checkpoint: Path, manifest: SealHeader) -> None:
    """Record that every byte was read and matched, if the directory can be written."""
    with contextlib.suppress(OSError, DirectoryUnusable):
        is_named = checkpoint_key(checkpoint.name) is not None and checkpoint.parent == job.root
        if not is_named and checkpoint.parent != job.superseded:
            return
        if not job.owns(job.control):
            return
        job.require(job.verified)
        write_atomic(job.verified / checkpoint.name, manifest.attempt.encode())


def is_verified(job: JobDirectory, checkpoint: Path, manifest: SealHeader) -> bool:
    """Return whether this very checkpoint, not another of its name, was verified."""
    return job.owns(job.verified) and is_marked(job, checkpoint, manifest.attempt)


def is_marked(job: JobDirectory, checkpoint: Path, attempt: str) -> bool:
    """Return whether one of :func:`marked` was verified as that attempt."""
    try:
        return read_bounded(job.verified / checkpoint.name, 64) == attempt.encode()
    except OSError:
        return False


def marked(job: JobDirectory) -> frozenset[str]:
    """Return the names of the checkpoints that may have been verified: look at no others."""
    try:
        return frozenset(os.listdir(job.verified) if job.owns(job.verified) else ())
    except OSError:
        return frozenset()


def unmark(job: JobDirectory, checkpoint: Path) -> None:
    """Remove the record that a checkpoint was verified."""
    if not job.owns(job.verified):
        return
    with contextlib.suppress(OSError):
        (job.verified / checkpoint.name).unlink(missing_ok=True)
