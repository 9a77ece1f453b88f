"""Serves a node's generations to the other nodes of the job."""

from __future__ import annotations

import contextlib
import hmac
import mmap
import secrets
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import Final

import msgspec
import xxhash

from elastic_ckpt.checkpoint.manifest import FileEntry, encode
from elastic_ckpt.checkpoint.memory.drain import copy_share
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.client import COPY_SECONDS, PIECE_BYTES
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
from elastic_ckpt.checkpoint.nodes.replica import (
    check_piece,
    read_digests,
    replicas,
    replicate,
    settle_replicas,
)
from elastic_ckpt.checkpoint.tier import Ref, Tier
from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError, NodeLost
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.text import printable

_BACKLOG: Final = 128
_COPY_BYTES: Final = 16 * 1024 * 1024
"""Copied to the disk, or the bucket, between two answers."""


class MemoryServer:
    """Serves one node's memory tier until closed, a thread for each connection."""

    def __init__(
        self,
        tier: MemoryTier,
        target: Callable[[str], Tier],
        host: str,
        be_polite: Callable[[], None],
        leaves: Callable[[], bool] = lambda: False,
    ) -> None:
        """Listen on this node's address ``host``; OSError if that is not possible.

        Args:
            target: returns the tier of a session to which the head has the memory drained.
            be_polite: gives the calling thread the lowest priority: training goes on meanwhile.
            leaves: whether this node is under notice, so that it can keep nothing for others.
        """
        self._tier = tier
        self._target = target
        self._be_polite = be_polite
        self._leaves = leaves
        self._token = secrets.token_hex(16)
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self._host, self._port = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="memory-server", daemon=True).start()

    @property
    def where(self) -> tuple[str, int, str]:
        """Host, port and the secret, for the ranks to tell other nodes."""
        return self._host, self._port, self._token

    def close(self) -> None:
        """Accept nothing more; connections end with their other side, or with this process."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return  # closed
            link = NodeLink(connection, str(address[0]))
            threading.Thread(
                target=self._serve, args=(link,), name="memory-link", daemon=True
            ).start()

    def _serve(self, link: NodeLink) -> None:
        with (
            closing(link),
            suppress(NodeLost),
            closing(_Answers(self._tier, self._target, self._leaves)) as answers,
        ):
            hello = link.receive(Hello)
            if hello is None or not _is_same(hello.token, self._token):
                return
            while True:
                link.wait(COPY_SECONDS)  # it holds what it has asked for
                request = link.receive(Request)
                if request is None:
                    return
                if isinstance(request, Copy):
                    self._be_polite()  # the connection is for that alone
                answers.answer(request, link)


class _Answers:
    """What one connection has asked for, and the copy that is under way on it."""

    def __init__(
        self, tier: MemoryTier, target: Callable[[str], Tier], leaves: Callable[[], bool]
    ) -> None:
        self._tier = tier
        self._target = target
        self._leaves = leaves
        self._asked = "", -1
        self._found: Sealed | None = None
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, list[str]] | None = None  # of a replica
        self._copying: Generator[int, None, list[FileEntry]] | None = None
        self._held = contextlib.ExitStack()

    def close(self) -> None:
        """Give up the copy; the attempt that it wrote into is the head's to drop."""
        if self._copying is not None:
            self._copying.close()
        self._held.close()

    def answer(self, request: Request, link: NodeLink) -> None:
        try:
            if isinstance(request, Fetch):
                self._send_piece(request, link)
            elif isinstance(request, Describe):
                data = encode(self._find(request.attempt, request.first).seal)
                link.send(SentPiece(len(data)))
                link.send_bytes(data)
            elif isinstance(request, Keep):
                self._keep(request, link)
            else:
                link.send(self._act(request))
        except NodeLost:
            raise
        except (ElasticCkptError, OSError, ValueError) as error:  # a message may say anything
            link.send(NotServed(printable(str(error), 400)))

    def _act(self, request: Request) -> Reply:
        if isinstance(request, Copy):
            return self._copy(request)
        if isinstance(request, Settle):
            self._settle(request.attempt)
            return Copied()
        if isinstance(request, CopyMade):
            found = self._find(request.attempt, request.first)
            found.generation.note_copied(found.seal)
            return Copied()
        return NotServed("that is no request")

    def _find(self, attempt: str, first: int) -> Sealed:
        """Return a generation or a replica, which nothing removes before the connection ends."""
        if self._asked == (attempt, first) and self._found is not None:
            return self._found
        own = self._tier.sealed()
        for one in (*own, *replicas(self._tier.root)):
            if one.seal.attempt == attempt and one.seal.ranks.start == first:
                lock = one.generation.lock()
                self._held.callback(lock.release)
                self._digests = None if one in own else read_digests(one)
                self._sizes = {entry.path: entry.bytes for entry in one.seal.files}
                self._asked, self._found = (attempt, first), one
                return one
        raise CheckpointRejected(f"attempt {attempt[:40]!r} is not in its memory")

    def _send_piece(self, request: Fetch, link: NodeLink) -> None:
        sealed = self._find(request.attempt, request.first)
        path, begin, end = request.path, request.begin, request.begin + request.count
        if not 0 <= begin < end <= self._sizes.get(path, 0):
            raise CheckpointRejected(f"{path[:80]!r} does not have these bytes")
        with open(open_regular(sealed.generation.path / path), "rb") as file:
            digest = _digest(file.fileno(), begin, end)
            if self._digests is not None:
                check_piece(self._digests, path, begin, digest)
            link.send(SentPiece(request.count, digest))
            link.send_file(file, begin, request.count)

    def _copy(self, request: Copy) -> Copied:
        if self._copying is None:
            sealed = self._find(request.attempt, request.first)
            target = Ref.decode(request.target.encode())
            if target.attempt != sealed.seal.attempt:  # it names a directory, or a prefix
                raise CheckpointRejected("the target is of another attempt")
            if self._digests is not None:
                self._check_all(sealed, self._digests)
            attempt = self._target(sealed.seal.session).join(target)
            self._copying = copy_share(sealed, attempt)
        copied = 0
        while copied < _COPY_BYTES:
            try:
                copied += next(self._copying)
            except StopIteration as done:
                files: list[FileEntry] = done.value
                return Copied(copied, files)
        return Copied(copied)

    def _keep(self, request: Keep, link: NodeLink) -> None:
        """Make a replica at normal priority: a node with little time left waits for it."""
        source = msgspec.structs.replace(request.source, leaves=True)
        self._refuse_if_leaving()
        replicate(self._tier.root, source, request.attempt, lambda count: link.send(Keeping(count)))
        self._refuse_if_leaving()
        link.send(Kept())

    def _refuse_if_leaving(self) -> None:
        if self._leaves():
            raise CheckpointRejected("it leaves as well")

    def _check_all(self, sealed: Sealed, digests: dict[str, list[str]]) -> None:
        """Verify a replica before it is sealed elsewhere with digests of its own."""
        for entry in sealed.seal.files:
            with open(open_regular(sealed.generation.path / entry.path), "rb") as file:
                for begin in range(0, entry.bytes, PIECE_BYTES):
                    end = min(entry.bytes, begin + PIECE_BYTES)
                    check_piece(digests, entry.path, begin, _digest(file.fileno(), begin, end))

    def _settle(self, attempt: str) -> None:
        for one in self._tier.sealed():
            if one.seal.attempt == attempt:
                one.generation.settle(one.seal)
                settle_older(self._tier, one)
                settle_replicas(self._tier.root, one)


def _is_same(said: str, secret: str) -> bool:
    return hmac.compare_digest(said.encode(errors="replace"), secret.encode())


def _digest(fd: int, begin: int, end: int) -> str:
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    with (
        closing(mmap.mmap(fd, end - start, prot=mmap.PROT_READ, offset=start)) as window,
        memoryview(window) as view,
        view[begin - start :] as wanted,
    ):
        return xxhash.xxh3_128_hexdigest(wanted)


def settle_older(tier: MemoryTier, settled: Sealed) -> None:
    """Let what is older than a checkpoint on the disk be overwritten: on this node nobody drains
    it, as the head drains the oldest first."""
    for one in tier.sealed():
        if one.age < settled.age:
            one.generation.settle(one.seal)


def own_address(head: str, port: int) -> str:
    """Return this host's address as those see it that reach the head; OSError if unknown. Sends
    nothing."""
    family, kind, _, _, address = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
