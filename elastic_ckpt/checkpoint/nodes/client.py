"""A node's memory, as another node asks for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import xxhash

from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share, decode_memory_seal
from elastic_ckpt.checkpoint.nodes.link import (
    Copied,
    Copy,
    CopyMade,
    Describe,
    Fetch,
    Hello,
    Keep,
    Keeping,
    Kept,
    NodeLink,
    NotServed,
    Reply,
    Request,
    SentPiece,
    Settle,
)
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import CheckpointRejected, NodeLost

PIECE_BYTES: Final = CHUNK_BYTES
"""Of a file at once."""

COPY_SECONDS: Final = 600.0
"""What a piece may take that is copied to a slow disk; the last one has all of them synced."""

_CONNECT_SECONDS: Final = 5.0
"""A host that is switched off does not even refuse."""


class NodeMemory:
    """A connection to the supervisor that serves a share. Not thread-safe. A context manager; it
    connects at the first request. Each request raises NodeLost if the node does not answer, and
    CheckpointRejected if it does not have what it is asked for."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._link: NodeLink | None = None

    def __enter__(self) -> NodeMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self, attempt: str) -> MemorySeal:
        """Return the seal of its share of an attempt."""
        reply = self._ask(Describe(attempt, self.share.first))
        if not isinstance(reply, SentPiece):
            raise self._odd(reply)
        data = bytearray(reply.bytes)
        self._linked().fill(data)
        seal = decode_memory_seal(bytes(data))
        ranks = {entry.rank for entry in seal.files}
        if seal.attempt != attempt or not ranks <= set(self.share.ranks):
            raise CheckpointRejected(f"{self.share.host} has another checkpoint than it said")
        return seal

    def fetch(self, attempt: str, path: str, begin: int, target: memoryview) -> str:
        """Fill ``target`` with a file's bytes from ``begin`` on; return their digest.
        CheckpointRejected if they are not those that the other node has read from its memory."""
        reply = self._ask(Fetch(attempt, self.share.first, path, begin, len(target)))
        if not isinstance(reply, SentPiece) or reply.bytes != len(target):
            raise self._odd(reply)
        self._linked().fill(target)
        if xxhash.xxh3_128_hexdigest(target) != reply.xxh3_128:
            raise CheckpointRejected(f"{path} was changed on its way from {self.share.host}")
        return reply.xxh3_128

    def begin_copy(self, attempt: str, target: Ref) -> None:
        """Have it copy a piece of its share to the disk; call :meth:`copied` next."""
        self._linked().send(Copy(attempt, self.share.first, target.encode().decode()))

    def copied(self) -> Copied:
        """Wait until that piece is copied."""
        self._linked().wait(COPY_SECONDS)
        reply = self._reply()
        if not isinstance(reply, Copied):
            raise self._odd(reply)
        return reply

    def settle(self, attempt: str) -> None:
        """Tell it that an attempt is on the disk."""
        self._ask(Settle(attempt))

    def report_copy(self, attempt: str) -> None:
        """Tell it that this node has a copy of its share of an attempt."""
        self._ask(CopyMade(attempt, self.share.first))

    def keep(self, attempt: str, source: Share, limit: float) -> None:
        """Have it keep the share of another node, which leaves; NodeLost if that is not done at
        ``limit``, in monotonic seconds."""
        self._linked().send(Keep(attempt, source))
        reply: Reply = Keeping(0)
        while isinstance(reply, Keeping):
            left = limit - time.monotonic()
            if left <= 0:
                raise NodeLost(f"{self.share.host} has no copy yet, and the time is up")
            self._linked().wait(left)
            reply = self._reply()
        if not isinstance(reply, Kept):
            raise self._odd(reply)

    def close(self) -> None:
        """Close the connection. A repeat does nothing."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _ask(self, request: Request) -> Reply:
        self._linked().send(request)
        return self._reply()

    def _reply(self) -> Reply:
        reply: Reply | None = self._linked().receive(Reply)
        if reply is None:
            raise NodeLost(f"{self.share.host} closed the connection")
        if isinstance(reply, NotServed):
            raise CheckpointRejected(f"{self.share.host}: {reply.why}")
        return reply

    def _linked(self) -> NodeLink:
        if self._link is None:
            where = self.share.host, self.share.port
            try:
                connection = socket.create_connection(where, timeout=_CONNECT_SECONDS)
            except OSError as error:
                raise NodeLost(f"{self.share.host}: {error.strerror or error}") from None
            self._link = NodeLink(connection, self.share.host)
            self._link.send(Hello(self.share.token))
        return self._link

    def _odd(self, reply: Reply) -> NodeLost:
        return NodeLost(f"{self.share.host} answered with {type(reply).__name__}")


def settle(others: Iterable[Share], attempt: str) -> None:
    """Tell nodes that an attempt is on the disk; one that is gone needs not know."""
    for share in others:
        with suppress(NodeLost, CheckpointRejected), NodeMemory(share) as node:
            node.settle(attempt)
