"""Outcomes between ranks, through the job's key-value store instead of collectives.

A collective hangs the healthy ranks when one has raised. Here each rank posts its outcome, the
leader reads all of them and posts a verdict, and every rank reads that. So an error on one rank
becomes the same error on every rank, and N ranks need four calls of the store each. Every wait
blocks, is bounded, and names the missing ranks.
Exchanges are numbered and named: ranks that meet in one number under two names have diverged, which
is an error on all of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final, TypeVar

from torch import distributed as dist

from elastic_ckpt.errors import (
    ElasticCkptError,
    ExitCode,
    LeaderLost,
    SaveFailed,
    UnequalSteps,
    UsageError,
)
from elastic_ckpt.training.ranks.job_store import job_store, private_store
from elastic_ckpt.training.ranks.key_reader import KeyRead, KeyReader
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

LOOK_SECONDS: Final = 1.0
"""Maximum time until the leader sees that a rank failed while others are at work."""

MAX_LOOKS: Final = 1000
"""Looks at the store a second, of all ranks together, for what may never be there."""

_OK: Final = b"+"
_BAD: Final = b"!"
_DIVERGED: Final = "diverged"

T = TypeVar("T")


class Peers:
    """The ranks of this incarnation. All ranks call the same methods in the same order."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        limit: float,
        connect: Callable[[], Any] = lambda: None,
    ) -> None:
        """``connect`` returns another connection to the ``store``; None if threads can share it."""
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self.limit_seconds = limit
        self._reader = KeyReader(store, connect)
        self._round = 0
        self._answered = ""  # the key of this rank's newest answer
        self._verdicts: list[str] = []  # on the leader, the keys that a rank may still read

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
        rank, size = dist.get_rank(), dist.get_world_size()
        return cls(rank, size, job_store(), limit, private_store)

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
        key = self._next()
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

        self._answer(key, _named(name, mine))
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
        key = self._next()
        self._answer(key, _named(name, mine))
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

    def await_arrival(self, meeting: str, rank: int) -> None:
        """Wait until this rank has come to a meeting, for a moment at most."""
        if self._store is not None:
            arrival = self._reader.read([f"{meeting}/{rank}"])
            arrival.wait(max(0.1, self.world_size / MAX_LOOKS))

    # -- inside -------------------------------------------------------------------------------

    @contextmanager
    def _watch(self, key: str) -> Iterator[None]:
        store = self._reader.idle_connection() if self._store is not None else None
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
            pause = max(0.5, self.world_size / MAX_LOOKS)
            while not done.wait(pause) and not store.check([f"{key}/failed"]):
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
        try:
            verdict = judge(self._outcomes(Wait(self, key, name, patience)))
        except ElasticCkptError as error:
            self._post(f"{key}/verdict", _BAD, encode_failure(error, self.rank))
            raise
        self._post(f"{key}/verdict", _OK, _named(name, verdict))
        self._forget_before(key)
        return verdict

    def _outcomes(self, wait: Wait) -> list[bytes]:
        """Return what each rank posted; raise the error of the first that failed or did not come.
        After a failure the others get a while to post theirs."""
        keys = [f"{wait.key}/{rank}" for rank in range(self.world_size)]
        reading, posted = self._reader.read(keys), dict.fromkeys(keys, b"")
        while not reading.wait(min(wait.pause, LOOK_SECONDS)) and not wait.is_over:
            if wait.look():
                self._read_arrived(posted)
            good = _OK + _named(wait.name, b"")
            bad = (one for one in posted.values() if one and not one.startswith(good))
            if any(bad) or self._there(f"{wait.key}/failed"):
                wait.shorten(FAILURE_GRACE_SECONDS)
        if reading.done:
            posted = dict(zip(keys, self._values(reading), strict=True))
        else:
            self._read_arrived(posted)
        return [self._outcome(one, wait, rank) for rank, one in enumerate(posted.values())]

    def _read_arrived(self, posted: dict[str, bytes]) -> None:
        """Add what the ranks have posted since; empty is what they have not."""
        for key, before in posted.items():
            if not before and self._there(key):
                posted[key] = self._read(key)

    def _outcome(self, posted: bytes, wait: Wait, rank: int) -> bytes:
        if posted:
            return self._named_value(posted, wait.name, rank)
        if self._there(f"{wait.key}/failed"):
            raise decode_failure(self._read(f"{wait.key}/failed"))
        raise SaveFailed(rank, f"no answer within {self.limit_seconds:.0f} s")

    def _verdict(self, key: str, name: str, patience: float = WORKING_SECONDS) -> bytes:
        wait = Wait(self, key, name, patience, FAILURE_GRACE_SECONDS)
        reading = self._reader.read([f"{key}/verdict"])
        while not reading.wait(wait.pause):
            if wait.is_over:
                raise SaveFailed(0, f"no answer from the leader within {self.limit_seconds:.0f} s")
            wait.look()
        try:
            return self._named_value(self._values(reading)[0], name, 0)
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
        ranks = range(self.world_size if self.is_leader else 1)
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

    def _values(self, reading: KeyRead) -> list[bytes]:
        try:
            return reading.values()
        except RuntimeError as error:
            raise leader_lost(error) from None

    def _post(self, key: str, mark: bytes, value: bytes) -> None:
        if self._store is None:
            return
        try:
            self._store.set(key, mark + value)
        except RuntimeError as error:
            raise leader_lost(error) from None

    def _answer(self, key: str, value: bytes) -> None:
        """Post this rank's outcome. The leader has read the one before, which is deleted."""
        before, self._answered = self._answered, f"{key}/{self.rank}"
        self._post(self._answered, _OK, value)
        if before:
            self._delete(before)

    def _next(self) -> str:
        """Return the key of the next round."""
        self._round += 1
        key = str(self._round)
        if self.is_leader:
            self._verdicts.append(key)
        return key

    def _forget_before(self, key: str) -> None:
        """Delete the earlier rounds' verdicts: a rank that answered this round has read them."""
        while self._verdicts and self._verdicts[0] != key:
            self._delete(f"{self._verdicts.pop(0)}/verdict")

    def _delete(self, key: str) -> None:
        if self._store is None:
            return
        try:
            self._store.delete_key(key)
        except RuntimeError as error:
            raise leader_lost(error) from None


def _named(name: str, value: bytes) -> bytes:
    return name.encode() + b"\0" + value
