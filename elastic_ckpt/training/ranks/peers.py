"""Outcomes between ranks, through the job's key-value store instead of collectives.

A collective hangs the healthy ranks when one has raised. Here each rank posts its outcome, the
leader reads all of them and posts a verdict, and every rank reads that. So an error on one rank
becomes the same error on every rank. Every wait polls, is bounded, and names the missing ranks.
Exchanges are numbered and named: ranks that meet in one number under two names have diverged, which
is an error on all of them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Final, TypeVar

from torch import distributed

from elastic_ckpt.errors import (
    ElasticCkptError,
    ExitCode,
    LeaderLost,
    SaveFailed,
    UnequalSteps,
    UsageError,
)
from elastic_ckpt.training.ranks.peer_wait import MEETING_SECONDS, WORKING_SECONDS, Wait
from elastic_ckpt.training.ranks.rank_errors import (
    as_failure,
    decode_failure,
    encode_failure,
    leader_lost,
)
from elastic_ckpt.util.outlet import EXIT_SECONDS, standard_error

LIMIT_SECONDS: Final = 1800.0
"""Maximum duration of an exchange; a rank that takes longer counts as lost."""

FAILURE_GRACE_SECONDS: Final = 10.0
"""How long the other ranks may take to post their outcome after one rank failed."""

_SHORTEST_PAUSE: Final = 0.00025
_LONGEST_PAUSE: Final = 0.01
"""Seconds between polls of the store, which serves one rank at a time: many ranks poll less often.
(Its own ``wait`` cannot be interrupted before it times out, and then prints a warning.)"""

_OK: Final = b"+"
_BAD: Final = b"!"
_DIVERGED: Final = "diverged"

T = TypeVar("T")

dist: Any = distributed
"""Its stores are public, but untyped."""


class Peers:
    """The ranks of this incarnation. All ranks call the same methods in the same order."""

    def __init__(self, rank: int, world_size: int, store: Any, limit: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self.limit_seconds = limit
        self.pause_seconds = min(_SHORTEST_PAUSE * world_size, _LONGEST_PAUSE)
        self._round = 0
        self._keys: dict[str, list[str]] = {}  # by round, those that a rank may still read
        self._watching: Any = None

    @classmethod
    def connect(cls, limit: float = LIMIT_SECONDS) -> Peers:
        """Connect to the default process group's ranks; without one, this process is alone.
        UsageError if there are other ranks, but no process group yet."""
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "no process group is initialized: call colossalai.launch_from_torch() or "
                "torch.distributed.init_process_group() before Session, load_checkpoint or "
                "should_save"
            )
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, None, limit)
        store = dist.PrefixStore(_prefix(), _base_store())
        return cls(dist.get_rank(), dist.get_world_size(), store, limit)

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which chooses, seals and prints."""
        return self.rank == 0

    def collect(
        self,
        name: str,
        produce: Callable[[], bytes],
        *,
        doing: str = "save",
        watched: bool = False,
    ) -> list[bytes]:
        """Run ``produce`` on every rank; the leader receives all results, the others none.

        Args:
            doing: the verb for the error message, as in "rank 3 could not save".
            watched: ``produce`` runs collectives of other libraries. A rank that is stuck in one
                because a peer failed cannot raise: it prints the error and ends its process.

        Raises:
            ElasticCkptError: on every rank, as the first failed rank raised it.
            SaveFailed: on every rank, if that rank raised anything else; StorageFailed if that was
                an ``OSError``.
        """
        key = self._next(range(self.world_size))
        try:
            with self._watch(key) if watched else nullcontext():
                mine = produce()
        except Exception as error:
            failed = as_failure(self.rank, error, doing)
            encoded = encode_failure(failed, self.rank)
            with suppress(LeaderLost):
                self._post(f"{key}/failed", _BAD, encoded)
                self._post(f"{key}/{self.rank}", _BAD, encoded)
                self._judge(key, name)
            raise failed from error
        results: list[bytes] = []

        def keep(found: list[bytes]) -> bytes:
            results.extend(found)
            return b""

        self._post(f"{key}/{self.rank}", _OK, _named(name, mine))
        self._judge(key, name, mine, keep)
        return results

    def agree(self, name: str, mine: bytes, judge: Callable[[list[bytes]], bytes]) -> bytes:
        """Return on every rank what the leader's ``judge`` makes of all ranks' values.

        Args:
            name: what this rank is doing, with its step, in words: ranks that meet under different
                names raise an error that quotes them.

        Raises:
            UnequalSteps: on every rank, if they are at different exchanges.
            ElasticCkptError: on every rank, if ``judge`` raised one.
        """
        key = self._next(range(self.world_size))
        self._post(f"{key}/{self.rank}", _OK, _named(name, mine))
        return self._judge(key, name, mine, judge, MEETING_SECONDS)

    def leader_does(self, name: str, act: Callable[[], T]) -> T | None:
        """Run ``act`` on the leader; the other ranks wait for its outcome.

        Returns:
            What ``act`` returned, on the leader; None elsewhere.

        Raises:
            ElasticCkptError: on every rank, if ``act`` raised one; else SaveFailed.
        """
        key = self._next()
        if not self.is_leader:
            self._verdict(key, name)
            return None
        try:
            result = act()
        except Exception as error:
            failed = as_failure(self.rank, error, "save")
            self._post(f"{key}/verdict", _BAD, encode_failure(failed, self.rank))
            raise failed from error
        self._post(f"{key}/verdict", _OK, _named(name, b""))
        return result

    def tell(self, name: str, value: bytes) -> bytes:
        """Return the leader's value on every rank."""
        key = self._next()
        if self.is_leader:
            self._post(f"{key}/verdict", _OK, _named(name, value))
            return value
        return self._verdict(key, name)

    def barrier(self, name: str) -> None:
        """Wait, for a bounded time, until every rank has called this."""
        self.agree(name, b"", lambda _: b"")

    def arrive(self, meeting: str) -> None:
        """Post that this rank has come to a meeting. It is no exchange: others may never come."""
        self._post(f"{meeting}/{self.rank}", _OK, b"")

    def absent(self, meeting: str, first: int = 0) -> tuple[int, bool]:
        """Return the first rank, from ``first`` on, that has not come to a meeting, -1 if all have;
        and whether it is in this rank's next exchange instead."""
        for rank in range(first, self.world_size if self._store is not None else 0):
            if not self._there(f"{meeting}/{rank}"):
                return rank, self._there(f"{self._round + 1}/{rank}")
        return -1, False

    # -- inside -------------------------------------------------------------------------------

    @contextmanager
    def _watch(self, key: str) -> Iterator[None]:
        if self._store is not None and self._watching is None:
            self._watching = private_store()
        store = self._watching
        if store is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(
            target=self._end_if_stuck, args=(store, key, done), name="save-watch", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(FAILURE_GRACE_SECONDS)  # or it could be inside the store at exit

    def _end_if_stuck(self, store: Any, key: str, done: threading.Event) -> None:
        try:
            while not done.wait(0.5) and not store.check([f"{key}/failed"]):
                pass
            if done.is_set():
                return
            error = decode_failure(store.get(f"{key}/failed"))
        except RuntimeError as lost:
            error = leader_lost(lost)
        if not done.wait(FAILURE_GRACE_SECONDS):
            line = f"elastic-ckpt: error: rank {self.rank} is stuck in a collective since {error}"
            standard_error().put(f"{line}\n".encode())
            standard_error().flush(EXIT_SECONDS)
            os._exit(int(ExitCode.FAILED))

    def _judge(
        self,
        key: str,
        name: str,
        mine: bytes = b"",
        judge: Callable[[list[bytes]], bytes] = lambda _: b"",
        patience: float = WORKING_SECONDS,
    ) -> bytes:
        """Return the verdict, which the leader makes of all outcomes; raise it on every rank."""
        if self.world_size == 1:
            return judge([mine])
        if not self.is_leader:
            return self._verdict(key, name, patience)
        outcomes: list[bytes] = []
        bad: ElasticCkptError | None = None
        wait = Wait(self, key, name, patience)
        for rank in range(self.world_size):
            try:
                outcomes.append(self._outcome(wait, rank))
            except ElasticCkptError as error:
                bad = bad or error
                wait.shorten(FAILURE_GRACE_SECONDS)
        try:
            if bad is not None:
                raise bad
            verdict = judge(outcomes)
        except ElasticCkptError as error:
            self._post(f"{key}/verdict", _BAD, encode_failure(error, self.rank))
            raise
        self._post(f"{key}/verdict", _OK, _named(name, verdict))
        self._forget_before(key)
        return verdict

    def _outcome(self, wait: Wait, rank: int) -> bytes:
        failed, first_failure = f"{wait.key}/failed", 0.0
        while not self._there(f"{wait.key}/{rank}"):
            if not first_failure and self._there(failed):
                first_failure = time.monotonic()
            if first_failure and time.monotonic() > first_failure + FAILURE_GRACE_SECONDS:
                raise decode_failure(self._read(failed))
            wait.poll(SaveFailed(rank, f"no answer within {self.limit_seconds:.0f} s"))
        return self._named_value(self._read(f"{wait.key}/{rank}"), wait.name, rank)

    def _verdict(self, key: str, name: str, patience: float = WORKING_SECONDS) -> bytes:
        wait = Wait(self, key, name, patience, FAILURE_GRACE_SECONDS)
        while not self._there(f"{key}/verdict"):
            wait.poll(SaveFailed(0, f"no answer from the leader within {self.limit_seconds:.0f} s"))
        try:
            return self._named_value(self._read(f"{key}/verdict"), name, 0)
        except UnequalSteps as error:
            self._post(_DIVERGED, _BAD, encode_failure(error, self.rank))  # the leader is elsewhere
            raise

    def _named_value(self, posted: bytes, name: str, rank: int) -> bytes:
        """Return what was posted under this name.

        Raises:
            ElasticCkptError: a failure was posted, or another name.
        """
        if posted[:1] == _BAD:
            raise decode_failure(posted)
        found, _, value = posted[1:].partition(b"\0")
        if found != name.encode():
            theirs = found.decode(errors="replace")
            raise UnequalSteps(
                f"the ranks have diverged: rank {self.rank} is at {name!r}, rank {rank} at "
                f"{theirs!r}; every rank must make the same steps, epochs and saves"
            )
        return value

    def missing(self, key: str) -> list[int]:
        """Return the ranks that have not arrived; on a rank other than the leader, only the leader.

        If the leader has arrived, it is the one to report.
        """
        ranks = range(self.world_size) if self.is_leader else [0]
        return [rank for rank in ranks if not self._there(f"{key}/{rank}")]

    def check_diverged(self) -> None:
        """Raise what a rank found that met the leader in another exchange."""
        if self._there(_DIVERGED):
            raise decode_failure(self._read(_DIVERGED))

    # A store whose host is gone raises one of several torch errors, each a RuntimeError; callers
    # see one typed error.

    def _there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise leader_lost(error) from None

    def _read(self, key: str) -> bytes:
        try:
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise leader_lost(error) from None

    def _post(self, key: str, mark: bytes, value: bytes) -> None:
        if self._store is None:
            return
        try:
            self._store.set(key, mark + value)
        except RuntimeError as error:
            raise leader_lost(error) from None

    def _next(self, ranks: Iterable[int] = ()) -> str:
        """Return the key of the next round, in which these ranks answer."""
        self._round += 1
        key = str(self._round)
        if self._store is not None and self.is_leader:
            self._keys[key] = [f"{key}/verdict", *(f"{key}/{rank}" for rank in ranks)]
        return key

    def _forget_before(self, key: str) -> None:
        """Delete the earlier rounds' keys: a rank that answered this round has read them all."""
        for old in list(self._keys):
            if old == key:
                return
            for posted in self._keys.pop(old):
                self._store.delete_key(posted)


def _named(name: str, value: bytes) -> bytes:
    return name.encode() + b"\0" + value


def private_store() -> Any:
    """Return a separate connection to the job's store, for a thread: a client runs one call at a
    time. None if it is not a TCP store; LeaderLost if the store does not answer."""
    store = _base_store()
    if not isinstance(store, dist.TCPStore):
        return None
    try:
        fresh = dist.TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=FAILURE_GRACE_SECONDS),
        )  # fmt: skip
    except RuntimeError as error:  # its host has just died
        raise leader_lost(error) from None
    return dist.PrefixStore(_prefix(), fresh)


def _base_store() -> Any:
    """Return the store below the default process group; torch has no public name for it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _prefix() -> str:
    """Return a key prefix of this launch: torchrun keeps its store across restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"elastic-ckpt/{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
