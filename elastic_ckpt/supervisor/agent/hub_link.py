"""A member's connection to the head's hub, in a thread of its own.

To connect may block for seconds when the network is cut, so this thread does nothing else; the
agent's main thread reads the head's newest report and its age. The thread sleeps in the kernel
until a line arrives, this node has something to report, or a beat is due.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.protocol.cluster import BEAT_SECONDS, JobState, MemberState, Seen
from elastic_ckpt.protocol.hub_lines import BEAT, Roster, decode_job, encode_member
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.supervisor.agent import launch
from elastic_ckpt.supervisor.agent.hub import Hub
from elastic_ckpt.supervisor.agent.line_socket import LineSocket, Waker
from elastic_ckpt.supervisor.agent.member_ports import Link

CONNECT_SECONDS: Final = 2.0
"""Time for the head to accept the connection, and again to answer the first report."""

CLOSE_SECONDS: Final = 0.5
"""How long the last report may take to get into the kernel."""


class HubLink:
    """The ``Link`` of a cluster member that is not the head.

    Attributes:
        number: this member's; -1 until it has one.
        heard_at: when the head's newest line arrived, in monotonic seconds.
        job: its newest report; None before the first.
        heard: empty; only the head hears the members.
        broken: why the connection failed; empty while it works.
    """

    def __init__(
        self, connect: Callable[[], socket.socket], mine: MemberState, wake: Callable[[], None]
    ) -> None:
        """The thread calls ``connect``, which is bounded, and ``wake`` when a report has arrived.
        ``mine`` is the first report."""
        self.number = -1
        self.heard_at = time.monotonic()
        self.heard: tuple[dict[int, Seen], float] = ({}, self.heard_at)
        self.job: JobState | None = None
        self.broken = ""
        self._connect = connect
        self._wake = wake
        self._mine = encode_member(mine)
        self._sent = b""
        self._sent_at = 0.0
        self._roster = Roster(0, ())
        self._waker = Waker()
        self._closed = False
        threading.Thread(target=self._run, name="hub-link", daemon=True).start()

    def say(self, mine: MemberState, job: JobState | None) -> None:
        report = encode_member(mine)
        if report != self._mine:
            self._mine = report
            self._waker.wake()

    def close(self) -> None:
        self._closed = True
        self._waker.wake()

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            lines = LineSocket(self._connect())
            try:
                self._serve(lines)
            finally:
                lines.close()
        except (OSError, ValueError) as error:
            self.broken = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self._wake()

    def _serve(self, lines: LineSocket) -> None:
        """Exchange reports until this end closes; OSError or ValueError if the other one fails."""
        answer_by = time.monotonic() + CONNECT_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(lines, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            while True:
                last = self._closed
                if last and not self._sent:
                    return  # or this node would be there twice, if it leads here by now
                now = time.monotonic()
                self._speak(lines, now)
                if last:
                    _flush(lines, now + CLOSE_SECONDS)
                    return
                if lines.lost:
                    raise ConnectionError(lines.lost)
                if self.job is None and now > answer_by:
                    raise TimeoutError(f"the head has not answered for {CONNECT_SECONDS:.0f} s")
                writes = selectors.EVENT_WRITE if lines.unsent else 0
                selector.modify(lines, selectors.EVENT_READ | writes)
                selector.select(max(0.0, self._sent_at + BEAT_SECONDS - now))
                self._waker.clear()
                self._listen(lines)

    def _speak(self, lines: LineSocket, now: float) -> None:
        """Send this node's report if it has changed, else a beat once a second."""
        mine = self._mine
        if mine != self._sent:
            lines.send(mine)
        elif now >= self._sent_at + BEAT_SECONDS:
            lines.send(BEAT)
        else:
            lines.flush()
            return
        self._sent, self._sent_at = mine, now

    def _listen(self, lines: LineSocket) -> None:
        arrived = lines.receive()
        if arrived:
            self.heard_at = time.monotonic()
        reports = [line for line in arrived if line]
        for line in reports:
            self._take(line)
        if reports:
            self._wake()

    def _take(self, line: bytes) -> None:
        """Take in one line of the head's."""
        found = decode_job(line)
        if found.roster is not None:
            self._roster = found.roster
        if found.job is None:
            return
        if found.job.incarnation == self._roster.incarnation:
            found.job.roster = self._roster.numbers
        if found.number >= 0:
            self.number = found.number
        self.job = found.job


class HubNetwork:
    """The real ``Network`` of a cluster member."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """A connection's thread calls ``wake`` when something new has arrived."""
        self._wake = wake

    def host_workers(self, address: str) -> object:
        return launch.host_workers(address)

    def connect(self, rendezvous: Rendezvous, mine: MemberState, job: JobState | None) -> Link:
        if job is None:
            place = rendezvous.host, rendezvous.port
            return HubLink(lambda: _dial(place), mine, self._wake)
        hub = Hub(socket.socket(fileno=os.dup(rendezvous.listen_fd)), mine, job, self._wake)
        hub.start()
        return hub


def _dial(place: tuple[str, int]) -> socket.socket:
    return socket.create_connection(place, timeout=CONNECT_SECONDS)


def _flush(lines: LineSocket, limit: float) -> None:
    """Send what waits, until ``limit`` at most."""
    with selectors.DefaultSelector() as selector:
        selector.register(lines, selectors.EVENT_WRITE)
        while lines.unsent and not lines.lost and time.monotonic() < limit:
            selector.select(limit - time.monotonic())
            lines.flush()
