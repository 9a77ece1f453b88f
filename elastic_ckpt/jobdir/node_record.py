"""The record that a node's supervisor keeps of its run, for ``status`` and the next ``run``."""

from __future__ import annotations

import os
import re
import socket
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.files import read_bounded, write_record
from elastic_ckpt.util.text import printable

_MAX_BYTES: Final = 1024 * 1024
_MAX_RECORDS: Final = 4096
_MAX_COUNT: Final = 10**12
_BOARD = re.compile(r"/proc/([0-9]{1,10})/fd/[0-9]{1,10}")


class ProcessIdentity(msgspec.Struct, frozen=True):
    """Identifies a process even after its pid was reused.

    Attributes:
        started: seconds from the boot to its start; unlike a time of day this never changes.
    """

    host: str
    boot_id: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> ProcessIdentity:
        """Return the identity of this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), boot_id(), pid, _state(pid)[1])

    @property
    def is_local(self) -> bool:
        """Whether it runs, or ran, on this host since its last boot."""
        return self.boot_id == boot_id()

    def is_alive(self) -> bool | None:
        """Whether it runs; None if it is on another host."""
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
        stages: in order; described in ``protocol/start_marks.py``.
        step, tier: what that one resumed from: disk, memory, or nothing.
    """

    incarnation: int
    total_seconds: float
    stages: dict[str, float]
    step: int
    tier: str


class FailureRecord(msgspec.Struct, frozen=True):
    """A failure.

    Attributes:
        rank: the first that failed; -1 if none did.
        kind: the failure's class, as in ``policy/failure.py``.
        tail: the last lines that the rank printed.
        wall: its time, in seconds since the epoch.
    """

    rank: int
    kind: str
    message: str
    tail: tuple[str, ...]
    wall: float


class OwnTrouble(msgspec.Struct, frozen=True):
    """Why nothing that the script writes itself is sealed.

    Attributes:
        text: one line.
        since: seconds since the epoch.
        refused: a rerun of the same command is refused, as ``--complete-when`` must be wrong.
    """

    text: str
    since: float
    refused: bool


class NodeRecord(msgspec.Struct, kw_only=True):
    """The record of a supervisor's run.

    Attributes:
        run_number: as the job counts its runs; 0 on a node that follows.
        since: when it started, in seconds since the epoch.
        board: path of the board while the supervisor lives.
        exit_code: its exit code; None while it runs or if it was killed.
        message: one line for people: what it is doing, or why it ended.
        save_interval: chosen by ``--save-interval auto``; None for a fixed one.
        saves_itself: the run watches checkpoints that the script writes itself.
        own_trouble: why nothing of that is sealed; None if something is, or may be soon.
        sessionless: the script trains without a Session and makes no checkpoints.
        stepless_since: since when an open Session, or one that the script ended with, has shown no
            step; seconds since the epoch, 0 for none.
        memory: directory of the memory tier; empty without one.
        last_recovery: the newest that was completed.
        last_failure: the newest of this run.
        grace: seconds between a notice without a deadline and the end of the node.
        head: name of the head; this node's own for a job of one node.
        took_over_from: name of the node that led before this one in the same job run; else empty.
        present: names of the nodes that the head sees.
        command: how it was started; None in records of version one.
        trained: the command of the last run before this one that was not refused with 64 or 65.
        mirror: one line on the copies in a bucket; empty without a mirror.
        bucket: the URL that is the job's place, behind this node's disk; empty without one.
    """

    job: str
    run_id: str
    node: str
    owner: ProcessIdentity
    since: float
    state: RunState
    run_number: int = 0
    incarnation: int = 0
    board: str = ""
    exit_code: int | None = None
    message: str = ""
    notice: NoticeRecord | None = None
    failures: int = 0
    preemptions: int = 0
    failures_left: int = 0
    memory: str = ""
    save_interval: OptimalInterval | None = None
    sessionless: bool = False
    saves_itself: bool = False
    own_trouble: OwnTrouble | None = None
    stepless_since: float = 0.0
    last_recovery: RecoveryRecord | None = None
    last_failure: FailureRecord | None = None
    grace: float = 0.0
    head: str = ""
    took_over_from: str = ""
    present: tuple[str, ...] = ()
    command: RunCommand | None = None
    trained: RunCommand | None = None
    mirror: str = ""
    bucket: str = ""

    @property
    def leads(self) -> bool:
        """Whether this record describes the whole job."""
        return self.head in ("", self.node)

    def write(self, path: Path) -> None:
        """Replace the node's record."""
        write_record(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def read_record(path: Path) -> NodeRecord | None:
    """Return a node's record; None if it is missing or invalid."""
    try:
        return _checked(msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=NodeRecord))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _checked(record: NodeRecord) -> NodeRecord:
    """Return a record with safe text and a safe board path; raise ValueError for wrong counts."""
    counts = (
        record.owner.pid, record.run_number, record.incarnation, record.failures,
        record.preemptions, record.failures_left,
    )  # fmt: skip
    if min(counts) < 0 or max(counts) > _MAX_COUNT:
        raise ValueError("a count is out of range")
    record.present = tuple(map(printable, record.present))
    for name in ("job", "run_id", "node", "message", "head", "mirror", "bucket", "took_over_from"):
        setattr(record, name, printable(getattr(record, name)))
    record.owner = replace(record.owner, host=printable(record.owner.host))
    if (notice := record.notice) is not None:
        source, reason = printable(notice.source), printable(notice.reason)
        record.notice = replace(notice, source=source, reason=reason)
    if (found := record.last_recovery) is not None:
        stages = {printable(name): seconds for name, seconds in found.stages.items()}
        record.last_recovery = replace(found, stages=stages, tier=printable(found.tier))
    if (failure := record.last_failure) is not None:
        kind, message = printable(failure.kind), printable(failure.message)
        tail = tuple(map(printable, failure.tail))
        record.last_failure = replace(failure, kind=kind, message=message, tail=tail)
    if (trouble := record.own_trouble) is not None:
        record.own_trouble = replace(trouble, text=printable(trouble.text))
    if (interval := record.save_interval) is not None:
        record.save_interval = OptimalInterval(interval.seconds, printable(interval.why))
    board = _BOARD.fullmatch(record.board)
    if board is None or int(board[1]) != record.owner.pid:
        record.board = ""  # never open another path
    return record


def job_records(job: JobDirectory) -> list[NodeRecord]:
    """Return all nodes' records of a job, the latest run's head first. The run number counts, as
    the clocks of two nodes may differ."""
    paths = islice(job.found(job.nodes, "*.json"), _MAX_RECORDS)
    found = [read_record(path) for path in paths]
    return sorted(
        (record for record in found if record is not None),
        key=lambda record: (record.run_number, record.since),
        reverse=True,
    )


def _state(pid: int) -> tuple[str, float]:
    """Return a process's state letter, and the seconds from the boot to its start."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19]) / os.sysconf("SC_CLK_TCK")


def boot_id() -> str:
    """Return an identifier of this host's boot and this PID namespace, where pids are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def node_name(given: str | None = None) -> str:
    """Return ``given``, else SLURMD_NODENAME, else the host's name; safe as a file name."""
    name = given or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    safe = "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
    return safe if safe.strip(".") else "node"
