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
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by, keepers, may_hand_over, sealer
from elastic_ckpt.checkpoint.nodes.tier import HeldShare as SaidShare
from elastic_ckpt.checkpoint.nodes.tier import NodeReport, NodesMemory
from tests.simulation.disk import Checkpoint
from tests.simulation.storage import Place

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.ports import Key
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
    """A share of a checkpoint in a host's memory, as ``memory.tier.Sealed`` is to the supervisor.

    Attributes:
        run: that sealed it; None of a replica.
        copy_at: the host that keeps it as well, as this one leaves.
        keeper: the same, noted once the checkpoint is sealed.
        is_owed: its host has left, and it is here until the disk has it or newer.
    """

    checkpoint: Checkpoint
    seal: MemorySeal
    is_replica: bool = False
    settled: bool = False
    run: Run | None = None
    copy_at: str = ""
    keeper: str = ""
    is_owed: bool = False
    generation: Place = field(default_factory=lambda: Place("generation-0"))

    @property
    def first(self) -> int:
        return self.seal.ranks.start

    @property
    def key(self) -> Key:
        return self.checkpoint.key

    @property
    def age(self) -> Key:
        return self.key


@dataclass(eq=False)
class SealedSave:
    """A checkpoint that the leader has sealed.

    Attributes:
        copies: by first rank of a share, the hosts that have had it, and their ``power`` then.
        is_handed_over: nodes have left with it, whose shares others keep.
    """

    checkpoint: Checkpoint
    at: float
    size: int
    copies: dict[int, list[tuple[Host, int]]] = field(default_factory=dict)
    is_handed_over: bool = False

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
        hands_over: the disk is so slow that a node which leaves has others keep what it has.
    """

    def __init__(
        self, world: World, replicas: int, drain_seconds: float, *, hands_over: bool = False
    ) -> None:
        self.world = world
        self.hands_over = hands_over and replicas > 0
        self.handed_over = 0
        self.kernel = world.kernel
        self.replicas = replicas
        self.drain_seconds = drain_seconds
        self.saves: list[SealedSave] = []
        self._failed: set[str] = set()  # attempts whose drain has just failed

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

    def may_hand_over(self, gang: Gang) -> bool:
        """Whether nodes leave, and others may keep what these have; a head has said before if the
        job ends with it."""
        shares = [self._share(member) for member in gang.members]
        is_better = gang.run.board.hand_over_seconds > 0.0
        return is_better and self.has_room(gang) and may_hand_over(shares)

    def save(
        self,
        gang: Gang,
        one: Checkpoint,
        then: Callable[[Checkpoint], None],
        otherwise: Callable[[], None] | None = None,
    ) -> None:
        """Have each node write its share, and the leader seal when the others have, or if that
        leaves a node that stays; with
        ``otherwise`` only once others keep what nodes have that leave, or that is done instead."""
        shares = [self._share(member) for member in gang.members]
        first = sealer(shares).first
        last = next(member for member in gang.members if member.rank == first)
        waits = {share.first for share in shares} - {first}
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
            if member is last:
                self._sealed(gang, one, shares)
                then(one)
            elif not waits and otherwise is not None:
                self._hand_over(gang, one, shares, lambda: seal(last), otherwise)
            elif not waits:
                self.kernel.after(self.kernel.between(0.001, 0.1), lambda: seal(last))

        followers = [member for member in gang.members if member is not last]
        for member in followers or [last]:
            self.kernel.after(self.kernel.between(0.01, 0.3), lambda member=member: seal(member))

    def _share(self, member: SimWorkers) -> Share:
        host = member.agent.run.host
        leaves = member.board.deadline is not None
        return Share(member.rank, 1, host.name, 1, "", host.domain, leaves)

    def _seal_share(self, member: SimWorkers, one: Checkpoint, shares: list[Share]) -> None:
        share = next(each for each in shares if each.first == member.rank)
        staying = [each for each in shares if not each.leaves]
        others = [self._kept(each, one) for each in shares if each is not share]
        seal = make_memory_seal(
            _header(one, len(shares)), (), share=share,
            guards=() if share.leaves else guarded_by(share, staying, self.replicas),
            others=tuple(others) if share == sealer(shares) else (),
        )  # fmt: skip
        run = member.agent.run
        run.host.shares.append(HeldShare(one, seal, run=run))

    def _kept(self, share: Share, one: Checkpoint) -> Share:
        """Return a share where it is by now: with the host that keeps it, or its own."""
        held = [each for each in _own(self._host(share)) if each.checkpoint is one]
        keeper = held[0].copy_at if held else ""
        return msgspec.structs.replace(share, host=keeper, leaves=True) if keeper else share

    def _hand_over(
        self,
        gang: Gang,
        one: Checkpoint,
        shares: list[Share],
        then: Callable[[], None],
        otherwise: Callable[[], None],
    ) -> None:
        """As ``SharesAttempt.hand_over`` on each node that is under notice by now."""
        leaving = [member for member in gang.members if member.board.deadline is not None]
        waits = {member.rank for member in leaving}

        def keep(member: SimWorkers) -> None:
            if gang.is_broken or gang.is_held(lambda: keep(member)) or not waits:
                return
            host = member.agent.run.host
            is_last = member.rank == sealer(shares).first
            keeper = None if is_last else self._keeper(host, member.rank, shares)
            if keeper is None:
                waits.clear()
                self.kernel.say(f"{host.name} leaves, and no other keeps what it has")
                otherwise()
                return
            own = _own(host)[-1]
            own.copy_at = keeper.name
            keeper.shares.append(HeldShare(one, own.seal, is_replica=True, is_owed=True))
            self.kernel.say(f"{keeper.name} keeps what {host.name} has of step {one.key[1]}")
            waits.discard(member.rank)
            if not waits:
                self.handed_over += len(leaving)
                self.kernel.after(self.kernel.between(0.001, 0.1), then)

        for member in leaving:
            self.kernel.after(self.kernel.between(0.05, 1.0), lambda member=member: keep(member))

    def _keeper(self, host: Host, rank: int, shares: list[Share]) -> Host | None:
        """Return the first one that can, and does not leave itself."""
        share = next(one for one in shares if one.first == rank)
        found = map(self._host, keepers(share, shares))
        return next((one for one in found if self._can_keep(host, one)), None)

    def _can_keep(self, host: Host, keeper: Host) -> bool:
        run = keeper.run
        is_here = run is not None and keeper.is_busy and not keeper.is_down
        is_well = is_here and not keeper.is_paused and self.world.network.reaches(host, keeper)
        return is_well and run is not None and run.board.deadline is None

    def _sealed(self, gang: Gang, one: Checkpoint, shares: list[Share]) -> None:
        self.world.disk.known[one.attempt] = one
        done = SealedSave(one, self.kernel.now, len(shares))
        self.saves.append(done)
        self.kernel.say(f"sealed in the nodes' memory: step {one.key[1]}, by {gang.run.name}")
        for member in gang.members:
            host = member.agent.run.host
            done.copies.setdefault(member.rank, []).append((host, host.power))
            if keeper := _own(host)[-1].copy_at:
                _own(host)[-1].keeper = keeper
                kept_by = next(each for each in self.world.all_hosts if each.name == keeper)
                done.copies[member.rank].append((kept_by, kept_by.power))
                done.is_handed_over = True
            for source in _own(host)[-1].seal.guards:
                later = self.kernel.between(0.05, 0.9 * REPLICATED_SECONDS)
                host.after(
                    later, lambda host=host, source=source: self._replicate(host, source, done)
                )
        self._drain_later(gang.run, one, 1.0, 3.0)

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
            if each.is_owed and not each.settled:
                continue
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
        if not own.seal.is_last:
            return  # the next head brings it there
        run.wake(0.001)
        for share in own.seal.others:
            if not any(self._find(host, each, one.attempt) for each in holders(share, own.seal)):
                self.kernel.say(f"step {one.key[1]} cannot be written to the disk")
                self._failed.add(one.attempt)
                return
        disk.seal_left(one, run)
        for each in self.world.all_hosts:
            if each is host or self.world.network.reaches(host, each):
                for held in each.shares:
                    held.settled = held.settled or held.checkpoint.key <= one.key

    # -- as the supervisors see it ----------------------------------------------------------------

    def newest_share(self, run: Run) -> HeldShare | None:
        """Return what a node has of the newest generation, if its run sealed that."""
        newest = next(reversed(_own(run.host)), None)
        return newest if newest is not None and newest.run is run else None

    def has_drained(self, run: Run) -> bool:
        """Return whether what the head's run has in memory is on the disk, or could not get there
        just now."""
        newest = self.newest_share(run)
        is_due = newest is not None and newest.seal.is_last and not newest.settled
        return newest is None or not is_due or newest.checkpoint.attempt in self._failed

    def take_over(self, run: Run, before: Run) -> None:
        """Go on serving what an earlier supervisor of this node's process has served, as the head
        has passed the job on; a head drains it."""
        for one in _own(run.host):
            one.run = run if one.run is before else one.run
        if run.leads:
            self.hurry(run)

    def hurry(self, run: Run) -> None:
        """Drain the newest at normal priority, also if it has failed."""
        newest = self.newest_share(run)
        if newest is not None and not newest.settled:
            self._failed.discard(newest.checkpoint.attempt)
            self._drain_later(run, newest.checkpoint, 0.1, 0.5)

    def _drain_later(self, run: Run, one: Checkpoint, least: float, most: float) -> None:
        seconds = self.drain_seconds * self.kernel.between(least, most)
        run.host.after(seconds, lambda: self._drain(run, one))

    def is_kept_elsewhere(self, host: Host, key: Key) -> bool:
        """Return whether another host was given what this one has of a step."""
        save = next(one for one in reversed(self.saves) if one.checkpoint.key == key)
        found = [one for one in save.copies.values() if one[0][0] is host]
        return all(any(other is not host for other, _ in one) for one in found)

    def leave(self, host: Host) -> None:
        """Remove what a node has in memory, unless it has what the disk lacks."""
        if all(one.settled or one.keeper for one in _own(host)):
            host.lose_memory()

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
