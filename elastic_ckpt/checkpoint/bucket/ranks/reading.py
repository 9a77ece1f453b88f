"""A checkpoint in a bucket that the ranks of a machine load from local files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.attempt import local_files
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.source import AHEAD, in_bucket
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.disk.hashed_file import hash_file
from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest
from elastic_ckpt.checkpoint.ranges.chunks import Chunk, LocalChunks, is_cut
from elastic_ckpt.checkpoint.ranges.rest import ChunkRest
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.checkpoint.verify import Unchanged, share_out
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import files_below
from elastic_ckpt.util.progress import Advance, Watch


class LocalRank(NamedTuple):
    """A rank's place among those of its machine, which bring a checkpoint there together."""

    rank: int
    of: int
    nodes: int = 1


class BucketReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`. The ranks of a machine bring there what
    they will read, but for what it still has."""

    def __init__(
        self, store: Bucket, job: JobDirectory, key: SealKey, ref: Ref, local: LocalRank | None
    ) -> None:
        """Raises as the protocol's ``open``."""
        self.ref = ref
        self.seal: Manifest = catalog.read_intact(store, key)
        self.path = local_files(job, key)
        self._store = store
        self._key = key
        self._local = local
        self._unchanged: Unchanged | None = None
        self.rest: ChunkRest | None = None
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(self._fd, fcntl.LOCK_SH)  # against tidy()

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        if self._local is not None:
            rank, world_size = self._local.rank, self._local.of
        self._drop_unlisted()
        ahead = max(1, AHEAD // world_size)  # what is on its way is in memory, once for each rank
        what = f"bringing {self._key.name} here"
        large = [entry for entry in self.seal.files if is_cut(entry)]
        whole = [entry for entry in self.seal.files if not is_cut(entry)]
        mine = share_out(whole, rank, world_size)
        self._bring_whole(mine, ahead, watch(what, sum(entry.bytes for entry in mine)))
        self._unchanged = Unchanged(self.path, mine)
        if large:
            here = LocalChunks(self._fetch, self.path, ahead)
            rest = ChunkRest(large, here, self.path, rank, world_size, what)
            rest.begin(watch)
            self.rest = rest

    def _bring_whole(self, mine: Sequence[FileEntry], ahead: int, advance: Advance) -> None:
        missing: list[FileEntry] = []
        for entry in mine:
            if _has(self.path, entry):
                advance(entry.bytes)
            else:
                missing.append(entry)
        with in_bucket(self._store, self._key, missing, ahead) as source:
            for entry in missing:
                _write(self.path / entry.path, source(entry), advance)

    def _fetch(self, chunk: Chunk) -> memoryview:
        return self._store.get_range(self._key.data + chunk.path, chunk.begin, chunk.bytes)

    def _drop_unlisted(self) -> None:
        """Remove what an engine might read and no digest covers; the ranks write what is listed."""
        listed = {entry.path for entry in self.seal.files}
        for path in files_below(self.path):
            if path not in listed:
                (self.path / path).unlink(missing_ok=True)

    def confirm(self) -> None:
        if self._unchanged is None:
            raise CheckpointRejected("it was not verified")
        self._unchanged.check()
        if self.rest is not None:
            self.rest.confirm()

    def mark_verified(self) -> None:
        """Do nothing: every load verifies what it brings."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _has(directory: Path, entry: FileEntry) -> bool:
    try:
        if os.lstat(directory / entry.path).st_size != entry.bytes:
            return False
        return hash_file(directory / entry.path) == (entry.bytes, entry.xxh3_128)
    except OSError:
        return False


def _write(path: Path, source: Iterator[memoryview], advance: Advance) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb", buffering=0) as file:
        for data in source:
            view = data
            while view:
                view = view[file.write(view) :]
            advance(len(data))
