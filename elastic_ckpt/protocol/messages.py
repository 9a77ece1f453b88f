"""What supervisor and agent say to each other: one line of JSON per message, over pipes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import msgspec

from elastic_ckpt.policy.hang import StalledNode
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.ended import Ended
from elastic_ckpt.protocol.rendezvous import Rendezvous


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers run.

    Attributes:
        script: path of the training script.
        args: its arguments.
        directory: the job directory.
        nproc: workers on this node.
        preload: modules that the template process imports before workers fork from it.
        learn_preload: it imports those that the job was seen to import, too.
        save_interval_steps: overrides the script's interval; 0 leaves it, -1 is for none.
        global_batch: samples of one optimizer step; 0 leaves the script's accumulation.
        retention: goes before the script's, if it asks for anything.
        memory: the node's memory tier; empty to save to the disk.
        run_id, identity: of the run, and of the job directory.
        rendezvous: where the job's nodes meet; None for a node that is alone.
        terms: what all nodes must be told alike, by option.
        incarnation: the one that a worker belongs to.
        output: directory of the FIFOs that workers print to.
    """

    script: str
    args: list[str]
    directory: str
    job: str
    node: str
    board: str
    nproc: int
    preload: list[str]
    learn_preload: bool = False
    save_interval_steps: int = 0
    global_batch: int = 0
    retention: Retention = Retention()
    memory: str = ""
    run_id: str = ""
    identity: str = ""
    rendezvous: Rendezvous | None = None
    terms: dict[str, str] = {}
    incarnation: int = 0
    output: str = ""


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Launch all workers as this incarnation, on so many nodes at the most."""

    incarnation: int
    nodes: int = 1


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Begin the agreement on a save or a stop.

    Attributes:
        leaving: this node goes away, and takes no part in the next incarnation.
    """

    kind: RequestKind
    leaving: bool = False


class Kill(msgspec.Struct, frozen=True, tag=True):
    """SIGKILL every worker now."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Tell the other nodes that the job is over, and answer with :class:`Dismissed`."""

    exit_code: int
    message: str


class Idle(msgspec.Struct, frozen=True, tag=True):
    """Whether this node's ranks are all silent for longer than they ever are."""

    idle: bool


class Explained(msgspec.Struct, frozen=True, tag=True):
    """What was seen of this node's ranks in a hang of all nodes'."""

    stuck: StalledNode


Command = Launch | Ask | Kill | Finish | Idle | Explained


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The agent listens."""


class Nodes(msgspec.Struct, frozen=True, tag=True):
    """To the head's supervisor: who is there.

    Attributes:
        present: names of those that can take part in the next incarnation.
        running: how many take part in this one.
    """

    present: tuple[str, ...]
    running: int


class Joined(msgspec.Struct, frozen=True, tag=True):
    """This node is one of the job's, of which the head says so much."""

    run_id: str
    job: str
    identity: str
    head: str
    terms: dict[str, str]


class Launched(msgspec.Struct, frozen=True, tag=True):
    """This node's workers are being launched, of so many nodes'."""

    incarnation: int
    nodes: int


class AllIdle(msgspec.Struct, frozen=True, tag=True):
    """The ranks of all nodes are idle."""


class Hung(msgspec.Struct, frozen=True, tag=True):
    """To the head's supervisor: what was seen of the ranks of all nodes in a hang."""

    nodes: tuple[StalledNode, ...]


class HeadLost(msgspec.Struct, frozen=True, tag=True):
    """The head does not answer; this node's workers are gone, and it goes on looking for it."""

    why: str


class JobOver(msgspec.Struct, frozen=True, tag=True):
    """The head says that the job is over."""

    exit_code: int
    message: str


class Dismissed(msgspec.Struct, frozen=True, tag=True):
    """All nodes that are there know that the job is over."""


AgentEvent = (
    Ready | Ended | Nodes | Joined | Launched | AllIdle | Hung | HeadLost | JobOver | Dismissed
)

_MAX_BUFFER: Final = 1024 * 1024


def encode_line(message: msgspec.Struct) -> bytes:
    """One message as one line."""
    return msgspec.json.encode(message) + b"\n"


class LineReader:
    """Reads whole lines from a descriptor without blocking on half of one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""
        self.closed = False
        os.set_blocking(fd, False)

    def lines(self) -> Iterator[bytes]:
        """Every whole line that is there now; sets ``closed`` at the end of the stream."""
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                break
            if not data:
                self.closed = True
                break
            self._buffer += data
            if len(self._buffer) > _MAX_BUFFER:
                self.closed = True
                break
        *whole, self._buffer = self._buffer.split(b"\n")
        yield from whole
