"""A part that goes straight into a bucket: a drain copies it there from memory, past the disk."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.transfer import SMALL_BYTES
from elastic_ckpt.checkpoint.disk.file_digest import Digest, FileDigest
from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader
from elastic_ckpt.checkpoint.part_files import PartFiles
from elastic_ckpt.errors import CheckpointRejected

PIECE_BYTES: Final = 4 * 1024 * 1024
"""Handed to the store at once."""

_PIECES_AHEAD: Final = 2
_LOOK_SECONDS: Final = 0.1


class UploadedPart(PartFiles):
    """A part whose files are uploaded while they are written, one at a time.

    What an earlier try has uploaded is not sent again: an object appears whole, under a name that
    only this attempt of this owner has.
    """

    def __init__(self, store: Bucket, prefix: str, rank: int) -> None:
        super().__init__(Path(), rank)
        self._store = store
        self._prefix = prefix
        self._there: dict[str, int] | None = None

    def _create(self, path: str, size: int | None, paged: bool) -> _FileInBucket:
        del paged
        key = self._prefix + path
        if size is not None and self._known().get(key) == size:
            return _FileInBucket()
        if size is not None and size <= SMALL_BYTES:
            return _SmallFile(self._store, key)
        return _LargeFile(self._store, key, size or 0)

    def _known(self) -> dict[str, int]:
        if self._there is None:
            pages = self._store.listing(self._prefix)
            self._there = {one.key: one.bytes for page in pages for one in page}
        return self._there

    def claim(self, path: str) -> None:
        raise CheckpointRejected(f"{path} is not in memory")

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Return the files, all of which are in the bucket by now."""
        del world_size, header
        return list(self._entries.values())


class _FileInBucket:
    """One that is in the bucket already; only its digest is made."""

    error: OSError | None = None

    def __init__(self) -> None:
        self._digest = FileDigest()

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:  # or an error would keep the caller's buffer
            self._send(view)
            self._digest.update(view)
            return len(view)

    def _send(self, view: memoryview) -> None:
        """Send bytes on their way to the store."""

    def flush(self) -> None:
        """Do nothing; nothing is held back that the store could take."""

    def finish(self) -> Digest:
        return self._digest.finish()

    def close(self) -> None:
        """Give up what is not finished. A repeat does nothing."""


class _SmallFile(_FileInBucket):
    """One that a single request writes."""

    def __init__(self, store: Bucket, key: str) -> None:
        super().__init__()
        self._store = store
        self._key = key
        self._data = bytearray()

    def _send(self, view: memoryview) -> None:
        self._data += view

    def finish(self) -> Digest:
        self._store.put(self._key, bytes(self._data))
        return super().finish()


class _LargeFile(_FileInBucket):
    """One that a thread uploads while it is written, a few pieces behind."""

    def __init__(self, store: Bucket, key: str, size: int) -> None:
        super().__init__()
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(_PIECES_AHEAD)
        self._is_given_up = False
        self._pool = ThreadPoolExecutor(1, "upload")
        self._upload = self._pool.submit(store.upload, key, self._taken(), size)

    def _send(self, view: memoryview) -> None:
        for begin in range(0, len(view), PIECE_BYTES):
            # A copy: the caller may reuse its buffer, and a store may hold on to what it was given.
            self._hand_over(memoryview(bytes(view[begin : begin + PIECE_BYTES])))

    def finish(self) -> Digest:
        self._hand_over(None)
        self._upload.result()  # bounded as each request of the store is
        return super().finish()

    def close(self) -> None:
        self._is_given_up = True
        self._pool.shutdown()

    def _hand_over(self, piece: memoryview | None) -> None:
        """Wait until the store has taken enough; raise what its upload failed of."""
        while True:
            if self._upload.done():
                self._upload.result()
            try:
                self._pieces.put(piece, timeout=_LOOK_SECONDS)
                return
            except queue.Full:
                continue

    def _taken(self) -> Iterator[memoryview]:
        while True:
            try:
                piece = self._pieces.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if self._is_given_up:
                    raise CheckpointRejected("its upload was given up") from None
                continue
            if piece is None:
                return
            yield piece
