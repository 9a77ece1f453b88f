"""The memory tier of a job on several nodes, as its ranks see it.

A save goes into a generation on every node; the leader's seal, which is the last, makes it a
checkpoint. If the leader's node leaves, the last seal is that of a node that stays. A load takes
the newest attempt of which all ranks' files are in the memory of nodes that are here: what other
nodes have is brought to each node, verified on arrival.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader, header_of
from elastic_ckpt.checkpoint.memory.generation import NAME, Generation
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.part import MemoryAttempt, MemoryPart
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share, make_memory_seal
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.client import NodeMemory
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by, keepers, sealer
from elastic_ckpt.checkpoint.nodes.reading import SharesReading, can_load, clear_brought
from elastic_ckpt.checkpoint.nodes.replica import replicas
from elastic_ckpt.checkpoint.tier import Reading, Ref, Stored, TierFull
from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError, NodeLost, StorageFailed
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import read_bounded, remove_tree
from elastic_ckpt.util.text import printable

_MAX_PART_BYTES: Final = 64 * 1024 * 1024
_cleared: set[Path] = set()
_Files = msgspec.json.Decoder(list[FileEntry])


class HeldShare(msgspec.Struct, frozen=True):
    """A share of a checkpoint that a node has in memory: its own, or a replica of another's; its
    checkpoint ``was_drained`` if that has been on the disk, or in the bucket."""

    header: SealHeader
    first: int
    count: int
    is_replica: bool = False
    was_drained: bool = False


class NodeReport(msgspec.Struct, frozen=True):
    """What a node has in memory, and where that is served."""

    share: Share
    held: list[HeldShare] = []


class NodesMemory(MemoryTier):
    """See :class:`elastic_ckpt.checkpoint.tier.Tier`; one rank of each node acts for it.

    Args:
        share: this node's ranks, and where others reach what they have written; port 0 if the node
            has no memory for it, so that no save goes into memory.
        acts: whether this rank is the one.
        replicas: how many other nodes keep a copy of each share.
    """

    def __init__(
        self,
        root: Path,
        share: Share,
        *,
        acts: bool,
        replicas: int = 0,
        mappings: Mappings | None = None,
        session: str = "",
    ) -> None:
        super().__init__(root, mappings, session)
        self.share = share
        self.acts = acts
        self.replicas = replicas
        self._reports: list[NodeReport] = []
        self._known: dict[str, tuple[Share, ...]] = {}

    def of_session(self, name: str) -> NodesMemory:
        return NodesMemory(
            self.root, self.share, acts=self.acts, replicas=self.replicas,
            mappings=self._mappings, session=name,
        )  # fmt: skip

    # -- saving -------------------------------------------------------------------------------

    def make_room(self, step: int, size: int, *, replaces: bool) -> str:
        """Take a generation for this node's share of ``size`` bytes; return its name. One rank of
        each node. TierFull or OSError without room."""
        if not self.share.port:
            raise TierFull(0, "it has no memory tier")
        begun = self.begin(step, size, replaces=replaces)
        parts = self.root / begun.ref.name / "parts"
        remove_tree(parts)
        parts.mkdir(mode=0o700)
        return begun.ref.name

    def attempt(
        self, slot: str, identity: str, shares: Sequence[Share], hand_over_seconds: float = 0.0
    ) -> SharesAttempt:
        """Return the attempt that is written into a generation of this node; ``shares`` are those
        of all nodes. If some leave, ``hand_over_seconds`` is what that should take at most."""
        generation = self._generation(Ref(NAME, slot))
        own = next(one for one in shares if one.first == self.share.first)
        staying = [one for one in shares if not one.leaves]
        guards = () if own.leaves else guarded_by(own, staying, self.replicas)
        made = SharesAttempt(generation, identity, self._mappings, own, shares, guards)
        made.hand_over_seconds, made.acts = hand_over_seconds, self.acts
        return made

    # -- loading ------------------------------------------------------------------------------

    def report(self) -> bytes:
        """Return what this node has in memory, encoded, for :meth:`take_in`; nothing from ranks
        that do not act for their node."""
        if not self.acts:
            return b""
        if self.root not in _cleared:  # what this process brings it removes itself
            _cleared.add(self.root)
            clear_brought(self.root)
        kept = [one for one in replicas(self.root) if one.seal.session == self._session]
        held = [
            HeldShare(
                header_of(one.seal),
                one.seal.ranks.start,
                len(one.seal.ranks),
                is_replica,
                one.generation.is_settled(one.seal),
            )
            for found, is_replica in ((kept, True), (self.own(), False))
            for one in found
        ]
        return msgspec.json.encode(NodeReport(self.share, held))

    def take_in(self, reports: Iterable[bytes]) -> None:
        """Note what all nodes have. Leader only."""
        decode = msgspec.json.Decoder(NodeReport).decode
        self._reports = [decode(one) for one in reports if one]

    def candidates(self, world_size: int) -> list[Stored]:
        """Return what is complete on the nodes that are here, for these ranks to load; nothing if a
        node has no memory to bring it to."""
        found: list[Stored] = []
        if not all(report.share.port for report in self._reports):
            return found
        for attempt, header in self._headers().items():
            if not can_load(header, world_size):
                continue
            if self._shares(attempt, header.world_size):
                seal = make_memory_seal(header, ())
                found.append(Stored(Ref(NAME, "", attempt), (header.epoch, header.step), seal))
        return sorted(found, key=lambda one: one.key, reverse=True)

    def was_drained(self, attempt: str) -> bool:
        """Return whether any node knows that an attempt has been on the disk. Leader only."""
        every = (one for report in self._reports for one in report.held)
        return any(one.was_drained for one in every if one.header.attempt == attempt)

    def newest(self) -> Stored | None:
        return None  # no process knows it alone

    def tell(self, ref: Ref) -> bytes:
        """Return where the shares of a candidate are, encoded, for :meth:`learn`. Leader only."""
        header = self._headers()[ref.attempt]
        return msgspec.json.encode(self._shares(ref.attempt, header.world_size))

    def learn(self, ref: Ref, told: bytes) -> None:
        """Note where the shares of an attempt are, before :meth:`open`. Every rank."""
        self._known[ref.attempt] = msgspec.json.decode(told, type=tuple[Share, ...])

    def open(self, ref: Ref) -> Reading:
        if ref.attempt not in self._known:
            raise CheckpointRejected("where it is was not said")
        own = next((one for one in self.own() if one.seal.attempt == ref.attempt), None)
        return SharesReading(self.root, ref, self.share, own, self._known[ref.attempt])

    def where(self, ref: Ref) -> str:
        return f"the memory of the nodes, {self.root}"

    def _headers(self) -> dict[str, SealHeader]:
        return {one.header.attempt: one.header for report in self._reports for one in report.held}

    def _shares(self, attempt: str, world_size: int) -> tuple[Share, ...]:
        """Return shares that have each rank once, in the order of ranks; none if one is missing. A
        replica counts where the node itself is gone."""
        held = [(one, report.share) for report in self._reports for one in report.held]
        held.sort(key=lambda one: not one[0].is_replica)
        found: dict[int, Share] = {}
        for one, node in held:
            if one.header.attempt == attempt and one.count > 0:
                found[one.first] = msgspec.structs.replace(
                    node, first=one.first, count=one.count, leaves=one.is_replica
                )
        shares: list[Share] = []
        following = 0
        while following < world_size and following in found:
            shares.append(found[following])
            following += found[following].count
        return tuple(shares) if following == world_size else ()


class SharesPart(MemoryPart):
    """A part whose list of files lies beside them, for the rank that seals its node's share."""

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        files = super().finish(world_size, header)
        (_parts(self._directory.parent) / str(self.rank)).write_bytes(msgspec.json.encode(files))
        return files


class SharesAttempt(MemoryAttempt):
    """One save, as the ranks of one node write it. See ``checkpoint/tier.py``.

    Attributes:
        acts: whether this rank seals its node's share.
    """

    hand_over_seconds: float = 0.0
    acts = False

    def __init__(
        self,
        generation: Generation,
        identity: str,
        mappings: Mappings,
        share: Share,
        shares: Sequence[Share],
        guards: tuple[Share, ...],
    ) -> None:
        super().__init__(generation, identity, mappings)
        self._share = share
        self._shares = shares
        self._guards = guards

    @property
    def seals(self) -> bool:
        """Whether the seal of this node's share is the last one."""
        return self._share == sealer(self._shares)

    @property
    def hands_over(self) -> bool:
        """Whether nodes leave, whose shares others have to keep before it is sealed."""
        return any(one.leaves for one in self._shares)

    def hand_over(self, limit: float) -> Share:
        """Have a node that stays keep this node's share; return the share as it is there. One rank
        of a node that leaves, between :meth:`seal_share` and :meth:`seal`.

        Args:
            limit: in monotonic seconds.

        Raises:
            NodeLost: the last node that was asked did not have it in time.
            CheckpointRejected: it cannot take it, or no other node stays.
        """
        refused: ElasticCkptError = CheckpointRejected("no other node stays")
        for keeper in keepers(self._share, self._shares):
            try:
                with NodeMemory(keeper) as node:
                    node.keep(self.ref.attempt, self._share, limit)
            except (NodeLost, CheckpointRejected) as error:
                refused = error
                continue
            first, count = self._share.first, self._share.count
            return msgspec.structs.replace(keeper, first=first, count=count, leaves=True)
        raise refused

    def note_keeper(self, host: str) -> None:
        """Record on a node that leaves, once the checkpoint is sealed, who keeps its share."""
        seal = self._generation.seal()
        if seal is not None:
            self._generation.note_keeper(seal, host)

    def refuse_twins(self, paths: Iterable[Iterable[Iterable[str]]]) -> None:
        """Raise StorageFailed if two nodes have a file each of one path, which a directory that
        they share has once: the disk gets the save.

        Args:
            paths: lists of the ranks' paths in order; empty where nothing is known of them.
        """
        holders: dict[str, int] = {}
        for rank, lists in enumerate(zip(*paths, strict=True)):
            node = next(one.first for one in self._shares if rank in one.ranks)
            for name in chain(*lists):
                if holders.setdefault(name, node) != node:
                    told = f"{printable(name, 200)} was written on another node as well"
                    raise StorageFailed(rank, told)

    def part(self, rank: int) -> SharesPart:
        return SharesPart(self._generation, rank, self._mappings)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> Ref:
        """Seal the leader's share, which makes it a checkpoint: the others are sealed by then."""
        own = [entry for entry in files if entry.rank in self._share.ranks]
        self._seal_share(header, own, retention, self._others(()))
        return self.ref

    def seal_last(self, header: SealHeader, retention: Retention, kept: Sequence[Share]) -> None:
        """As :meth:`seal`, if nodes leave: ``kept`` is where their shares are from now on. One rank
        of the node that :attr:`seals`."""
        self._seal_share(header, self._own_files(), retention, self._others(kept))

    def seal_share(self, header: SealHeader) -> None:
        """Seal a share that is not the last. One rank of its node, when every rank of the job has
        finished its part."""
        self._seal_share(header, self._own_files(), Retention(), ())

    def _own_files(self) -> list[FileEntry]:
        paths = [_parts(self._generation.slot) / str(rank) for rank in self._share.ranks]
        return [
            entry for one in paths for entry in _Files.decode(read_bounded(one, _MAX_PART_BYTES))
        ]

    def _others(self, kept: Sequence[Share]) -> tuple[Share, ...]:
        where = {one.first: one for one in kept}
        others = [one for one in self._shares if one.first != self._share.first]
        return tuple(where.get(one.first, one) for one in others)

    def _seal_share(
        self,
        header: SealHeader,
        files: Sequence[FileEntry],
        retention: Retention,
        others: tuple[Share, ...],
    ) -> None:
        seal: MemorySeal = make_memory_seal(
            header, files, retention=retention, seconds=self._seconds, share=self._share,
            others=others, guards=self._guards,
        )  # fmt: skip
        self._close(seal)


def _parts(slot: Path) -> Path:
    return slot / "parts"


def new_identity() -> str:
    """Return the identity of an attempt that no other has."""
    return secrets.token_hex(8)
