"""What nodes say to each other about the checkpoints in their memory.

Each message is its length in four bytes and JSON; the bytes of a file follow theirs.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any, Final, TypeVar

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, FileEntry
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.errors import NodeLost
from elastic_ckpt.util.text import printable

SILENCE_SECONDS: Final = 30.0
"""A node that says nothing for this long counts as lost."""

_KEEP_ALIVE: Final = (
    (socket.TCP_KEEPIDLE, int(SILENCE_SECONDS)),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
"""A machine that does not answer for a minute is found out by the kernel."""

_LENGTH: Final = struct.Struct("!I")

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of a connection."""

    token: str


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Asks for the seal of the share of an attempt that begins with the rank ``first``: the node's
    own, or one of which it has a replica."""

    attempt: str
    first: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Asks for ``count`` bytes of a file of that share, from ``begin`` on."""

    attempt: str
    first: int
    path: str
    begin: int
    count: int


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Asks to copy the share into an attempt on the disk that the head began, a piece for now; a
    repeat goes on with it.

    Attributes:
        target: the ``Ref`` of that attempt, encoded.
    """

    attempt: str
    first: int
    target: str


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Says that the attempt is on the disk: its memory may be overwritten."""

    attempt: str


class CopyMade(msgspec.Struct, frozen=True, tag=True):
    """Says that this node has a copy of the share."""

    attempt: str
    first: int


class Keep(msgspec.Struct, frozen=True, tag=True):
    """Asks to keep the share of another node, which serves it and leaves the job."""

    attempt: str
    source: Share


Request = Hello | Describe | Fetch | Copy | Settle | CopyMade | Keep


class SentPiece(msgspec.Struct, frozen=True, tag=True):
    """Answers ``Fetch``: the bytes follow, with this digest; or ``Describe``: a seal follows."""

    bytes: int
    xxh3_128: str = ""


class Copied(msgspec.Struct, frozen=True, tag=True):
    """Answers ``Copy``, ``Settle`` and ``CopyMade``.

    Attributes:
        bytes: copied this time.
        files: those of the share once all of it is durable; None before.
    """

    bytes: int = 0
    files: list[FileEntry] | None = None


class Keeping(msgspec.Struct, frozen=True, tag=True):
    """Answers ``Keep`` with each piece that came, until all of the share is there."""

    bytes: int


class Kept(msgspec.Struct, frozen=True, tag=True):
    """Answers ``Keep``: the share is sealed on a node that stays."""


class NotServed(msgspec.Struct, frozen=True, tag=True):
    """Answers anything that cannot be done."""

    why: str


Reply = SentPiece | Copied | Keeping | Kept | NotServed


class NodeLink:
    """One connection. Every method raises NodeLost if the other node is gone or silent."""

    def __init__(self, connection: socket.socket, who: str) -> None:
        self._socket = connection
        self._who = who
        connection.settimeout(SILENCE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message."""
        data = msgspec.json.encode(message)
        self.send_bytes(_LENGTH.pack(len(data)) + data)

    def send_bytes(self, data: Any) -> None:
        """Send what a message has announced."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from None

    def send_file(self, file: Any, begin: int, count: int) -> None:
        """Send that many bytes of an open file, past this process's memory."""
        try:
            self._socket.sendfile(file, begin, count)
        except OSError as error:
            raise self._lost(error) from None

    def receive(self, kind: Any) -> Any:
        """Return the next message, of one of these types; None if the other side has closed."""
        head = bytearray(_LENGTH.size)
        if not self.fill(head, may_end=True):
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MANIFEST_BYTES:
            raise NodeLost(f"{self._who} sent a message of {length} bytes")
        data = bytearray(length)
        self.fill(data)
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise NodeLost(f"{self._who} sent {printable(str(error), 200)}") from None

    def wait(self, seconds: float) -> None:
        """Wait so long for the other side's next message, if its machine answers: a drain may be
        held for minutes."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise self._lost(error) from None
        finally:
            self._socket.settimeout(SILENCE_SECONDS)

    def fill(self, target: Any, *, may_end: bool = False) -> bool:
        """Receive exactly as many bytes as ``target`` has; False if the other side has closed
        before the first, and it may."""
        view = memoryview(target).cast("B")
        filled = 0
        try:
            while filled < len(view):
                count = self._socket.recv_into(view[filled:])
                if not count and not filled and may_end:
                    return False
                if not count:
                    raise ConnectionError("it closed the connection")
                filled += count
        except OSError as error:
            raise self._lost(error) from None
        return True

    def close(self) -> None:
        """Close; a thread that waits for the other side is told."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _lost(self, error: OSError) -> NodeLost:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return NodeLost(f"{self._who}: {why}")
