"""The digests of a file, of all of it and of each chunk, in one pass over its bytes."""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, FileEntry

BLOCK_BYTES: Final = 256 * 1024
"""Hashed at once: what two digests read one after the other still lies in the core's cache."""


class Digest(NamedTuple):
    """What a manifest says of a file's contents; ``chunks`` as in :class:`FileEntry`."""

    bytes: int
    xxh3_128: str
    chunks: tuple[str, ...] = ()

    def entry(self, path: str, rank: int) -> FileEntry:
        """Return the file's entry in a manifest."""
        return FileEntry(path, self.bytes, self.xxh3_128, rank, self.chunks)


class FileDigest:
    """Hashes a file that is written, or read, from its beginning to its end."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._chunk = xxhash.xxh3_128()
        self._chunks: list[str] = []
        self._bytes = 0

    def update(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            left = CHUNK_BYTES - self._bytes % CHUNK_BYTES
            block = data[: left if self._bytes < CHUNK_BYTES else min(left, BLOCK_BYTES)]
            self._whole.update(block)
            if self._bytes >= CHUNK_BYTES:  # up to there the whole is the first chunk
                self._chunk.update(block)
            self._bytes += len(block)
            if len(block) == left:
                self._end_chunk()
            data = data[len(block) :]

    def finish(self) -> Digest:
        """Return the digests of what was appended."""
        chunks = list(self._chunks)
        if self._bytes % CHUNK_BYTES:
            chunks.append(self._chunk.hexdigest())
        found = tuple(chunks) if self._bytes > CHUNK_BYTES else ()
        return Digest(self._bytes, self._whole.hexdigest(), found)

    def _end_chunk(self) -> None:
        digest = self._chunk if self._chunks else self._whole
        self._chunks.append(digest.hexdigest())
        self._chunk.reset()


def digest_bytes(data: bytes) -> Digest:
    """Return the digests of a file with these contents."""
    digest = FileDigest()
    digest.update(memoryview(data))
    return digest.finish()
