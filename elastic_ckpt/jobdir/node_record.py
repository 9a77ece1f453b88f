"""What a node's supervisor says of itself, for ``status`` and for the next ``run``."""

from __future__ import annotations

import os
import re
import socket
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.files import read_bounded, write_atomic
from elastic_ckpt.util.text import printable

_MAX_BYTES: Final = 64 * 1024
_MAX_RECORDS: Final = 4096
_MAX_COUNT: Final = 10**12
_BOARD = re.compile(r"/proc/([0-9]{1,10})/fd/[0-9]{1,10}")


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same pid.

    Attributes:
        started: seconds from the boot to its start; unlike a time of day this never moves.
    """

    host: str
    boot_id: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), boot_id(), pid, _state(pid)[1])

    @property
    def is_local(self) -> bool:
        """Whether it runs, or ran, on this host since its last boot."""
        return self.boot_id == boot_id()

    def is_alive(self) -> bool | None:
        """Whether it runs; None when it is on another host and cannot be looked at."""
        if not self.is_local:
            return None
        try:
            state, started = _state(self.pid)
        except OSError:
            return False
        return abs(started - self.started) < 0.5 and state not in "ZX"


class NoticeRecord(msgspec.Struct, frozen=True):
    """A notice as ``status`` shows it; ``deadline`` is monotonic seconds on its host."""

    source: str
    reason: str
    deadline: float


class RecoveryRecord(msgspec.Struct, frozen=True):
    """A recovery: seconds from a failure to the end of the next step, by stage.

    Attributes:
        incarnation: the one that it led to.
        stages: in order; ``protocol/start_marks.py`` says what each is.
        step, tier: where that one went on from: disk, memory, or nothing.
    """

    incarnation: int
    total_seconds: float
    stages: dict[str, float]
    step: int
    tier: str


class FailureRecord(msgspec.Struct, frozen=True):
    """A failure.

    Attributes:
        rank: who failed first; -1 if it was no rank.
        kind: the class, as in ``policy/failure.py``.
        tail: the last lines that the rank printed.
        wall: when, in seconds since the epoch.
    """

    rank: int
    kind: str
    message: str
    tail: tuple[str, ...]
    wall: float


class IntervalRecord(msgspec.Struct, frozen=True):
    """The interval that ``--save-interval auto`` came to, and one sentence on why."""

    seconds: float
    why: str


class NodeRecord(msgspec.Struct, kw_only=True):
    """A supervisor's own account.

    Attributes:
        since: when it started, seconds since the epoch.
        board: where the board is while the supervisor lives.
        exit_code: what it ended with; None while it runs or if it was killed.
        message: one line for people: what it is doing, or why it ended.
        save_interval: of ``--save-interval auto``; None where it was given.
        sessionless: the script trains without a Session and makes no checkpoints.
        memory: where the memory tier is; empty if there is none.
        last_recovery: the newest that came to its end.
        last_failure: the newest of this run.
        grace: seconds between a notice and the end of the node, where the notice does not say.
        head: name of the node that leads; this one's own for a node that is alone.
        present: names of the nodes that the head sees.
    """

    job: str
    run_id: str
    node: str
    owner: ProcessIdentity
    since: float
    state: RunState
    incarnation: int = 0
    board: str = ""
    exit_code: int | None = None
    message: str = ""
    notice: NoticeRecord | None = None
    failures: int = 0
    preemptions: int = 0
    failures_left: int = 0
    memory: str = ""
    save_interval: IntervalRecord | None = None
    sessionless: bool = False
    last_recovery: RecoveryRecord | None = None
    last_failure: FailureRecord | None = None
    grace: float = 0.0
    head: str = ""
    present: tuple[str, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether what it says is said of the whole job."""
        return self.head in ("", self.node)

    def write(self, path: Path) -> None:
        """Replace the node's record."""
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def read_record(path: Path) -> NodeRecord | None:
    """A node's record; None if there is none or it cannot be understood."""
    try:
        return _checked(msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=NodeRecord))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _checked(record: NodeRecord) -> NodeRecord:
    """Counts that a job can go on from, text for a terminal, and the owner's own board or none."""
    counts = (record.incarnation, record.failures, record.preemptions, record.failures_left)
    if min(*counts, record.owner.pid) < 0 or max(*counts, record.owner.pid) > _MAX_COUNT:
        raise ValueError("no job has counted that far")
    record.present = tuple(printable(name) for name in record.present)
    for name in ("job", "run_id", "node", "message", "head"):
        setattr(record, name, printable(getattr(record, name)))
    record.owner = msgspec.structs.replace(record.owner, host=printable(record.owner.host))
    if record.notice is not None:
        source, reason = printable(record.notice.source), printable(record.notice.reason)
        record.notice = msgspec.structs.replace(record.notice, source=source, reason=reason)
    if record.last_recovery is not None:
        found = record.last_recovery
        stages = {printable(name): seconds for name, seconds in found.stages.items()}
        record.last_recovery = msgspec.structs.replace(
            found, stages=stages, tier=printable(found.tier)
        )
    if record.last_failure is not None:
        failure = record.last_failure
        record.last_failure = msgspec.structs.replace(
            failure,
            kind=printable(failure.kind),
            message=printable(failure.message),
            tail=tuple(printable(line) for line in failure.tail),
        )
    if record.save_interval is not None:
        why = printable(record.save_interval.why)
        record.save_interval = msgspec.structs.replace(record.save_interval, why=why)
    board = _BOARD.fullmatch(record.board)
    if board is None or int(board[1]) != record.owner.pid:
        record.board = ""  # another path is nothing that we should open
    return record


def read_records(directory: Path) -> list[NodeRecord]:
    """All nodes' records, the latest run first."""
    found = [read_record(path) for path in islice(directory.glob("*.json"), _MAX_RECORDS)]
    return sorted(
        (record for record in found if record is not None),
        key=lambda record: record.since,
        reverse=True,
    )


def job_records(job: JobDirectory) -> list[NodeRecord]:
    """All nodes' records of a job, the latest run first."""
    return read_records(job.nodes) if job.owns(job.nodes) else []


def _state(pid: int) -> tuple[str, float]:
    """State letter of a process, and seconds from the boot to its start."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19]) / os.sysconf("SC_CLK_TCK")


def boot_id() -> str:
    """Identifies this boot of this host, and the PID namespace: pids mean nothing in another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def node_name(given: str | None = None) -> str:
    """``--node-name``, else SLURMD_NODENAME, else the host's name; safe as a file name."""
    name = given or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    safe = "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
    return safe if safe.strip(".") else "node"
