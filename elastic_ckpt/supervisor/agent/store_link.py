"""Exchanges the nodes' states through the job's store, in a thread of its own.

A call of the store may block for seconds when the network is cut. So this thread does nothing
else; the agent's main thread reads the newest states and their age.
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
from elastic_ckpt.supervisor.agent.cluster_member import AWAY_SECONDS

_JOB: Final = "job"
_NUMBERS: Final = "numbers"


class Store(Protocol):
    """The part of torch's TCPStore that a link uses; each call may raise RuntimeError."""

    def set(self, key: str, value: str) -> Any: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class StoreLink:
    """The real ``Link`` of a cluster member; the head has one to its own store, too.

    Attributes:
        number: this member's; -1 until it has one.
        heard_at: when the head's newest report arrived, in monotonic seconds.
        job: that report; None before the first.
        heard: the members' reports, and the time at which they were read; on the head only.
        broken: why the connection failed; empty while it works.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        mine: MemberState,
        job: JobState | None,
        wake: Callable[[], None],
    ) -> None:
        """The thread calls ``connect``, which is bounded, and ``wake`` when a report has arrived.
        ``mine`` and ``job`` are the first reports; only the head has the latter."""
        self.number = -1
        self.heard_at = self._turned_at = time.monotonic()
        self.job: JobState | None = None
        self.heard: tuple[dict[int, Seen], float] = ({}, self.heard_at)
        self.broken = ""
        self._connect = connect
        self._wake = wake
        self._leads = job is not None
        self._mine, self._job_report = _encode(mine), _encode(job)
        self._beat = 0
        self._reports: dict[str, tuple[bytes, bytes]] = {}  # by key: the last beat, and the report
        self._arrived_at: dict[str, float] = {}
        self._changed = threading.Event()
        self._closed = False
        threading.Thread(target=self._run, name="store-link", daemon=True).start()

    def say(self, mine: MemberState, job: JobState | None) -> None:
        reports = _encode(mine), _encode(job)
        if reports != (self._mine, self._job_report):
            self._mine, self._job_report = reports
            self._changed.set()

    def close(self) -> None:
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
            # This process was stopped, perhaps with the other nodes: wait for their reports.
            self._arrived_at = dict.fromkeys(self._arrived_at, began)
        self._turned_at = began
        self._beat += 1
        if self.number < 0:
            self._enter(store)
        if self.number < 0:
            return  # closed before it had entered
        if self._leads:
            store.set(_JOB, f"{self._beat} {self._job_report}")
        store.set(f"member/{self.number}", f"{self._beat} {self._mine}")
        news = self._hear(_JOB, store.multi_get([_JOB])[0])
        if news:
            self.job = msgspec.json.decode(self._reports[_JOB][1], type=JobState)
        self.heard_at = self._arrived_at[_JOB]
        if self._leads:
            members, spoke = self._hear_members(store)
            self.heard = members, began
            news |= spoke
        if news:
            self._wake()

    def _enter(self, store: Store) -> None:
        """Get a number, the head before all others."""
        while not (self._leads or self._closed or store.check([_JOB])):
            time.sleep(BEAT_SECONDS)
        if not self._closed:  # or this node would be there twice, if it leads here by now
            self.number = int(store.add(_NUMBERS, 1)) - 1

    def _hear(self, key: str, data: bytes) -> bool:
        """Record when a report arrived; whether it contains news."""
        beat, _, body = data.partition(b" ")
        before = self._reports.get(key, (b"", b""))
        if before[0] != beat:
            self._arrived_at[key] = time.monotonic()
            self._reports[key] = beat, body
        return before[1] != body

    def _hear_members(self, store: Store) -> tuple[dict[int, Seen], bool]:
        count = int(store.add(_NUMBERS, 0))
        lost = self.job.lost if self.job else set()
        keys = {number: f"member/{number}" for number in range(count) if number not in lost}
        there = [  # a member that is missing may be between its two calls
            number for number, key in keys.items() if key in self._reports or store.check([key])
        ]
        news = False
        found = dict(self.heard[0])
        for number, data in zip(there, store.multi_get([keys[one] for one in there]), strict=True):
            key = keys[number]
            state = found[number].state if number in found else None
            if self._hear(key, data) or state is None:
                state = msgspec.json.decode(self._reports[key][1], type=MemberState)
                news = True
            found[number] = Seen(state, self._arrived_at[key])
        return found, news


class TorchNetwork:
    """The real ``Network`` of a cluster member: torch's stores."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """A connection's thread calls ``wake`` when something new has arrived."""
        self._wake = wake

    def host_workers(self, address: str) -> Any:
        return launch.host_workers(address)

    def connect(self, rendezvous: Rendezvous, mine: MemberState, job: JobState | None) -> StoreLink:
        return StoreLink(partial(launch.connect, rendezvous), mine, job, self._wake)


def _encode(report: MemberState | JobState | None) -> str:
    return "" if report is None else msgspec.json.encode(report).decode()
