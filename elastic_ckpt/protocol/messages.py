"""Messages between supervisor and agent: one line of JSON each, over pipes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import msgspec

from elastic_ckpt.policy.hang import StalledNode
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.ended import Ended
from elastic_ckpt.protocol.succession import NO_POSITION
from elastic_ckpt.protocol.worker_spec import WorkerSpec


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Launch all workers as this incarnation, on at most ``nodes`` nodes and none of ``without``,
    with ``arguments`` after the script's own."""

    incarnation: int
    nodes: int = 1
    arguments: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Begin the agreement on a save or a stop; a node that is ``leaving`` does not take part in the
    next incarnation."""

    kind: RequestKind
    leaving: bool = False


class Kill(msgspec.Struct, frozen=True, tag=True):
    """SIGKILL every worker now; ``hung`` is the rank to blame for a hang, -1 for none."""

    hung: int = -1


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Announce the end of the job to the other nodes, then send :class:`Dismissed`; if it is
    ``passed_on``, only this node leaves, and another one leads."""

    exit_code: int
    message: str
    passed_on: bool = False


class Idle(msgspec.Struct, frozen=True, tag=True):
    """Whether all ranks of this node have been silent for longer than is normal."""

    idle: bool


class Checked(msgspec.Struct, frozen=True, tag=True):
    """The result of this node's own check: why it failed, or nothing. Until the first one, the node
    joins no job."""

    unfit: str


class LeaveOut(msgspec.Struct, frozen=True, tag=True):
    """For the head: the nodes that are left out from now on, and why, by name."""

    nodes: dict[str, str]


class Explained(msgspec.Struct, frozen=True, tag=True):
    """The stacks of this node's ranks in a hang of all nodes."""

    stuck: StalledNode


class Move(msgspec.Struct, frozen=True, tag=True):
    """End the workers, leave the head, and go on with this specification; then send
    :class:`Ready`. The socket of a node that leads comes over the agent's Unix socket."""

    spec: WorkerSpec


Command = Launch | Ask | Kill | Finish | Idle | Checked | LeaveOut | Explained | Move


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The agent takes commands."""


class Nodes(msgspec.Struct, frozen=True, tag=True):
    """For the head's supervisor: names of the nodes that can take part in the next incarnation, and
    the number of those that take part in this one.

    Attributes:
        lost: of the ``roster`` nodes of the newest incarnation, those that were given up.
        unfit: why the own checks of nodes failed, by name.
        taking_part: names of the ``running`` nodes.
    """

    present: tuple[str, ...]
    running: int
    lost: int = 0
    roster: int = 0
    unfit: dict[str, str] = {}
    taking_part: tuple[str, ...] = ()


class Joined(msgspec.Struct, frozen=True, tag=True):
    """This node has joined the job that these fields describe; see ``cluster.JobState``."""

    run_id: str
    job: str
    identity: str
    head: str
    terms: dict[str, str]


class Launched(msgspec.Struct, frozen=True, tag=True):
    """This node's workers are being launched, in an incarnation of ``nodes`` nodes, of whose roster
    this node has the ``position``."""

    incarnation: int
    nodes: int
    position: int = NO_POSITION


class AllIdle(msgspec.Struct, frozen=True, tag=True):
    """All ranks of all nodes are idle."""


class Hung(msgspec.Struct, frozen=True, tag=True):
    """For the head's supervisor: the stacks of the ranks of all nodes in a hang."""

    nodes: tuple[StalledNode, ...]


class LeftOut(msgspec.Struct, frozen=True, tag=True):
    """The head leaves this node out of the job, or lets it in again if ``why`` is empty."""

    why: str


class HeadLost(msgspec.Struct, frozen=True, tag=True):
    """The head does not answer; this node's workers are gone, and it keeps trying to rejoin.

    Attributes:
        position: this node's in the order of succession.
        others: nodes of the last incarnation besides the head and this one.
        passed_on: the head has left the job to the other nodes.
    """

    why: str
    position: int = NO_POSITION
    others: int = 0
    passed_on: bool = False


class JobOver(msgspec.Struct, frozen=True, tag=True):
    """The head has announced the end of the job."""

    exit_code: int
    message: str


class Dismissed(msgspec.Struct, frozen=True, tag=True):
    """All present nodes know that the job is over."""


AgentEvent = (
    Ready
    | Ended
    | Nodes
    | Joined
    | Launched
    | AllIdle
    | Hung
    | LeftOut
    | HeadLost
    | JobOver
    | Dismissed
)

_MAX_BUFFER: Final = 1024 * 1024


def encode_line(message: msgspec.Struct) -> bytes:
    """Encode one message as one line."""
    return msgspec.json.encode(message) + b"\n"


class LineReader:
    """Reads whole lines from a descriptor without blocking on half of one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = b""
        self.closed = False
        os.set_blocking(fd, False)

    def lines(self) -> Iterator[bytes]:
        """Yield the whole lines that have arrived; set ``closed`` at the end of the stream."""
        while True:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                break
            self._buffer += data
            if not data or len(self._buffer) > _MAX_BUFFER:
                self.closed = True
                break
        *whole, self._buffer = self._buffer.split(b"\n")
        yield from whole
