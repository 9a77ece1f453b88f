"""The supervisor's side of the memory tier: it owns the files and drains them to the disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import newest_of_job
from elastic_ckpt.checkpoint.memory.generation import GENERATIONS, Sealed
from elastic_ckpt.checkpoint.memory.leftover import (
    ANSWER_SECONDS,
    Leftover,
    drop_drained,
    has_moved,
    leftovers,
)
from elastic_ckpt.checkpoint.memory.owned_tier import MemoryUnusable, OwnedTier
from elastic_ckpt.checkpoint.memory.room import is_memory, room_bytes
from elastic_ckpt.checkpoint.nodes.reading import clear_brought
from elastic_ckpt.checkpoint.nodes.server import MemoryServer, own_address
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import MemoryAdopted, MemoryRemoved
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.rendezvous import parse_endpoint
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves.drain_target import DrainTarget
from elastic_ckpt.supervisor.saves.drainer import Drainer, be_polite
from elastic_ckpt.supervisor.saves.replicator import Replicator
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes


class _Move:
    """Finds out in a thread whether a tier's directory has become this job's, or was copied."""

    def __init__(self, root: Path, job: JobDirectory, wake: Callable[[], None]) -> None:
        self.root = root
        self.answer: bool | None = None
        self._limit = time.monotonic() + ANSWER_SECONDS + 1.0

        def ask() -> None:
            self.answer = has_moved(root, job)
            wake()

        self._thread = threading.Thread(target=ask, name="moved", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive() or time.monotonic() > self._limit


class MemoryKeeper:
    """A node's memory tier while its supervisor lives; an empty one if the tier is off."""

    def __init__(
        self,
        job: JobDirectory,
        target: DrainTarget,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
        finished: Callable[[], int],
        owned: OwnedTier | None,
        server: MemoryServer | None = None,
        name: str = "",
    ) -> None:
        """Drain nothing before :meth:`begin`; ``finished`` as :class:`Replicator` takes it. With a
        ``name`` it is the tier of one of several nodes, of which the one that seals has all of
        them drain."""
        self._job = job
        self._journal = journal
        self._say = say
        self._wake = wake
        self._target = target
        self._owned = owned
        self._server = server
        self._name = name
        leads = not name or target.seals
        token = server.where[2] if server else ""
        self._drainer = (
            Drainer(target, owned.tier, journal, say, wake, token) if owned and leads else None
        )
        self._replicator = (
            Replicator(owned.tier, journal, say, wake, be_polite, finished)
            if owned and server
            else None
        )
        self._moves: list[_Move] = []
        self.root = str(owned.tier.root) if owned else ""
        self.bell = owned.bell if owned else None

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        job: JobDirectory,
        target: DrainTarget,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
        finished: Callable[[], int],
        leaves: Callable[[], bool] = lambda: False,
        served: MemoryServer | None = None,
    ) -> MemoryKeeper:
        """Make the tier, or take over what earlier runs of this job left there. ``leaves`` returns
        whether this node is under notice; ``served`` is what its supervisor before this one left.

        If the place is not usable the tier is off, with a message. Looks at no directory of another
        job: its storage may not answer.
        """
        place, owned = settings.memory, None
        if place is not None:
            for path in drop_drained(place):
                journal.write(MemoryRemoved(path=str(path)))
            try:
                owned = _own(place, job, settings.node, target)
                if not settings.own:  # what the script saves itself does not go there
                    say(_needs(place, job, owned, settings))
            except MemoryUnusable as error:
                say(warning(f"no memory tier, saves go to {target.name}: {error}"))
        name, server = settings.node if settings.endpoint and place else "", None
        if name and owned is not None:
            server = _serve(settings, owned, target, say, leaves, served)
        elif served is not None:
            served.close()
        keeper = cls(job, target, journal, say, wake, finished, owned, server, name)
        if served is not None and server is served and keeper._replicator is not None:
            keeper._replicator.serve(sealed=True)  # its end has cut them off
        elsewhere = owned.elsewhere if owned else []
        left = leftovers([*([place] if place else []), *_earlier_places(job)])
        _warn([one for one in left if one.tier not in elsewhere], job, say)
        return keeper

    def begin(self) -> None:
        if self._owned is None or self._drainer is None:
            return
        self._moves = [_Move(root, self._job, self._wake) for root in self._owned.elsewhere]
        if not self._moves:
            self._adopt()

    def _adopt(self) -> None:
        """Drain what was left in memory, before anything is launched."""
        if self._owned is None or self._drainer is None:
            return
        self._drainer.older = self._owned.older
        for one in self._drainer.adopt():
            step = one.seal.step
            where = self._target.name
            self._say(f"step {step} of an earlier run is in memory: bringing it to {where}")
            self._journal.write(MemoryAdopted(step=step, path=str(one.generation.slot)))
        self._drainer.hurry()

    def _settle_moves(self) -> None:
        owned, drainer = self._owned, self._drainer
        if owned is None or drainer is None or not all(one.is_over for one in self._moves):
            return
        moves, self._moves = self._moves, []
        # A drain's files must not be renamed: one runs only if the run is about to end.
        may_adopt = not drainer.attempt
        left = {
            one.root for one in moves if not (may_adopt and one.answer and owned.adopt(one.root))
        }
        found = leftovers(root.parent for root in left)
        _warn([one for one in found if one.tier in left], self._job, self._say)
        if may_adopt:
            self._adopt()

    @property
    def server(self) -> tuple[str, int, str]:
        """Where other nodes reach this one's memory, and the secret; port 0 if it has none, an
        empty host if no node has."""
        if self._server is None:
            return self._name, 0, ""
        return self._server.where

    @property
    def attempt(self) -> str:
        return self._drainer.attempt if self._drainer else ""

    @property
    def over(self) -> bool:
        return self._drainer is None or (self._drainer.over and not self._moves)

    def serve(self) -> None:
        if self._owned is None or self.bell is None:
            return
        rung = False
        with contextlib.suppress(BlockingIOError):
            rung = bool(os.read(self.bell, 4096))
        if self._replicator is not None:
            self._replicator.serve(sealed=rung)
        if self._drainer is None:
            return  # the head has it drained
        if self._moves:
            self._settle_moves()
        self._drainer.serve(sealed=rung)
        if self._drainer.older and self._drainer.over:
            self._owned.drop_drained()
            self._drainer.older = self._owned.older

    def hold(self) -> None:
        if self._drainer is not None:
            self._drainer.hold()

    def hurry(self) -> None:
        if self._drainer is not None:
            self._drainer.hurry()

    def hurry_once(self) -> None:
        if self._drainer is not None:
            self._drainer.hurry_once()

    def calm(self) -> None:
        if self._drainer is not None:
            self._drainer.calm()

    def newest_key(self) -> Key:
        sealed = self._owned.sealed() if self._owned else []
        return sealed[0].age if sealed else NO_CHECKPOINT

    def forget(self, key: Key | None) -> bool:
        if self.not_on_disk() is not None:
            return False
        sealed = self._owned.sealed() if self._owned else []
        return all(one.generation.clear() for one in sealed if one.age == key)

    def not_on_disk(self) -> Sealed | None:
        sealed = self._owned.sealed() if self._owned else []
        # A share that is not the last says nothing: the save that it is of may have failed.
        newest = next((one for one in sealed if one.seal.is_last or one.keeper), None)
        return newest if newest and self._drainer and self._drainer.lacks(newest) else None

    def owed(self) -> Sealed | None:
        newest = self._newest_share() if self._drainer is None else None
        return newest if newest is not None and not newest.settled else None

    def kept_by_peer(self) -> tuple[Key, str] | None:
        newest = self._newest_share()
        keeper = newest.keeper if newest is not None else ""
        return (newest.age, keeper) if newest is not None and keeper else None

    def _newest_share(self) -> Sealed | None:
        """Return what this node has of the newest generation, if it was sealed while its server
        serves it."""
        if self._owned is None or self._server is None:
            return None
        newest = next(iter(self._owned.tier.sealed()), None)
        share = newest.seal.share if newest is not None else None
        return newest if share is not None and share.token == self._server.where[2] else None

    def undrained_bytes(self) -> int | None:
        kept = self.not_on_disk()
        return self._drainer.bytes_left(kept) if kept and self._drainer else None

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        if self._drainer is not None:
            self._drainer.finish_pruning(hurry)

    def hand_server(self, *, is_passed_on: bool) -> MemoryServer | None:
        """After a :meth:`close` with ``keep``, return what still serves this node's memory, if the
        head passed the job on: where the shares are stays true, and its successor drains them from
        there. Else close it, so that what was sealed counts only once the ranks have found it."""
        if self._server is not None and not is_passed_on:
            self._server.close()
            return None
        return self._server

    def close(self, *, keep: bool = False, finished: bool = False) -> None:
        if self._server is not None and not keep:
            self._server.close()
        if self._replicator is not None:
            self._replicator.close()
        if self._owned is not None:
            left = self._drainer.pending() if self._drainer else self._owned.tier.undrained()
            left = [one for one in left if one.seal.is_whole or not finished]
            self._owned.release(remove=not (keep or self._owned.tier.is_unclear or left))


def _own(place: Path, job: JobDirectory, node: str, target: DrainTarget) -> OwnedTier:
    """Take the tier over, unless it holds what this run could neither use nor drain."""
    owned = OwnedTier(place, job, node)
    for one in owned.sealed():
        if one.seal.share is None and not one.settled and not target.is_ours(one.seal):
            owned.release(remove=False)
            raise MemoryUnusable(
                f"step {one.seal.step} of a run on this node alone is in memory only: run the job "
                f"here once without --nnodes to bring it to {target.name}"
            )
    return owned


def _serve(
    settings: RunSettings,
    owned: OwnedTier,
    target: DrainTarget,
    say: Callable[[str], None],
    leaves: Callable[[], bool],
    served: MemoryServer | None,
) -> MemoryServer | None:
    """Serve this node's memory to the others, on the address by which it reaches them."""
    clear_brought(owned.tier.root)
    try:
        address = own_address(*parse_endpoint(settings.endpoint))
        if served is not None and served.where[0] == address:
            return served
        if served is not None:
            served.close()
        return MemoryServer(owned.tier, target.part_of, address, be_polite, leaves)
    except OSError as error:
        say(warning(f"no memory tier, saves go to {target.name}: {error.strerror or error}"))
        return None


def _needs(place: Path, job: JobDirectory, owned: OwnedTier, settings: RunSettings) -> str:
    """Say what the tier takes: on several nodes a share of a checkpoint, and as much for each
    replica that this one keeps of another node's."""
    room = human_bytes(room_bytes(place) + owned.tier.held_bytes())
    nodes = settings.nodes[0] if settings.endpoint else 1
    held = GENERATIONS * (1 + min(settings.replicas, settings.nodes[1] - 1))
    with contextlib.suppress(OSError):
        newest = newest_of_job(job)
        if newest is not None and newest.manifest is not None:
            needed = human_bytes(held * newest.manifest.total_bytes // nodes)
            return f"memory tier in {place}: needs about {needed} of {room}"
    share = " divided by the number of nodes" if settings.endpoint else ""
    times = "twice" if held == GENERATIONS else f"{held} times"
    return (
        f"memory tier in {place}: {room} available; it needs {times} the size of a checkpoint"
        f"{share}"
    )


def _earlier_places(job: JobDirectory) -> list[Path]:
    """Return where earlier runs of this job had their memory tiers; a mount may be dead."""
    with contextlib.suppress(OSError):
        found = [Path(one.memory).parent for one in job_records(job) if one.memory]
        return [place for place in found if is_memory(place)]
    return []


def _warn(left: Iterable[Leftover], job: JobDirectory, say: Callable[[str], None]) -> None:
    """Report what is in memory only and will not be drained; of other jobs' only how much."""
    others, identity = 0, ""
    with contextlib.suppress(OSError):
        identity = job.known_identity()
    for one in left:
        what = f"step {one.step}" if one.step is not None else "a checkpoint"
        where = f"is in memory only, in {one.tier}"
        if one.is_share and one.job == str(job.root):
            todo = "the job can use it only with all other nodes' shares of that step"
            say(f"a node's share of {what} {where}: {todo}")
        elif one.identity == identity and one.job == str(job.root):
            place = one.tier.parent
            say(f"{what} {where}: run once with --memory-dir {place} to bring it to the disk")
        elif one.identity == identity:
            root = printable(one.job)
            say(f"{what} of {root} {where}, and stays there: this directory may be a copy of it")
        elif one.job == str(job.root):
            say(f"{what} of an earlier job in {job.root} {where}: is its disk mounted?")
        else:
            others += one.bytes
    if others:
        amount = f"{human_bytes(others)} of memory hold checkpoints of other jobs"
        say(f"{amount} that have not reached their disks: elastic-ckpt doctor lists them")
