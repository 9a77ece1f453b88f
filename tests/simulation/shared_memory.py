"""Saves into the memory of several nodes, and replicas of them, as durations and real rules.

Who keeps whose replica, what is complete, and who copies a share to the disk, are the product's own
pure functions; what each host holds is a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from elastic_ckpt.checkpoint.manifest import EngineInfo, SealHeader, header_of
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share, make_memory_seal
from elastic_ckpt.checkpoint.nodes.copies import holders
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by
from elastic_ckpt.checkpoint.nodes.tier import HeldShare as SaidShare
from elastic_ckpt.checkpoint.nodes.tier import NodeReport, NodesMemory
from tests.simulation.disk import Checkpoint

if TYPE_CHECKING:
    from tests.simulation.gang import Gang
    from tests.simulation.hosts import Host
    from tests.simulation.ranks import SimWorkers
    from tests.simulation.run import Run
    from tests.simulation.world import World

GENERATIONS = 2
KEPT = 1
"""Older replicas of a share than the newest."""

REPLICATED_SECONDS = 3.0
"""Within which each share that was sealed on hosts that are well has its replicas."""


@dataclass(eq=False)
class HeldShare:
    """A share of a checkpoint in a host's memory."""

    checkpoint: Checkpoint
    seal: MemorySeal
    is_replica: bool = False
    settled: bool = False

    @property
    def first(self) -> int:
        return self.seal.ranks.start


@dataclass(eq=False)
class SealedSave:
    """A checkpoint that the leader has sealed.

    Attributes:
        copies: by first rank of a share, the hosts that have had it, and their ``power`` then.
    """

    checkpoint: Checkpoint
    at: float
    size: int
    copies: dict[int, list[tuple[Host, int]]] = field(default_factory=dict)

    def survives(self, hosts: Iterable[Host]) -> bool:
        """Whether each share is in the memory of one of these hosts, unless that dropped it."""
        here = set(hosts)
        return all(
            any(host in here and host.power == power for host, power in self.copies.get(one, []))
            for one in range(self.size)
        )


class SharedMemory:
    """What a job's hosts hold together.

    Args:
        replicas: how many other nodes keep a copy of each share.
        drain_seconds: at least this long it takes until a checkpoint is on the disk.
    """

    def __init__(self, world: World, replicas: int, drain_seconds: float) -> None:
        self.world = world
        self.kernel = world.kernel
        self.replicas = replicas
        self.drain_seconds = drain_seconds
        self.saves: list[SealedSave] = []

    @property
    def newest(self) -> SealedSave | None:
        return self.saves[-1] if self.saves else None

    def has(self, attempt: str) -> bool:
        """Whether an attempt was sealed here, and perhaps only here."""
        return any(one.checkpoint.attempt == attempt for one in self.saves[-2:])

    # -- saving ---------------------------------------------------------------------------------

    def has_room(self, gang: Gang) -> bool:
        """Whether each node has a generation that may be overwritten."""
        return all(_room(one.agent.run.host) for one in gang.members)

    def save(self, gang: Gang, one: Checkpoint, then: Callable[[Checkpoint], None]) -> None:
        """Have each node write its share, and the leader seal when the others have."""
        shares = [self._share(member) for member in gang.members]
        waits = {share.first for share in shares} - {0}
        for member in gang.members:
            host = member.agent.run.host
            for old in _own(host)[: 1 - GENERATIONS]:
                if old.settled:
                    host.shares.remove(old)

        def seal(member: SimWorkers) -> None:
            if gang.is_broken or gang.is_held(lambda: seal(member)):
                return
            self._seal_share(member, one, shares)
            waits.discard(member.rank)
            if member.rank == 0:
                self._sealed(gang, one, shares)
                then(one)
            elif not waits:
                self.kernel.after(self.kernel.between(0.001, 0.1), lambda: seal(gang.leader))

        followers = [member for member in gang.members if member.rank]
        for member in followers or [gang.leader]:
            self.kernel.after(self.kernel.between(0.01, 0.3), lambda member=member: seal(member))

    def _share(self, member: SimWorkers) -> Share:
        host = member.agent.run.host
        return Share(member.rank, 1, host.name, 1, "", host.domain)

    def _seal_share(self, member: SimWorkers, one: Checkpoint, shares: list[Share]) -> None:
        share = self._share(member)
        seal = make_memory_seal(
            _header(one, len(shares)), (), share=share,
            guards=guarded_by(share, shares, self.replicas),
            others=tuple(each for each in shares if each != share) if share.first == 0 else (),
        )  # fmt: skip
        member.agent.run.host.shares.append(HeldShare(one, seal))

    def _sealed(self, gang: Gang, one: Checkpoint, shares: list[Share]) -> None:
        self.world.disk.known[one.attempt] = one
        done = SealedSave(one, self.kernel.now, len(shares))
        self.saves.append(done)
        self.kernel.say(f"sealed in the nodes' memory: step {one.key[1]}, by {gang.run.name}")
        for member in gang.members:
            host = member.agent.run.host
            done.copies.setdefault(member.rank, []).append((host, host.power))
            for source in _own(host)[-1].seal.guards:
                later = self.kernel.between(0.05, 0.9 * REPLICATED_SECONDS)
                host.after(
                    later, lambda host=host, source=source: self._replicate(host, source, done)
                )
        later, run = self.drain_seconds * self.kernel.between(1.0, 3.0), gang.run
        run.host.after(later, lambda: self._drain(run, one))

    # -- replicas, and the way to the disk ---------------------------------------------------------

    def _replicate(self, host: Host, source: Share, save: SealedSave) -> None:
        """As ``replica.replicate`` and ``drop_strangers``."""
        one = save.checkpoint
        found = self._find(host, source, one.attempt)
        own = next((each for each in _own(host) if each.checkpoint is one), None)
        if not host.is_busy or found is None or own is None:
            return
        made = HeldShare(one, found.seal, is_replica=True)
        host.shares.append(made)
        save.copies[source.first].append((host, host.power))
        kept = {share.first for share in own.seal.guards}
        copies = [each for each in host.shares if each.is_replica]
        for each in copies:
            newer = [other for other in copies if other.first == each.first]
            newer = [other for other in newer if other.checkpoint.key > each.checkpoint.key]
            is_strange = each.first not in kept and each.checkpoint.key < one.key
            if is_strange or len(newer) > KEPT:
                host.shares.remove(each)

    def _find(self, asks: Host, share: Share, attempt: str) -> HeldShare | None:
        """Return what a host serves of an attempt to another one."""
        there = self._host(share)
        if there.is_down or not there.is_busy or not self.world.network.reaches(asks, there):
            return None
        held = [one for one in there.shares if one.checkpoint.attempt == attempt]
        return next((one for one in held if one.first == share.first), None)

    def _host(self, share: Share) -> Host:
        return next(host for host in self.world.all_hosts if host.name == share.host)

    def _drain(self, run: Run, one: Checkpoint) -> None:
        """Have each node copy its share to the disk, or one that has its replica, and seal."""
        disk, host = self.world.disk, run.host
        if disk.hangs(host):
            disk.when_it_answers(host, lambda: self._drain(run, one))
            return
        own = next((each for each in _own(host) if each.checkpoint is one), None)
        if run.is_gone or own is None or own.settled or not run.may_seal():
            return
        for share in own.seal.others:
            if not any(self._find(host, each, one.attempt) for each in holders(share, own.seal)):
                self.kernel.say(f"step {one.key[1]} cannot be written to the disk")
                return
        disk.seal_left(one, run)
        for each in self.world.all_hosts:
            if each is host or self.world.network.reaches(host, each):
                for held in _own(each):
                    held.settled = held.settled or held.checkpoint.key <= one.key

    # -- loading ----------------------------------------------------------------------------------

    def load(self, gang: Gang, on_disk: Checkpoint | None) -> Checkpoint | None:
        """Return what ranks load: the newest that is complete on their nodes, or on the disk."""
        members = sorted(gang.members, key=lambda one: one.rank)
        memories = [NodesMemory(Path("/"), self._share(one), acts=True) for one in members]
        reports = [
            NodeReport(memory.share, [_said(held) for held in one.agent.run.host.shares])
            for one, memory in zip(members, memories, strict=True)
        ]
        memories[0].take_in(map(msgspec.json.encode, reports))
        found = on_disk
        for stored in reversed(memories[0].candidates(gang.size)):
            one = self.world.disk.known[stored.ref.attempt]
            is_newer = found is None or one.key >= found.key
            if is_newer and not self.world.disk.is_off_the_line(one, gang.run):
                found = one
        return found


def _room(host: Host) -> bool:
    own = _own(host)
    return len(own) < GENERATIONS or own[0].settled


def _own(host: Host) -> list[HeldShare]:
    """Return a host's own generations, the oldest first."""
    return [one for one in host.shares if not one.is_replica]


def _said(held: HeldShare) -> SaidShare:
    ranks = held.seal.ranks
    return SaidShare(header_of(held.seal), ranks.start, len(ranks), held.is_replica)


def _header(one: Checkpoint, world_size: int) -> SealHeader:
    step = one.key[1]
    return SealHeader(
        job="job", attempt=one.attempt, incarnation=one.incarnation, run=one.run,
        parent=one.parent, created="", reason="interval", epoch=0, step=step, step_in_epoch=step,
        sample_start_index=step, samples_per_step=1, order_seed=0, dataset_fingerprint="",
        dataset_size=1, world_size=world_size, data_parallel_size=world_size,
        engine=EngineInfo("torch"), torch="",
    )  # fmt: skip
