"""Several nodes' memory for tests: tiers that are served, saved into as a job's ranks do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.reading import SharesReading
from elastic_ckpt.checkpoint.nodes.server import MemoryServer
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched
from tests.checkpoints import make_header


class NodeMemories:
    """One tier for each node of one rank, and what its ranks have written: a file per rank."""

    def __init__(
        self,
        job: JobDirectory,
        place: Path,
        count: int,
        replicas: int = 1,
        domains: str = "",
        be_polite: Callable[[], None] = lambda: None,
    ) -> None:
        self.job = job
        self._be_polite = be_polite
        self.contents: dict[str, bytes] = {}
        self.servers: list[MemoryServer] = []
        self.tiers: list[NodesMemory] = []
        self.leaving: set[int] = set()
        """Nodes that are under notice."""
        for number in range(count):
            root = place / f"node{number}"
            root.mkdir(mode=0o700)
            server = self._serve(number, root)
            self.servers.append(server)
            share = Share(number, 1, *server.where, domains[number : number + 1])
            self.tiers.append(NodesMemory(root, share, acts=True, replicas=replicas))

    def _serve(self, number: int, root: Path) -> MemoryServer:
        def leaves() -> bool:
            return number in self.leaving

        def target(session: str) -> DiskTier:
            return DiskTier(self.job.session(session))

        return MemoryServer(MemoryTier(root), target, "127.0.0.1", self._be_polite, leaves)

    def restart(self) -> None:
        """Serve all nodes anew, as their supervisors do under another head."""
        self.close()
        self.servers = [self._serve(number, one.root) for number, one in enumerate(self.tiers)]
        for server, tier in zip(self.servers, self.tiers, strict=True):
            host, port, token = server.where
            tier.share = msgspec.structs.replace(tier.share, host=host, port=port, token=token)

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def save(
        self,
        step: int,
        *,
        size: int = 100_000,
        sizes: Mapping[int, int] = MappingProxyType({}),
        seal: Iterable[int] | None = None,
    ) -> str:
        """Save on all nodes, and seal on all of them, or on some; return the attempt. What nodes
        have that are under notice goes to others before the last seal. ``sizes`` are those of
        ranks that write another size."""
        shares = [
            msgspec.structs.replace(one.share, leaves=number in self.leaving)
            for number, one in enumerate(self.tiers)
        ]
        identity, world_size = f"{step:016x}", len(shares)
        made = [
            one.attempt(
                one.make_room(step, sizes.get(rank, size), replaces=False), identity, shares
            )
            for rank, one in enumerate(self.tiers)
        ]
        header = make_header(DiskAttempt(self.job, identity, step), world_size=world_size)
        files: list[FileEntry] = []
        for rank, attempt in enumerate(made):
            part = attempt.part(rank)
            name = f"modeling/{rank:05d}.safetensors"
            self.contents[name] = bytes([rank + step]) * sizes.get(rank, size) + b"%d" % rank
            part.write(name, self.contents[name])
            files += part.finish(world_size, header if rank == 0 else None)
        sealing = range(world_size) if seal is None else seal
        last = next(rank for rank, attempt in enumerate(made) if attempt.seals)
        for rank in sorted(sealing, reverse=True):
            if rank != last:
                made[rank].seal_share(header)
        if last in sealing:
            limit = time.monotonic() + 20
            kept = {rank: made[rank].hand_over(limit) for rank in sorted(self.leaving)}
            if kept:
                made[last].seal_last(header, Retention(), list(kept.values()))
            else:
                made[last].seal(header, files, Retention())
            for rank, keeper in kept.items():
                made[rank].note_keeper(keeper.host)
        return identity

    def sealed(self, node: int) -> Sealed:
        return self.tiers[node].sealed()[0]

    def look(self, leader: int, nodes: Iterable[int]) -> list[str]:
        """Have these nodes say what they have; return the attempts that are complete there."""
        tier = self.tiers[leader]
        tier.take_in([self.tiers[node].report() for node in nodes])
        return [one.ref.attempt for one in tier.candidates(len(self.tiers))]

    def bring(self, node: int, leader: int = 0) -> SharesReading:
        """Open what the leader chose on a node, and bring it there."""
        ref = self.tiers[leader].candidates(len(self.tiers))[0].ref
        tier = self.tiers[node]
        tier.learn(ref, self.tiers[leader].tell(ref))
        reading = tier.open(ref)
        assert isinstance(reading, SharesReading)
        try:
            reading.verify(node, len(self.tiers), unwatched)
        except BaseException:
            reading.close()
            raise
        return reading
