"""A job directory or a bucket, as a place that checkpoints are copied from and to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ownership import identity_of, new_owner
from elastic_ckpt.checkpoint.bucket.source import Source, in_bucket, in_directory
from elastic_ckpt.checkpoint.bucket.take import (
    last_seen,
    note_own,
    note_pulled,
    require_step,
    take,
    take_for,
)
from elastic_ckpt.checkpoint.bucket.transfer import in_order, pull, push
from elastic_ckpt.checkpoint.bucket.url import BucketUrl, is_url
from elastic_ckpt.checkpoint.catalog import scan, view
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.lineage import restore
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.ownership.fence import count_from
from elastic_ckpt.checkpoint.ownership.job_lock import OwnedJob, Patience
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import write_atomic
from elastic_ckpt.util.progress import Advance


@dataclass(frozen=True)
class Item:
    """A sealed checkpoint that may be copied; ``name`` is for people, with its session."""

    name: str
    manifest: Manifest
    source: Source


Put = Callable[[Item, Advance], bool]
"""Copies a checkpoint; False if it is there already. Raises as ``push`` and ``pull`` do."""


class CopyPlace(Protocol):
    """Where the checkpoints of one job are. Every method raises OSError if it cannot be read."""

    def identity(self) -> str:
        """Return what tells its job from others; empty if there is none yet."""

    def items(self, name: str) -> Iterator[Item]:
        """Yield the newest checkpoint of each session, or the one of that name, which nobody
        deletes until the next one is asked for."""

    def taken(
        self, identity: str, patience: Patience, *, newest: bool, origin: CopyPlace
    ) -> AbstractContextManager[Put]:
        """Own the place for the job of that identity while checkpoints are copied there.

        Args:
            newest: what is copied becomes the newest of its session; what was newer is superseded.

        Raises:
            DirectoryUnusable: it holds another job, another run owns it, or it is not usable.
        """


def place_at(text: str, *, make: bool = False) -> CopyPlace:
    """Return the place that a user means by a path or a URL, which may be new if ``make``;
    UsageError for a wrong URL."""
    if is_url(text):
        return BucketPlace(text, make=make)
    return DirectoryPlace(JobDirectory.at(Path(text)))


class BucketPlace:
    """See :class:`CopyPlace`."""

    def __init__(self, url: str, *, make: bool = False) -> None:
        self.store = open_store(BucketUrl.parse(url), make=make)

    def identity(self) -> str:
        return identity_of(self.store)

    def items(self, name: str) -> Iterator[Item]:
        for seal in self._chosen(name):
            manifest = catalog.read_seal(self.store, seal)
            with in_bucket(self.store, seal, in_order(manifest)) as source:
                yield Item(shown(seal), manifest, source)

    def _chosen(self, name: str) -> Iterator[SealKey]:
        for session in catalog.sessions(self.store):
            if name:
                every = (one.seal for one in catalog.listed(self.store, session))
                found = next((one for one in every if shown(one) == name), None)
            else:
                found = catalog.newest(self.store, session)
            if found is not None:
                yield found

    @contextmanager
    def taken(
        self, identity: str, patience: Patience, *, newest: bool, origin: CopyPlace
    ) -> Iterator[Put]:
        del newest  # the seals of a later owner always are
        owner = new_owner(f"copy-{os.getpid()}", node_name())
        if isinstance(origin, DirectoryPlace):
            claim = take_for(origin.job, self.store, owner, patience)
        else:
            claim = take(self.store, identity, owner, patience)

        def put(item: Item, advance: Advance) -> bool:
            session = item.manifest.session
            there = (one.seal.attempt for one in catalog.listed(self.store, session))
            if item.manifest.attempt in there:
                return False
            push(claim, item.source, item.manifest, claim.beating(advance))
            return True

        try:
            if isinstance(origin, DirectoryPlace):
                require_step(origin.job, self.store, claim)
                note_own(origin.job, claim)
            yield put
        finally:
            with suppress(OSError):
                claim.beat(ended=True)


class DirectoryPlace:
    """See :class:`CopyPlace`."""

    def __init__(self, job: JobDirectory) -> None:
        self.job = job

    def identity(self) -> str:
        self.job.check_readable()
        try:
            return self.job.known_identity()
        except FileNotFoundError:  # before its first run, or of an early version
            return self.job.identity() if scan(self.job) else ""

    def items(self, name: str) -> Iterator[Item]:
        for one in self.job.sessions():
            paths = [path for path in scan(one) if not name or one.shown(path) == name]
            found = next((seen for seen in map(view, paths) if seen.intact), None)
            if found is not None and isinstance(found.manifest, Manifest):
                lock = ReadLock(found.path)
                try:
                    yield Item(one.shown(found.path), found.manifest, in_directory(found.path))
                finally:
                    lock.release()

    @contextmanager
    def taken(
        self, identity: str, patience: Patience, *, newest: bool, origin: CopyPlace
    ) -> Iterator[Put]:
        self.job.prepare()
        mine = self.identity()
        if not mine:
            write_atomic(self.job.control / "identity", identity.encode())
        elif mine != identity:
            raise DirectoryUnusable(
                f"{self.job.root} holds another job: choose another directory for this one"
            )
        owned = OwnedJob(self.job, node_name(), f"copy-{os.getpid()}", "", patience)
        try:
            seen = last_seen(origin.store) if isinstance(origin, BucketPlace) else None
            yield lambda item, advance: self._put(item, advance, newest)
            if newest and isinstance(origin, BucketPlace) and seen is not None:
                note_pulled(self.job, origin.store.url, seen)
        finally:
            owned.release()

    def _put(self, item: Item, advance: Advance, newest: bool) -> bool:
        session = self.job.session(item.manifest.session)
        tier = DiskTier(session)
        was_there = tier.holds(item.manifest)
        pull(item.source, item.manifest, tier, advance)
        count_from(self.job, item.manifest.run)
        if newest:
            path = session.checkpoint(item.manifest.epoch, item.manifest.step)
            restore(self.job, session.shown(path), "elastic-ckpt copy")
        return not was_there


def shown(seal: SealKey) -> str:
    """Return a checkpoint's name for people, with that of its session."""
    return f"{seal.session}/{seal.name}" if seal.session else seal.name
