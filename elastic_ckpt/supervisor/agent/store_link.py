"""Carries the words of the nodes to and fro through the job's store, in a thread of its own.

A call of the store may block for seconds when a link is cut. So nothing else is done here: the
agent's main thread looks at what has come last, and at how long ago that was.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import msgspec

from elastic_ckpt.protocol.cluster import BEAT_SECONDS, JobState, MemberState, Seen
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.supervisor.agent import launch

AWAY_SECONDS: Final = 1.0
"""Between two turns, of which there are twenty a second."""

_JOB: Final = "job"
_NUMBERS: Final = "numbers"


class Store(Protocol):
    """What is used of torch's TCPStore; each call may raise RuntimeError."""

    def set(self, key: str, value: str) -> Any: ...  # noqa: D102
    def add(self, key: str, amount: int) -> int: ...  # noqa: D102
    def check(self, keys: list[str]) -> bool: ...  # noqa: D102
    def multi_get(self, keys: list[str]) -> list[bytes]: ...  # noqa: D102


class StoreLink:
    """One connection of this node to the store; the head's own is one, too.

    Attributes:
        number: this member's; -1 until it is known to the head.
        heard_at: monotonic seconds of the head's last word.
        job: that word; None before the first.
        heard: what the members say, and until when that is so; on the head alone.
        broken: why there will be no more of it; empty while there may.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        mine: MemberState,
        job: JobState | None,
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            connect: called in the thread; bounded.
            mine: what this node says of itself, to begin with.
            job: what the head says; None on other nodes.
            wake: called from the thread when something new was heard.
        """
        self.number = -1
        self.heard_at = self._turned_at = time.monotonic()
        self.job: JobState | None = None
        self.heard: tuple[dict[int, Seen], float] = ({}, self.heard_at)
        self.broken = ""
        self._connect = connect
        self._wake = wake
        self._leads = job is not None
        self._mine, self._told = _encode(mine), _encode(job)
        self._beat = 0
        self._said: dict[str, tuple[bytes, bytes]] = {}  # by key: the last beat, and the word
        self._said_at: dict[str, float] = {}
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)
        self._thread.start()

    def say(self, mine: MemberState, job: JobState | None) -> None:
        """From now on say this, beginning at once. It may be changed again after the call."""
        words = _encode(mine), _encode(job)
        if words != (self._mine, self._told):
            self._mine, self._told = words
            self._changed.set()

    def close(self) -> None:
        """Say the last word, and end; does not wait."""
        self._closed = True
        self._changed.set()

    def _run(self) -> None:
        try:
            store = self._connect()
            while True:
                last = self._closed
                self._changed.clear()
                self._turn(store)
                if last:
                    return
                self._changed.wait(BEAT_SECONDS)
        except (RuntimeError, OSError, ValueError) as error:
            lines = str(error).strip().splitlines()
            self.broken = lines[0] if lines else type(error).__name__
            with contextlib.suppress(OSError):
                self._wake()

    def _turn(self, store: Store) -> None:
        began = time.monotonic()
        if began - self._turned_at > AWAY_SECONDS:
            # This process was stopped, and perhaps the others with it: they have yet to speak.
            self._said_at = dict.fromkeys(self._said_at, began)
        self._turned_at = began
        self._beat += 1
        if self.number < 0:
            self._enter(store)
        if self._leads:
            store.set(_JOB, f"{self._beat} {self._told}")
        store.set(f"member/{self.number}", f"{self._beat} {self._mine}")
        news = self._hear(_JOB, store.multi_get([_JOB])[0])
        if news:
            self.job = msgspec.json.decode(self._said[_JOB][1], type=JobState)
        self.heard_at = self._said_at[_JOB]
        if self._leads:
            members, spoke = self._hear_members(store)
            self.heard = members, began
            news |= spoke
        if news:
            self._wake()

    def _enter(self, store: Store) -> None:
        """Be counted, the head before all others."""
        while not (self._leads or self._closed or store.check([_JOB])):
            time.sleep(BEAT_SECONDS)
        self.number = int(store.add(_NUMBERS, 1)) - 1

    def _hear(self, key: str, data: bytes) -> bool:
        """Note when somebody spoke; whether it was something new."""
        beat, _, body = data.partition(b" ")
        before = self._said.get(key, (b"", b""))
        if before[0] != beat:
            self._said_at[key] = time.monotonic()
            self._said[key] = beat, body
        return before[1] != body

    def _hear_members(self, store: Store) -> tuple[dict[int, Seen], bool]:
        count = int(store.add(_NUMBERS, 0))
        lost = self.job.lost if self.job else set()
        keys = {number: f"member/{number}" for number in range(count) if number not in lost}
        there = [  # one that is not may be between its two calls
            number for number, key in keys.items() if key in self._said or store.check([key])
        ]
        news = False
        found = dict(self.heard[0])
        for number, data in zip(there, store.multi_get([keys[one] for one in there]), strict=True):
            key = keys[number]
            state = found[number].state if number in found else None
            if self._hear(key, data) or state is None:
                state = msgspec.json.decode(self._said[key][1], type=MemberState)
                news = True
            found[number] = Seen(state, self._said_at[key])
        return found, news


class TorchNetwork:
    """The real ``Network`` of a cluster member: torch's stores."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """
        Args:
            wake: called from a connection's thread when something new arrived.
        """
        self._wake = wake

    def host_workers(self, address: str) -> Any:
        """Return a store for the workers of one incarnation."""
        return launch.host_workers(address)

    def connect(self, rendezvous: Rendezvous, mine: MemberState, job: JobState | None) -> StoreLink:
        """Return a connection that is being made to the job's store."""
        return StoreLink(partial(launch.connect, rendezvous), mine, job, self._wake)


def _encode(word: MemberState | JobState | None) -> str:
    return "" if word is None else msgspec.json.encode(word).decode()
