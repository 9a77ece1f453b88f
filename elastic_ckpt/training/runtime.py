"""What this process is part of: a supervisor's job, a plain torchrun, or nothing but itself."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.job_lock import HeldLock
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.prune import Retainer
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import ScriptStarted
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, SlotWriter
from elastic_ckpt.training.peers import Peers
from elastic_ckpt.training.step import StepProtocol
from elastic_ckpt.training.worker_memory import WorkerMemory
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)


@dataclass
class Supervised:
    """Handed to a worker by its supervisor, before the script runs."""

    job: JobDirectory
    name: str
    node: str
    board: Board
    slot: SlotWriter
    save_interval_steps: int = 0
    global_batch: int = 0
    retention: Retention = field(default_factory=Retention)
    memory: MemoryTier | None = None

    @property
    def attached(self) -> bool:
        """Whether the script takes part in the step protocol."""
        return _current is not None

    def finish(self, outcome: Outcome, code: int = 0, reason: str = "") -> None:
        """Leave the last word on the board."""
        self.slot.leave(outcome, code, reason)


@dataclass
class Runtime:
    """How this process takes part in a job; one per process.

    Attributes:
        job: the job directory.
        steps: the step protocol.
        peers: the other ranks.
        supervised: None when there is no supervisor.
        retain: what deletes old checkpoints.
        memory: this node's memory tier; None to save to the disk.
        last_bytes: size of the newest checkpoint; None if nobody has looked.
    """

    job: JobDirectory
    name: str
    journal: Journal
    board: Board
    slot: SlotWriter
    steps: StepProtocol
    peers: Peers
    supervised: Supervised | None
    incarnation: int
    lock: HeldLock | None = field(default=None)
    memory: WorkerMemory | None = None
    last_bytes: int | None = None
    retain: Retainer = field(init=False)

    def __post_init__(self) -> None:
        """Keep what the supervisor was told to keep."""
        self.retain = Retainer(self.job, self.journal, self.say)
        if self.supervised is not None:
            self.retain.rule = self.supervised.retention

    def say(self, line: str) -> None:
        """One line for whoever looks at the job's output; an output that fails is no error."""
        with contextlib.suppress(OSError):
            print(f"elastic-ckpt: {printable(line)}", file=sys.stderr, flush=True)

    def leave(self, *, saved: bool) -> None:
        """End this process at the agreed stop step. Collective where something was saved.

        Torch elastic takes the first non-zero exit for a failure, so under a supervisor the
        outcome stands on the board and the exit code is 0. The process group is left to end with
        the process: destroying it while a DDP model is alive can deadlock (torch 2.13, gloo).

        Raises:
            SystemExit: always.
        """
        if saved:
            self.peers.barrier("leave")
        self.slot.leave(Outcome.STOPPED if saved else Outcome.STOPPED_UNSAVED)
        if self.supervised:
            raise SystemExit(0)
        code = ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED
        raise SystemExit(int(code))


_supervised: Supervised | None = None
_current: Runtime | None = None


def install(context: Supervised) -> None:
    """Called by the worker's bootstrap, before the script."""
    global _supervised
    _supervised = context


def supervised() -> Supervised:
    """The supervisor's word to this worker."""
    if _supervised is None:
        raise UsageError("this process was not launched by elastic-ckpt run")
    return _supervised


def join(save_dir: str | os.PathLike[str] | None) -> Runtime:
    """Take part in the job of ``save_dir``; later calls return the same runtime. Collective.

    Raises:
        UsageError: the directory is not the supervisor's, or another one than before.
        DirectoryUnusable, LockHeld: on every rank, as the leader found.
    """
    global _current
    directory = _resolve(save_dir)
    if _current is not None:
        if _current.job.root != directory:
            raise UsageError(
                f"this process already saves to {_current.job.root}, not {directory}: give the "
                "same directory everywhere"
            )
        return _current
    _current = _join_supervised(_supervised) if _supervised else _join_alone(directory)
    _current.slot.joined()
    peers = _current.peers
    log.info("joined %s as rank %d of %d", _current.name, peers.rank, peers.world_size)
    return _current


def joined() -> Runtime:
    """The runtime that was joined before, else that of ``ELASTIC_CKPT_DIR``."""
    return _current if _current is not None else join(None)


def _resolve(save_dir: str | os.PathLike[str] | None) -> Path:
    given = os.environ.get("ELASTIC_CKPT_DIR") if save_dir is None else os.fspath(save_dir)
    if given is None:
        raise UsageError("no directory to save to: give save_dir or set ELASTIC_CKPT_DIR")
    directory = Path(given).resolve()
    if _supervised is not None and directory != _supervised.job.root:
        raise UsageError(
            f"the script saves to {directory} but the supervisor watches {_supervised.job.root}: "
            f"start it with --dir {directory}, or give Session no save_dir"
        )
    return directory


def _join_supervised(context: Supervised) -> Runtime:
    peers = Peers.connect()
    return Runtime(
        job=context.job,
        name=context.name,
        journal=Journal(
            context.job,
            context.node,
            rank=peers.rank,
            incarnation=context.board.incarnation,
        ),
        board=context.board,
        slot=context.slot,
        steps=StepProtocol(context.board, context.slot),
        peers=peers,
        supervised=context,
        incarnation=context.board.incarnation,
        # What another incarnation has sealed, it has announced.
        memory=WorkerMemory(context.memory, announced=bool(context.memory.sealed()))
        if context.memory
        else None,
    )


def _join_alone(directory: Path) -> Runtime:
    """Without a supervisor the leader holds the job's lock and each rank watches for itself."""
    from elastic_ckpt.training.solo import SoloWatcher

    peers = Peers.connect()
    job = JobDirectory(directory)

    def take() -> HeldLock:
        job.prepare()
        held = HeldLock(job.lock, run_id=f"script-{os.getpid()}")
        recover(job)
        return held

    lock = peers.leader_does("join", take)
    board = Board.private()
    slot = board.rank_slot(0)
    slot.launched(peers.rank, os.getpid())
    SoloWatcher(board, peers).start()
    journal = Journal(job, node_name(), rank=peers.rank, incarnation=1, rotates=peers.is_leader)
    if peers.is_leader:
        journal.write(ScriptStarted(world_size=peers.world_size))
    return Runtime(
        job=job,
        name=directory.name,
        journal=journal,
        board=board,
        slot=slot,
        steps=StepProtocol(board, slot),
        peers=peers,
        supervised=None,
        incarnation=1,
        lock=lock,
    )
