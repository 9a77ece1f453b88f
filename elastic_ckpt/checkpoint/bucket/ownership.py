"""Who may seal in a bucket: claims, as run numbers are in a directory.

An owner creates the record of the next number, which only one can. It beats, and before it says
that something is saved it looks whether the number after its own has been created. Nothing here
compares clocks, and nothing relies on a fresh listing: who claims goes up until a number is free.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import filelock
import msgspec

from elastic_ckpt.checkpoint.bucket.keys import (
    JOB,
    RUNS,
    beat_key,
    number_of,
    run_key,
    told_key,
)
from elastic_ckpt.checkpoint.bucket.store import Bucket, create
from elastic_ckpt.errors import BucketFailed, BucketRefused, LockHeld, RunSuperseded
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import BUCKET_BEAT_SECONDS
from elastic_ckpt.util.progress import Advance
from elastic_ckpt.util.text import printable

KEPT_CLAIMS = 20
"""Records of earlier owners that stay, for people."""

_MAX_BYTES = 1024 * 1024

_KEPT_BEFORE: Final = 4
"""Seals of a session before its newest one that are written down as well: that one may be taken
back, and they may have been sealed after it."""

_LOCK_SECONDS: Final = 180.0
"""How long one process of a run waits for another one that writes down its seal."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a claim.

    Attributes:
        nonce: tells it from that of another run at the same number.
        endpoint: HOST:PORT where the nodes meet; empty for a job of one node.
    """

    run_id: str
    node: str
    owner: ProcessIdentity
    nonce: str
    endpoint: str = ""

    @property
    def shown(self) -> str:
        """It, for people."""
        where = f"pid {self.owner.pid} on {printable(self.owner.host)}"
        return f"{where} (run {printable(self.run_id)})"


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner last said of itself.

    Attributes:
        count: grows, so that each beat differs from the one before.
        ended: it seals nothing any more.
        passed_on: it has ended and left the job to its other nodes.
    """

    nonce: str
    count: int
    ended: bool = False
    passed_on: bool = False


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner has told of its seals: the key of the newest of each session, and the keys of
    some ``before``, newest first, which a listing may not show yet. Apart from the beat: the leader
    of the ranks may seal, where the supervisor beats."""

    nonce: str
    newest: dict[str, str] = {}
    before: dict[str, list[str]] = {}


class _Job(msgspec.Struct, frozen=True):
    identity: str


class BucketClaim:
    """An owner's claim. One thread at a time; another thread or process of the run may have its
    own, with the same ``lock``: the leader of the ranks seals, and so does a drain.

    Args:
        lock: keeps the others from writing down their seals; None if there are no others.
    """

    def __init__(
        self,
        store: Bucket,
        number: int,
        owner: Owner,
        newest: Mapping[str, str] | None = None,
        lock: Lock | None = None,
    ) -> None:
        self.store = store
        self._lock = lock
        self._is_alone = False
        self.number = number
        self.owner = owner
        self.newest = dict(newest or {})
        self._before: dict[str, list[str]] = {}  # of each session, newest first
        self.taken_back: set[str] = set()
        """Keys of seals that are no more, although an old listing may show them."""
        self._beats = 0

    def check(self) -> None:
        """Raise RunSuperseded if a later claim exists; BucketFailed if that cannot be told."""
        later = read_owner(self.store, self.number + 1)
        if later is not None:
            raise RunSuperseded(
                f"{later.shown} has taken over {self.store.url}: this run seals nothing there; "
                f"elastic-ckpt status {self.store.url} shows the job"
            )

    def beat(self, *, ended: bool = False, passed_on: bool = False) -> None:
        """Show that this owner lives, or has ended; raises as :meth:`check`."""
        self._beats += 1
        beat = Beat(nonce=self.owner.nonce, count=self._beats, ended=ended, passed_on=passed_on)
        self.store.put(beat_key(self.number), msgspec.json.encode(beat))
        self.check()

    def sealed(self, session: str, key: str) -> None:
        """Make a seal of this owner known; until this returns, it has not been saved for sure.
        Raises as :meth:`check`."""
        with self.alone():
            known = {key, *self._before.get(session, ()), self.newest.get(session, key)}
            self.newest[session], *before = sorted(known)  # keys count down
            self._before[session] = before[:_KEPT_BEFORE]
            self.tell()
        self.check()

    def sealed_before(self, session: str, key: str) -> list[str]:
        """Return what is known to have been sealed before a seal, the newest first; some of it may
        have been deleted since."""
        return [one for one in self._before.get(session, ()) if one > key]

    def take_back(self, session: str, key: str, newest: str) -> None:
        """Make known that a seal is to be no more, and which one is the newest then; empty for
        none. Raises as :meth:`check`."""
        self.taken_back.add(key)
        with self.alone():
            if self.newest.get(session) == key:
                self.newest.pop(session)
                self.newest |= {session: newest} if newest else {}
                self.tell()
        self.check()

    def tell(self) -> None:
        """Write down the newest seals; BucketFailed if the store does not answer."""
        told = _Told(nonce=self.owner.nonce, newest=self.newest, before=self._before)
        self.store.put(told_key(self.number), msgspec.json.encode(told))

    def learn(self) -> dict[str, str]:
        """Return the newest seals by session, of another process of this run, too; BucketFailed if
        the store does not answer."""
        self.newest = read_told(self.store, self.number) or {}
        return self.newest

    def share(self, job: JobDirectory) -> BucketClaim:
        """Lock it from now on against other processes of this machine, and return it."""
        self._lock = lock_at(claim_lock(job))
        return self

    def twin(self) -> BucketClaim:
        """Return the same claim for another thread."""
        return BucketClaim(self.store, self.number, self.owner, self.newest, self._lock)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the others of this run from sealing and deleting, and know what they have written
        down. A block may be inside another one. BucketFailed if the store does not answer, or
        another one does not end."""
        if self._lock is None or self._is_alone:
            yield
            return
        with self._lock():
            self._is_alone = True
            try:
                found = _read_told(self.store, self.number)
                if found is not None:
                    self.newest, self._before = dict(found.newest), dict(found.before)
                yield
            finally:
                self._is_alone = False

    def beating(self, advance: Advance) -> Advance:
        """Return an ``advance`` that also beats when it is time, during a long copy; raises as
        :meth:`check` besides what ``advance`` does."""
        beaten = time.monotonic()

        def told(count: int) -> None:
            nonlocal beaten
            if time.monotonic() - beaten > BUCKET_BEAT_SECONDS:
                beaten = time.monotonic()
                self.beat()
            advance(count)

        return told


Lock = Callable[[], AbstractContextManager[object]]
"""Makes what one process at a time is in."""


def claim_lock(job: JobDirectory) -> Path:
    """Return where this machine's processes lock the claim that they share."""
    return job.control / "bucket-claim.lock"


def lock_at(path: Path) -> Lock:
    """Return the lock of this machine's processes at a path; BucketFailed if it stays taken."""

    @contextlib.contextmanager
    def lock() -> Iterator[None]:
        held = filelock.FileLock(path, timeout=_LOCK_SECONDS, mode=0o600)
        try:
            held.acquire()
        except filelock.Timeout:
            raise BucketFailed(
                f"another process has held {path} for {_LOCK_SECONDS:.0f} s"
            ) from None
        try:
            yield
        finally:
            held.release()

    return lock


def identify(store: Bucket, identity: str) -> None:
    """Make the bucket this job's, or check that it is.

    Raises:
        BucketRefused: it is another job's.
        BucketFailed: the store does not answer.
    """
    if not create(store, JOB, msgspec.json.encode(_Job(identity))):
        found = identity_of(store)
        if found != identity:
            raise BucketRefused(
                f"{store.url} holds another job: choose another prefix, or bring that job here: "
                f"elastic-ckpt pull {store.url} DIR"
            )


def identity_of(store: Bucket) -> str:
    """Return the identity of the job that a bucket holds; empty if it holds none."""
    try:
        return msgspec.json.decode(store.get(JOB, _MAX_BYTES), type=_Job).identity
    except FileNotFoundError:
        return ""
    except (msgspec.MsgspecError, ValueError):
        raise BucketRefused(f"{store.url}/{JOB} is not what elastic-ckpt wrote") from None


def newest_claim(store: Bucket) -> int:
    """Return the number of the newest owner, as far as the store lists it; 0 without any."""
    numbers = (number_of(one.key) for page in store.listing(RUNS) for one in page)
    return max((number for number in numbers if number is not None), default=0)


def read_owner(store: Bucket, number: int) -> Owner | None:
    """Return the record of an owner; None if there is none."""
    try:
        return msgspec.json.decode(store.get(run_key(number), _MAX_BYTES), type=Owner)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError):
        raise BucketRefused(
            f"{store.url}/{run_key(number)} is not what elastic-ckpt wrote"
        ) from None


def read_beat(store: Bucket, number: int) -> Beat | None:
    """Return what an owner last said; None if nothing can be read of it."""
    try:
        return msgspec.json.decode(store.get(beat_key(number), _MAX_BYTES), type=Beat)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        return None


def read_told(store: Bucket, number: int) -> dict[str, str] | None:
    """Return the newest seals that an owner has told of, by session; None if nothing can be read
    of it."""
    found = _read_told(store, number)
    return None if found is None else found.newest


def _read_told(store: Bucket, number: int) -> _Told | None:
    try:
        return msgspec.json.decode(store.get(told_key(number), _MAX_BYTES), type=_Told)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        return None


def new_owner(run_id: str, node: str, endpoint: str = "") -> Owner:
    """Return the record of this process."""
    return Owner(
        run_id=run_id, node=node, owner=ProcessIdentity.current(), nonce=secrets.token_hex(16),
        endpoint=endpoint,
    )  # fmt: skip


def claim_after(store: Bucket, previous: int, owner: Owner) -> BucketClaim:
    """BucketClaim the number after ``previous``, of whom it is known that it has gone.

    Raises:
        LockHeld: another run was faster.
        BucketFailed: the store does not answer; a repeat with the same ``owner`` is safe.
    """
    number = previous + 1
    if not create(store, run_key(number), msgspec.json.encode(owner)):
        other = read_owner(store, number)
        raise LockHeld(f"{other.shown if other else 'another run'} has just taken {store.url} over")
    # An owner may vanish between its record and its first word; the one before it has spoken.
    before = (read_told(store, one) for one in range(previous, max(0, previous - KEPT_CLAIMS), -1))
    made = BucketClaim(store, number, owner, next((one for one in before if one is not None), None))
    try:
        made.tell()
        made.beat()
    except RunSuperseded as error:
        raise LockHeld(str(error)) from None
    _forget(store, number - KEPT_CLAIMS)
    return made


def claim_of(store: Bucket, number: int, nonce: str, lock: Lock | None = None) -> BucketClaim:
    """Return the claim that another process of the same run has made; ``lock`` is theirs as well.

    Raises:
        RunSuperseded: it is another run's.
        BucketFailed: the store does not answer.
    """
    owner = read_owner(store, number)
    if owner is None or owner.nonce != nonce:
        raise RunSuperseded(f"claim {number} of {store.url} is not this run's")
    return BucketClaim(store, number, owner, read_told(store, number), lock)


def _forget(store: Bucket, last: int) -> None:
    with contextlib.suppress(BucketFailed, BucketRefused):  # who may not delete may own
        old = [number for number in range(last - 5, last + 1) if number > 0]
        store.delete([key for number in old for key in _keys(number)])


def _keys(number: int) -> tuple[str, ...]:
    return run_key(number), beat_key(number), told_key(number)
