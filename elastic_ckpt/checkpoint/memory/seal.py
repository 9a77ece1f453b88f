"""The seal of a generation: sizes without digests, and whose files they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    SealBody,
    SealHeader,
    check_files,
    check_header,
    decode_signed,
    fields_of,
)
from elastic_ckpt.policy.retention import Retention


class Share(msgspec.Struct, frozen=True):
    """A node's share of a checkpoint of several nodes: what its ranks hold in its memory.

    Attributes:
        first, count: its ranks.
        host, port, token: where its supervisor serves that to other nodes, and the secret that it
            asks for.
        domain: what fails together with it: a zone, a rack, a switch.
        leaves: its node leaves the job. In the last seal host, port and token are then those of
            the node that keeps the share from now on.
    """

    first: int
    count: int
    host: str = ""
    port: int = 0
    token: str = ""
    domain: str = ""
    leaves: bool = False

    @property
    def ranks(self) -> range:
        """The ranks of the node."""
        return range(self.first, self.first + self.count)


class SharePlaces(msgspec.Struct, frozen=True):
    """Where the shares of a checkpoint are that an earlier run sealed, or whose nodes have gone."""

    attempt: str
    share: Share
    others: tuple[Share, ...]


class MemorySeal(SealBody, frozen=True, kw_only=True):
    """The seal of a generation on the memory tier: sizes and attempt, no digests.

    Attributes:
        seconds: what the save took until here.
        retention: what to keep once this is on disk; the supervisor's own goes before it.
        share: the ranks whose files are here; None if that is all of them.
        others: the shares of the other nodes, on the node whose seal is the last: the leader's, or
            one that stays if that leaves.
        guards: the other nodes' shares of which this node keeps a replica.
    """

    seconds: float = 0.0
    retention: Retention = Retention()
    share: Share | None = None
    others: tuple[Share, ...] = ()
    guards: tuple[Share, ...] = ()

    @property
    def ranks(self) -> range:
        """The ranks whose files are here."""
        return range(self.world_size) if self.share is None else self.share.ranks

    @property
    def is_whole(self) -> bool:
        """Whether the files of all ranks are here."""
        return self.ranks == range(self.world_size)

    @property
    def is_last(self) -> bool:
        """Whether it makes a checkpoint: all is here, or it says where the other shares are."""
        return self.is_whole or bool(self.others)


def make_memory_seal(header: SealHeader, files: Iterable[FileEntry], **about: Any) -> MemorySeal:
    """The seal of a generation with these files; ``about`` as the attributes of the seal."""
    listed = sorted(files, key=lambda entry: entry.path)
    return MemorySeal(**fields_of(header), files=listed, **about)


def decode_memory_seal(data: bytes) -> MemorySeal:
    """Decode and check a generation's seal; raises as :func:`decode_manifest` does."""
    seal = decode_signed(data, MemorySeal)
    check_files(seal.files, digests=False)
    check_header(seal)
    return seal
