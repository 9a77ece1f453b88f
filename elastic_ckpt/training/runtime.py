"""The job that this process belongs to: a supervisor's, a plain torchrun's, or its own."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from elastic_ckpt.checkpoint.catalog import next_session_order
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.ownership.job_lock import OwnedJob, Patience
from elastic_ckpt.checkpoint.prune import Retainer
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import ScriptStarted
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, SlotWriter
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.training.opened_sessions import OpenedSessions
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.step import StepProtocol
from elastic_ckpt.util.outlet import print_error
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from elastic_ckpt.checkpoint.bucket.tier import BucketTier
    from elastic_ckpt.training.state.candidate import LoadCandidate
    from elastic_ckpt.training.state.shared_bucket import RankBucket

log = logging.getLogger(__name__)


@dataclass
class Supervised:
    """What a supervisor passes to a worker before the script runs."""

    spec: WorkerSpec
    job: JobDirectory
    board: Board
    slot: SlotWriter
    memory: MemoryTier | None
    bucket: RankBucket | None = None

    @property
    def attached(self) -> bool:
        """Whether the script takes part in the step protocol."""
        return _current is not None

    @property
    def leaves_unfinished(self) -> bool:
        """Whether an end with code 0 means only that the script has left, because of a stop."""
        told = _current is not None and _current.told_to_stop
        return self.board.stop_wanted and (told or not self.attached)


@dataclass
class Runtime:
    """This process's part in a job: one for the process, and one for each of its Sessions.

    Attributes:
        job: the job directory, or that of the session.
        supervised: None when there is no supervisor.
        memory: this node's memory tier; None to save to disk.
        bucket: what several nodes without a common directory save to; None to save to disk.
        last_bytes: size of the newest checkpoint; None if it is not known yet.
        memory_problem: why the last save could not use the memory tier, as the user was told.
        session_order: of what this session saves; only the leader knows it.
        sessions: those of this process.
        automatic: neither the user nor the script chose when to save.
        state: returns ``session.state``, encoded; empty for nothing to save.
        looked: by session, what ``resume_place`` has found for a Session that is not yet entered.
        candidate: the checkpoint to load, verified, if ``has_looked``; None for a fresh start.
        told_to_stop: whether the script was told that it is to save by itself and leave.
        has_left: whether this rank is leaving at a stop.
        fence: this run's claim to the job.
        parent: attempt of the checkpoint that this process continues from, or has saved last.
        rewound_to: (epoch, step) of one that the script chose; newer ones are not its ancestors.
    """

    job: JobDirectory
    name: str
    journal: Journal
    board: Board
    slot: SlotWriter
    peers: Peers
    supervised: Supervised | None
    incarnation: int
    fence: Fence
    lock: OwnedJob | None = None
    parent: str = ""
    rewound_to: tuple[int, int] | None = None
    memory: MemoryTier | None = None
    bucket: RankBucket | None = None
    last_bytes: int | None = None
    memory_problem: str = ""
    session_order: int = 0
    sessions: OpenedSessions = field(default_factory=OpenedSessions)
    state: Callable[[], bytes] = bytes
    automatic: bool = False
    looked: dict[str, Runtime] = field(default_factory=dict)
    candidate: LoadCandidate | None = None
    has_looked: bool = False
    told_to_stop: bool = False
    has_left: bool = False
    steps: StepProtocol = field(init=False)
    retain: Retainer = field(init=False)

    def __post_init__(self) -> None:
        """Apply the supervisor's retention rule."""
        self.steps = StepProtocol(self.board, self.slot)
        self.retain = Retainer(self.job, self.journal, self.say)
        if self.supervised is not None:
            self.retain.rule = self.supervised.spec.retention

    def of_session(self, name: str) -> Runtime:
        """Return this process's part in a session of the job, which is made if it is new.

        Collective.

        Raises:
            UsageError: it may not be entered now, or the ranks name it differently.
            DirectoryUnusable: its directory cannot be made.
        """
        self.sessions.check(name)
        if name in self.looked:
            return self.looked.pop(name)
        job, peers = self.job.session(name), self.peers
        memory = self.memory.of_session(name) if self.memory is not None else None
        names = peers.collect("session", name.encode)

        def make() -> int:
            if len(set(names)) > 1:
                shown = ", ".join(repr(one.decode()) for one in sorted(set(names)))
                raise UsageError(f"the ranks name their Session differently: {shown}")
            if name:
                self.fence.check_place()
                job.prepare()
            if self.bucket is not None:
                return self.bucket.session_order(name)
            return next_session_order(job, memory)

        order = peers.leader_does("session", make) or 0
        made = replace(
            self, job=job, memory=memory, last_bytes=None, session_order=order, parent="",
            rewound_to=None,
        )  # fmt: skip
        made.steps = self.steps
        return made

    @property
    def durable(self) -> DiskTier | BucketTier:
        """The tier that outlives this machine: what a save comes to in the end."""
        if self.bucket is not None:
            return self.bucket.tier(self.job)
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(self.peers.world_size)
        return DiskTier(self.job, self.retain.make_room, self.fence, one_host=one_host)

    @property
    def run(self) -> int:
        """The number of this run, by the directory or by the bucket."""
        return self.fence.number if self.bucket is None else self.bucket.claim

    @property
    def home(self) -> str:
        """Where people look at the job: its directory, or its URL."""
        return self.bucket.url if self.bucket is not None else str(self.job.home)

    def say(self, line: str) -> None:
        """Print a line to the job's output, without waiting for a reader; errors are ignored."""
        with contextlib.suppress(OSError):
            print_error(f"elastic-ckpt: {printable(line)}")

    def leader_says(self, line: str) -> None:
        """Print a line on the leader alone."""
        if self.peers.is_leader:
            self.say(line)

    def leave(self, *, saved: bool, together: bool = True) -> None:
        """End this process at the agreed stop step. Collective if something was saved.

        Torch elastic treats a non-zero exit as a failure, so under a supervisor the outcome is on
        the board and the exit code is 0. The process group ends with the process: destroying it
        while a DDP model is alive can deadlock (torch 2.13, gloo).

        Args:
            together: wait for the other ranks if something was saved; they all leave here.

        Raises:
            SystemExit: always.
        """
        self.has_left = True
        saved = saved or self.sessions.saved
        if saved and together:
            self.peers.barrier("leave")
        self.slot.leave(Outcome.STOPPED if saved else Outcome.STOPPED_UNSAVED)
        if self.supervised:
            raise SystemExit(0)
        code = ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED
        raise SystemExit(int(code))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"elastic-ckpt: {printable(line)}", file=sys.stderr, flush=True)


RANK_PID: Final = "ELASTIC_CKPT_RANK_PID"
"""The variable with a worker's pid, which its children inherit."""

_supervised: Supervised | None = None
_current: Runtime | None = None


def install(context: Supervised) -> None:
    """Set what the supervisor passed; called before the script runs."""
    global _supervised
    _supervised = context


def supervised() -> Supervised:
    """Return what the supervisor passed to this worker."""
    if _supervised is None:
        raise UsageError("this process was not started by elastic-ckpt run")
    return _supervised


def join(save_dir: str | os.PathLike[str] | None) -> Runtime:
    """Join the job of ``save_dir``; later calls return the same runtime. Collective.

    Raises:
        UsageError: the directory differs from the supervisor's or an earlier call's, or this
            process is not a rank, but a child that the script made.
        DirectoryUnusable, LockHeld: on every rank, from the leader.
    """
    global _current
    directory = _resolve(save_dir)
    _refuse_children(directory)
    if _current is not None:
        if _current.job.root != directory:
            raise UsageError(
                f"this process already saves to {_current.job.root}, not {directory}: pass the "
                "same directory in every call"
            )
        return _current
    _current = _join_supervised(_supervised) if _supervised else _join_alone(directory)
    _current.slot.joined()
    peers = _current.peers
    log.info("joined %s as rank %d of %d", _current.name, peers.rank, peers.world_size)
    return _current


def joined() -> Runtime:
    """Return the runtime that was joined before, or join that of ``ELASTIC_CKPT_DIR``."""
    return _current if _current is not None else join(None)


def _refuse_children(directory: Path) -> None:
    """Raise UsageError in a process that a supervised script started itself for this directory."""
    rank = os.environ.get(RANK_PID, "")
    if not rank or int(rank) == os.getpid() or not Path(f"/proc/{rank}").exists():
        return
    if _supervised is None and Path(os.environ.get("ELASTIC_CKPT_DIR", "/")).resolve() != directory:
        return  # a job of its own
    raise UsageError(
        "this process was started by the script itself, as mp.spawn, fork or torchrun do: let "
        "elastic-ckpt start all ranks with --nproc, and call the training function directly"
    )


def _resolve(save_dir: str | os.PathLike[str] | None) -> Path:
    given = os.environ.get("ELASTIC_CKPT_DIR") if save_dir is None else os.fspath(save_dir)
    if given is None:
        raise UsageError("no directory to save to: pass save_dir or set ELASTIC_CKPT_DIR")
    directory = Path(given).resolve()
    if _supervised is not None and directory != _supervised.job.root:
        raise UsageError(
            f"the script saves to {directory} but the supervisor watches {_supervised.job.root}: "
            f"run elastic-ckpt run --dir {directory}, or omit save_dir in the script"
        )
    return directory


def _join_supervised(context: Supervised) -> Runtime:
    peers, incarnation = Peers.connect(), context.board.incarnation
    return Runtime(
        job=context.job,
        name=context.spec.job,
        journal=Journal(context.job, context.spec.node, rank=peers.rank, incarnation=incarnation),
        board=context.board,
        slot=context.slot,
        peers=peers,
        supervised=context,
        incarnation=incarnation,
        fence=Fence(
            context.job,
            context.spec.run_number,
            context.spec.nonce,
            rewound=context.spec.rewound,
            mount=context.spec.mount,
            identity=context.spec.identity.partition(".")[0],
        ),
        memory=context.memory,
        bucket=context.bucket,
    )


def _join_alone(directory: Path) -> Runtime:
    """Without a supervisor the leader holds the job's lock, and each rank watches for signals."""
    from elastic_ckpt.training.solo import SoloWatcher

    peers = Peers.connect()
    job = JobDirectory(directory)

    def take() -> OwnedJob:
        job.refuse_inner()
        job.prepare()
        owned = OwnedJob(job, node_name(), f"script-{os.getpid()}", "", Patience(_say))
        recover(job, fence=owned.ownership)
        owned.ownership.beat_in_background()
        atexit.register(owned.ownership.end)
        return owned

    lock = peers.leader_does("join", take)
    fence = lock.ownership if lock is not None else Fence(job)
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
        peers=peers,
        supervised=None,
        incarnation=1,
        fence=fence,
        lock=lock,
    )
