"""The head's side of the connections between nodes: one thread that serves all members.

The thread sleeps in the kernel until a line arrives, the agent has something new to publish, a beat
is due or a member has been silent for too long. A turn costs what has changed, and a beat of each
member once a second; so one core serves thousands of them (docs/scale.md).
"""

from __future__ import annotations

import contextlib
import logging
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import msgspec

from elastic_ckpt.protocol.cluster import BEAT_SECONDS, LOST_SECONDS, JobState, MemberState, Seen
from elastic_ckpt.protocol.hub_lines import BEAT, Roster, decode_member, encode_job, encode_member
from elastic_ckpt.supervisor.agent.line_socket import LineSocket, Waker

log = logging.getLogger(__name__)

AWAY_SECONDS: Final = 1.0
"""A turn that is later than this means that this process was stopped, and reports are not old."""

ACCEPT_AT_ONCE: Final = 64
"""Connections accepted in one turn, so that a thousand new ones do not hold up the others."""

WAKE_SECONDS: Final = 1e-5
"""Pause per member between two wake-ups of the main thread: it looks at all of them each time, and
takes what has arrived meanwhile together."""

MAX_FILES: Final = 65536
"""Open files that the process allows itself: each member has a connection."""


@dataclass(eq=False)
class _Connection:
    """A member's connection; ``number`` is -1 until its first line, ``roster_of`` the incarnation
    whose roster it has received."""

    lines: LineSocket
    heard_at: float
    number: int = -1
    roster_of: int = 0


class Hub:
    """The head's own ``Link`` of a cluster member.

    Attributes:
        number: the head's own.
        broken: why the hub failed; empty while it works.
    """

    number = 0

    def __init__(
        self,
        listener: socket.socket,
        mine: MemberState,
        job: JobState,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The thread calls ``wake`` when a report has arrived. The hub closes the listener.
        :meth:`start` starts the thread; a test calls :meth:`turn` instead."""
        self.broken = ""
        self._wake = wake
        self._clock = clock
        self._listener = listener
        listener.setblocking(False)
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._turned_at = self._due_at = clock()
        self._beat_at = self._turned_at + BEAT_SECONDS
        self._encoded = encode_member(mine), encode_job(job)
        self._newest = self._published = _copy(job)
        self._reports = {0: decode_member(self._encoded[0])}
        self._heard = {0: self._turned_at}
        self._connections: dict[int, _Connection] = {}  # members', the longest silent first
        self._strangers: dict[_Connection, None] = {}  # the same, before their first line
        self._gone: set[int] = set()
        self._next = 1
        self._news = self._closed = False
        self._accepts = True
        self._wake_at = 0.0

    def start(self) -> None:
        """Start the thread."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < (most := min(hard, MAX_FILES)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    # -- Link: called by the agent's main thread ----------------------------------------------

    @property
    def job(self) -> JobState:
        """The job's state as it was published last."""
        return self._published[0]

    @property
    def heard_at(self) -> float:
        """Now: the head is never silent to itself, even in a long turn of the thread."""
        return self._clock()

    @property
    def heard(self) -> tuple[dict[int, Seen], float]:
        """The members' newest reports, by number, and the time at which they were read."""
        read_at = self._turned_at
        heard, gone = self._heard, self._gone
        found = {
            number: Seen(state, heard[number], gone=number in gone)
            for number, state in self._reports.copy().items()
        }
        found[0] = Seen(found[0].state, read_at)
        return found, read_at

    def say(self, mine: MemberState, job: JobState | None) -> None:
        """Publish these from now on; the caller may change them afterwards."""
        assert job is not None
        encoded = encode_member(mine), encode_job(job)
        if encoded[0] != self._encoded[0]:
            self._reports[0] = decode_member(encoded[0])
            self._wake()
        if encoded[1] != self._encoded[1]:
            self._newest = _copy(job)
            self._waker.wake()
        self._encoded = encoded

    def close(self) -> None:
        """Publish the newest state, and close all connections."""
        self._closed = True
        self._waker.wake()

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self.turn()
            self._publish()
            for connection in [*self._connections.values(), *self._strangers]:
                connection.lines.close()
            self._listener.close()
        except (OSError, ValueError) as error:
            self.broken = str(error) or type(error).__name__
            log.exception("the hub failed")
            self._wake()

    def turn(self) -> None:
        """Wait for what is next, and handle all that is there."""
        events = self._selector.select(max(0.0, self._due() - self._clock()))
        now = self._clock()
        if now > self._due_at + AWAY_SECONDS:
            # This process was stopped, perhaps with the other nodes: wait for their reports.
            self._heard = dict.fromkeys(self._heard, now)
            for connection in [*self._connections.values(), *self._strangers]:
                connection.heard_at = now
        for key, _ in events:
            if isinstance(key.data, _Connection):
                self._serve(key.data, now)
            elif key.fileobj is self._listener:
                self._accept(now)
            else:
                self._waker.clear()
        if self._newest is not self._published:
            self._publish()
        if now >= self._beat_at:
            self._beat(now)
        self._give_up(now)
        self._turned_at = now
        if self._news and now >= self._wake_at:
            self._news, self._wake_at = False, now + WAKE_SECONDS * len(self._connections)
            self._wake()

    def _due(self) -> float:
        """Return when to turn without an event: for a beat, a member that is silent for too long,
        or news that the main thread has yet to receive."""
        quiet = [next(iter(self._connections.values()), None), next(iter(self._strangers), None)]
        silent = [one.heard_at + LOST_SECONDS for one in quiet if one is not None]
        news = [self._wake_at] if self._news else []
        self._due_at = min([self._beat_at, *silent, *news])
        return self._due_at

    def _accept(self, now: float) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # too many open files, perhaps: wait until the next beat
                log.warning("a connection was not accepted: %s", error)
                self._selector.unregister(self._listener)
                self._accepts = False
                return
            connection = _Connection(LineSocket(accepted), now)
            self._strangers[connection] = None
            self._selector.register(connection.lines, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, now: float) -> None:
        if connection.lines.unsent:
            connection.lines.flush()
            self._watch(connection)
        lines = connection.lines.receive()
        reports = [line for line in lines if line]
        if connection.lines.lost and (connection.number < 0 or not reports):
            self._drop(connection, connection.lines.lost)
            return
        if lines:
            self._note(connection, now)
        if reports:
            try:
                state = decode_member(reports[-1])
            except ValueError as error:  # another program, or another version of this one
                self._drop(connection, f"an invalid report: {error}")
                return
            self._take(connection, state, now)
        if connection.lines.lost:
            self._drop(connection, connection.lines.lost)

    def _note(self, connection: _Connection, now: float) -> None:
        """Note that a connection is alive; it becomes the last that will be silent."""
        connection.heard_at = now
        if connection.number > 0:
            self._heard[connection.number] = now
            self._connections[connection.number] = self._connections.pop(connection.number)

    def _take(self, connection: _Connection, state: MemberState, now: float) -> None:
        if connection.number < 0:
            del self._strangers[connection]
            connection.number, self._next = self._next, self._next + 1
            self._connections[connection.number] = connection
            self._heard[connection.number] = now
            self._greet(connection)
        self._reports[connection.number] = state
        self._news = True

    def _greet(self, connection: _Connection) -> None:
        job, roster = self._published
        connection.roster_of = roster.incarnation
        known = roster if roster.numbers else None
        self._send(connection, encode_job(job, connection.number, known))

    def _publish(self) -> None:
        """Send the newest state to all members, the roster to those that do not have it."""
        self._published = job, roster = self._newest
        short, whole = encode_job(job), encode_job(job, roster=roster)
        for connection in list(self._connections.values()):
            knows = connection.roster_of == roster.incarnation
            connection.roster_of = roster.incarnation
            self._send(connection, short if knows else whole)
        for number in job.lost & self._connections.keys():
            self._drop(self._connections[number], "it is given up")

    def _beat(self, now: float) -> None:
        self._beat_at = now + BEAT_SECONDS
        for connection in list(self._connections.values()):
            self._send(connection, BEAT)
        if not self._accepts:
            self._accepts = True
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _give_up(self, now: float) -> None:
        """Close connections that have been silent for too long."""
        for waiting in (self._connections.values(), self._strangers):
            silent = takewhile(lambda one: now - one.heard_at > LOST_SECONDS, waiting)
            for connection in list(silent):
                self._drop(connection, f"silent for {now - connection.heard_at:.1f} s")

    def _send(self, connection: _Connection, data: bytes) -> None:
        connection.lines.send(data)
        if connection.lines.lost:
            self._drop(connection, connection.lines.lost)
        elif connection.lines.unsent:
            self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        """Wait for what the connection waits for."""
        writes = selectors.EVENT_WRITE if connection.lines.unsent else 0
        self._selector.modify(connection.lines, selectors.EVENT_READ | writes, connection)

    def _drop(self, connection: _Connection, why: str) -> None:
        """Close a connection: its member has ended its workers, or will when it finds out."""
        with contextlib.suppress(KeyError, ValueError):  # it has been dropped already
            self._selector.unregister(connection.lines)
        connection.lines.close()
        self._strangers.pop(connection, None)
        if self._connections.pop(connection.number, None) is not None:
            log.info("the connection of member %d is over: %s", connection.number, why)
            self._gone.add(connection.number)
            self._news = True


def _copy(job: JobState) -> tuple[JobState, Roster]:
    """Return what is published: a copy of the state, and its roster."""
    copy = msgspec.json.decode(msgspec.json.encode(job), type=JobState)
    return copy, Roster(job.incarnation, job.roster)
