"""The chunks that the ranks of a machine want of a checkpoint, each fetched once for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.ranges.chunks import Chunk, LocalChunks, chunks_in
from elastic_ckpt.checkpoint.tier import Ranges
from elastic_ckpt.checkpoint.verify import Unchanged
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.progress import Watch

_WANTED: Final = ".wanted"
"""A directory beside the files, in which each rank says what it wants. ``verify`` removes what an
earlier load has left there, as no manifest lists it."""

_MAX_WANTED_BYTES: Final = 64 * 1024 * 1024


class ChunkRest:
    """See :class:`elastic_ckpt.checkpoint.tier.Rest`.

    Args:
        files: those that have digests of their chunks and are not here in full.
        rank, of: this rank's number among those of the machine.
        what: describes it to people.
    """

    def __init__(
        self,
        files: Sequence[FileEntry],
        here: LocalChunks,
        directory: Path,
        rank: int,
        of: int,
        what: str,
    ) -> None:
        self._files = files
        self._here = here
        self._directory = directory
        self._rank = rank
        self._of = of
        self._what = what
        self._mine = self._firsts()
        self._unchanged: Unchanged | None = None

    def begin(self, watch: Watch) -> None:
        """Make this rank's share of the files, and bring the first chunk of each; raises as
        :meth:`bring`."""
        for entry in self._files[self._rank :: self._of]:
            self._here.make(entry)
        self._bring(self._mine, watch)

    def want(self, ranges: Ranges | None) -> None:
        """Write down the chunks in which these ranges lie."""
        wanted = {entry.path: sorted(chunks_in(entry, ranges)) for entry in self._files}
        place = self._directory / _WANTED
        place.mkdir(mode=0o700, exist_ok=True)
        (place / str(self._rank)).write_bytes(msgspec.json.encode(wanted))

    def bring(self, watch: Watch) -> None:
        """Bring every so many-th of the chunks that the ranks have written down."""
        wanted: set[tuple[str, int]] = set()
        for rank in range(self._of):
            data = read_bounded(self._directory / _WANTED / str(rank), _MAX_WANTED_BYTES)
            for path, indexes in msgspec.json.decode(data, type=dict[str, list[int]]).items():
                wanted.update((path, index) for index in indexes)
        left = [
            Chunk.of(entry, index)
            for entry in self._files
            for index in range(1, len(entry.chunks))  # the first one is here
            if (entry.path, index) in wanted
        ]
        left.sort(key=lambda chunk: chunk.begin)  # writes to one file wait for each other
        share = left[self._rank :: self._of]
        self._bring(share, watch)
        self._mine += share

    def settle(self) -> None:
        """Note what the files are like now; all ranks have written to them."""
        mine = {chunk.path for chunk in self._mine}
        self._unchanged = Unchanged(
            self._directory, [entry for entry in self._files if entry.path in mine]
        )

    def confirm(self) -> None:
        """As :meth:`elastic_ckpt.checkpoint.tier.Reading.confirm`."""
        if self._unchanged is None:
            raise CheckpointRejected("it was not verified")
        touched = {entry.path for entry in self._unchanged.touched()}
        self._here.check(chunk for chunk in self._mine if chunk.path in touched)

    def _firsts(self) -> list[Chunk]:
        return [Chunk.of(entry, 0) for entry in self._files[self._rank :: self._of]]

    def _bring(self, chunks: list[Chunk], watch: Watch) -> None:
        self._here.bring(chunks, watch(self._what, sum(chunk.bytes for chunk in chunks)))
