"""What supervisor and agent say to each other: one line of JSON per message, over pipes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from typing import Final

import msgspec

from elastic_ckpt.core.agreement import RequestKind
from elastic_ckpt.core.retention import Retention


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers run.

    Attributes:
        script: path of the training script.
        args: its arguments.
        directory: the job directory.
        nproc: workers on this node.
        preload: modules that the template process imports before workers fork from it.
        learn_preload: it imports those that the job was seen to import, too.
        save_interval_steps: overrides the script's interval; 0 leaves it.
        global_batch: samples of one optimizer step; 0 leaves the script's accumulation.
        retention: goes before the script's, if it asks for anything.
        memory: the node's memory tier; empty to save to the disk.
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


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Launch all workers as this incarnation."""

    incarnation: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Begin the agreement on a save or a stop."""

    kind: RequestKind


class Kill(msgspec.Struct, frozen=True, tag=True):
    """SIGKILL every worker now."""


Command = Launch | Ask | Kill


class EndKind(Enum):
    """How an incarnation ended."""

    COMPLETED = "completed"  # every worker left with its work done
    STOPPED = "stopped"  # every worker left at the agreed stop step, a checkpoint sealed
    NOT_BEGUN = "not-begun"  # a stop came before any rank had begun a step
    CRASHED = "crashed"


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An incarnation is over and none of its processes is left.

    Attributes:
        rank, exit_code, message: the worker that failed first; exit codes below 0 are signals.
        stepped: whether any rank had begun a step.
        steps: optimizer steps finished in this incarnation.
        finished: the last finished step.
        attached: whether the script made a Session or called should_save.
        failed_at, noticed_at, gone_at: when the worker failed, when the agent knew, when the
            last process was gone; nanoseconds on the monotonic clock. The kernel keeps no time
            of death: a worker that said why it fails says when, too; of one that went without a
            word it is the moment at which the kernel woke the agent.
        out_of_memory: the kernel killed something for memory in this incarnation's time.
    """

    incarnation: int
    kind: EndKind
    rank: int = -1
    exit_code: int = 0
    message: str = ""
    stepped: bool = False
    steps: int = 0
    finished: int = 0
    attached: bool = False
    failed_at: int = 0
    noticed_at: int = 0
    gone_at: int = 0
    out_of_memory: bool = False


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The agent listens."""


AgentEvent = Ready | Ended

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
