"""Builds a supervisor on the real world: this host, this directory, these notice sources."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from elastic_ckpt import __version__
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.lineage import continue_from
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.ownership.job_lock import Patience, RunLocks
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices.platforms import make_sources
from elastic_ckpt.notices.signals import SignalSource
from elastic_ckpt.policy.hang import Effort
from elastic_ckpt.policy.lease import BEAT_SECONDS, HEAD_BEAT_SECONDS
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.succession import NO_PLACE
from elastic_ckpt.protocol.worker_spec import SharedBucket, WorkerSpec
from elastic_ckpt.supervisor.agent_client import AgentProcess
from elastic_ckpt.supervisor.cluster.head import HeadRole
from elastic_ckpt.supervisor.cluster.left_out import BucketNotes, DirectoryNotes, LeftOutNodes
from elastic_ckpt.supervisor.cluster.member import MemberRole
from elastic_ckpt.supervisor.cluster.role import AloneRole, Role
from elastic_ckpt.supervisor.handed import Handed
from elastic_ckpt.supervisor.heartbeat_thread import HeartbeatThread
from elastic_ckpt.supervisor.job_files import JobFiles
from elastic_ckpt.supervisor.listener import Listener
from elastic_ckpt.supervisor.metrics.exporter import Metrics
from elastic_ckpt.supervisor.ports import Clock, OwnPort, Ports
from elastic_ckpt.supervisor.run_record import RunRecord, first_record
from elastic_ckpt.supervisor.saves.checkpoints import BucketCheckpoints
from elastic_ckpt.supervisor.saves.drain_target import BucketTarget, DirectoryTarget, DrainTarget
from elastic_ckpt.supervisor.saves.history_copy import HistoryCopy
from elastic_ckpt.supervisor.saves.memory_keeper import MemoryKeeper
from elastic_ckpt.supervisor.saves.mirror_port import MirrorPort, NoMirror
from elastic_ckpt.supervisor.saves.own_watch import NoOwnSaves, OwnWatch
from elastic_ckpt.supervisor.saves.shared_history import SharedHistory
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.supervisor.supervisor import Supervisor
from elastic_ckpt.supervisor.systemd import Service
from elastic_ckpt.supervisor.watch.effort import measure_effort
from elastic_ckpt.supervisor.watch.node_check import NodeCheck, NodeLook
from elastic_ckpt.supervisor.watch.stacks import Stack, dump_stacks
from elastic_ckpt.supervisor.web.live_page import LivePage
from elastic_ckpt.util.processes import (
    activity,
    become_subreaper,
    process_state,
    reap_strangers,
    signal_descendant,
)

log = logging.getLogger(__name__)
Outlets = tuple[Metrics, LivePage]


class Wakeup:
    """A pipe that ends the loop's wait, from threads and from signal handlers."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        for fd in (self.read_fd, self._write_fd):
            os.set_blocking(fd, False)

    def wake(self) -> None:
        """End the wait."""
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: the run is over
            os.write(self._write_fd, b"x")

    def on_signals(self) -> int:
        """Have each signal wake the loop; returns the earlier descriptor."""
        return signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def drain(self) -> None:
        """Forget what has woken the loop."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.read_fd, 4096)


class Host:
    """The real ``HostPort``."""

    def __init__(
        self, heartbeat: HeartbeatThread, outlets: Outlets, process_log: ProcessLog, wakeup: Wakeup
    ) -> None:
        self._heartbeat = heartbeat
        self._outlets = outlets
        self._process_log = process_log
        self._wakeup = wakeup
        self._signals_before = -1

    def start(self) -> None:
        become_subreaper()
        self._heartbeat.start()
        for outlet in self._outlets:
            outlet.start()
        self._signals_before = self._wakeup.on_signals()

    def wait(self, fds: Iterable[int | None], seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for fd in (self._wakeup.read_fd, *fds):
                if fd is not None:
                    selector.register(fd, selectors.EVENT_READ)
            selector.select(seconds)
        self._wakeup.drain()

    def turn(self, agent_pid: int) -> None:
        reap_strangers(agent_pid)
        self._heartbeat.turn()

    def activity(self, pids: Iterable[int]) -> object:
        return activity(pids)

    def process_states(self, pids: Iterable[int]) -> Mapping[int, str]:
        return {pid: process_state(pid) for pid in pids}

    def send(self, pid: int, number: int) -> None:
        signal_descendant(pid, number)

    def effort(self, pids: Iterable[int]) -> Effort:
        return measure_effort(pids)

    def aside(self, work: Callable[[], None]) -> None:
        def run() -> None:
            work()
            self._wakeup.wake()

        threading.Thread(target=run, name="aside", daemon=True).start()

    def stacks(self, pids: Mapping[int, int]) -> Mapping[int, Stack]:
        return dump_stacks(pids)

    def stop(self) -> None:
        signal.set_wakeup_fd(self._signals_before)
        self._heartbeat.stop()
        for outlet in self._outlets:
            outlet.stop()
        self._process_log.end()


def make_supervisor(
    settings: RunSettings,
    say: Callable[[str], None],
    reread: Callable[[], RunSettings],
    rendezvous: Rendezvous | None = None,
    leaves: Callable[[], bool] = lambda: False,
    claim: BucketClaim | None = None,
    handed: Handed | None = None,
) -> Supervisor:
    """Take the locks and make the supervisor of one ``elastic-ckpt run`` on this node.

    Args:
        say: shows one line to the user.
        reread: reads the settings again; raises UsageError if they are no longer right.
        rendezvous: where the nodes meet, for one of several.
        leaves: whether a signal has come that ends this process; asked during a wait for a lease.
        claim: to the bucket that is the job's place; None if a directory is.
        handed: what an earlier supervisor of this process leaves to this one.

    Raises:
        DirectoryUnusable: the directory cannot be used.
        LockHeld: another supervisor has it.
        StopAborted: ``leaves`` returned True.
        UsageError: an address is taken, or ``start_from`` is unknown.
        CheckpointError: ``start_from`` is not intact.
    """
    job = JobDirectory(settings.directory)
    job.prepare(group_access=settings.group_access)
    own_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
    run_id = claim.owner.run_id if claim else own_id
    leads = rendezvous is None or rendezvous.leads
    taken = handed.taken if handed else None
    locks = RunLocks(
        job, settings.node, run_id, leads=leads, endpoint=settings.endpoint,
        patience=Patience(say, leaves), after=taken.number if taken and not claim else 0,
    )  # fmt: skip
    fence = locks.ownership  # None on a node that follows: the leader of the ranks seals
    try:
        if settings.start_from and fence is not None:
            say(continue_from(job, settings.start_from, fence))
    except BaseException:
        locks.release()
        raise
    journal = Journal(job, settings.node, follows=not leads, rotates=True)
    board = handed.board if handed else Board.create(settings.nproc)
    wakeup = Wakeup()
    first = first_record(settings, job, run_id, board.path, fence.number if fence else 0)
    process_log = ProcessLog.of_node(
        job, "supervisor", settings.node, lambda: {"incarnation": first.incarnation}
    ).begin()
    log.info("starting: %s, run %s, %d workers", settings.script, run_id, settings.nproc)
    own: OwnPort = NoOwnSaves()
    if fence is not None:
        own = OwnWatch(
            job, settings.own, fence.number, settings.retention, journal, say, wakeup.wake
        )
    shared = settings.shared_url
    checkpoints = _in_bucket(job, shared, claim, journal) if shared else None
    files = JobFiles(
        job, settings.node, locks, journal, say, wakeup.wake, own, checkpoints,
        BEAT_SECONDS if rendezvous is None else HEAD_BEAT_SECONDS,
    )  # fmt: skip
    record = RunRecord(first, journal, files.write_record, say)
    outlets = Metrics(settings, job, board, record), LivePage(settings, leads, handed is None, say)
    target: DrainTarget = DirectoryTarget(job, fence, journal, record.say)
    if checkpoints is not None:
        target = BucketTarget(job, checkpoints.store, claim.twin() if claim else None)
    memory = MemoryKeeper.open(
        settings,
        job,
        target,
        journal,
        record.say,
        wakeup.wake,
        partial(_finished_steps, board),
        lambda: board.deadline is not None,
        handed.server if handed else None,
    )
    first.memory = memory.root
    files.start()
    service = handed.service if handed else Service()
    mirror = (
        SharedHistory(
            HistoryCopy(job, checkpoints.store, 0.0), shared, lambda: checkpoints.owner,
            lambda: service.alive(Clock().monotonic()),
        )
        if checkpoints is not None
        else _mirror(settings, fence, run_id, journal, board, record, wakeup, service, claim)
    )  # fmt: skip
    signals = SignalSource(settings.grace, is_guess="slurm" in settings.notice_sources)
    sources = make_sources(settings.notice_sources, settings.notice_file, settings.grace)

    kept = [handed.agent] if handed and handed.agent else []  # until it is used

    def start_agent(now: RunSettings) -> AgentProcess:
        spec = WorkerSpec(
            script=str(now.script),
            module=now.module,
            args=list(now.args),
            directory=str(now.directory),
            job=now.name,
            node=now.node,
            board=board.path,
            nproc=now.nproc,
            preload=list(now.preload),
            save_interval_steps=now.interval.worker_interval,
            global_batch=now.global_batch,
            retention=now.retention,
            memory=memory.root,
            memory_server=memory.server,
            replicas=now.replicas,
            domain=now.domain,
            run_id=run_id,
            identity=files.identity(),
            run_number=fence.number if fence else 0,
            nonce=fence.nonce if fence else "",
            rewound=fence.rewound if fence else 0,
            mount=fence.mount if fence else 0,
            rendezvous=rendezvous,
            is_checked=True,
            terms=now.terms,
            on_notice=now.own.on_notice,
            bucket=_shared(shared, claim),
            saves_itself=bool(now.own),
            digests=now.digests,
            version=__version__,
        )
        if not kept:
            return AgentProcess(spec, now.python, now.env)
        agent = kept.pop()
        agent.move(spec)
        return agent

    ports = Ports(
        clock=Clock(),
        board=board,
        directory=files,
        journal=journal,
        memory=memory,
        own=own,
        mirror=mirror,
        listener=Listener(signals, sources, journal, wakeup.wake),
        host=Host(HeartbeatThread(job, settings.node, board), outlets, process_log, wakeup),
        service=service,
        start_agent=start_agent,
    )
    check = NodeCheck(NodeLook(settings, memory.root))
    notes = BucketNotes(job, checkpoints.store) if checkpoints else DirectoryNotes(job)
    role = _role(settings, rendezvous, handed, check, partial(LeftOutNodes, notes, files.later))
    return Supervisor(settings, ports, record, role, reread)


def _in_bucket(
    job: JobDirectory, url: str, claim: BucketClaim | None, journal: Journal
) -> BucketCheckpoints:
    from elastic_ckpt.checkpoint.bucket.object_store import open_store
    from elastic_ckpt.checkpoint.bucket.url import BucketUrl

    return BucketCheckpoints(job, open_store(BucketUrl.parse(url)), claim, journal)


def _shared(url: str, claim: BucketClaim | None) -> SharedBucket | None:
    if not url:
        return None
    return SharedBucket(url, claim.number, claim.owner.nonce) if claim else SharedBucket(url)


def _mirror(
    settings: RunSettings,
    fence: Fence | None,
    run_id: str,
    journal: Journal,
    board: Board,
    record: RunRecord,
    wakeup: Wakeup,
    service: Service,
    claim: BucketClaim | None,
) -> MirrorPort:
    """Return the copies in a bucket; only the node that owns the job makes any."""
    if settings.mirror is None or fence is None:
        return NoMirror()
    from elastic_ckpt.checkpoint.bucket.object_store import open_store
    from elastic_ckpt.checkpoint.bucket.url import BucketUrl
    from elastic_ckpt.supervisor.saves.mirror import Mirror

    return Mirror(
        settings,
        open_store(BucketUrl.parse(settings.mirror.url)),
        run_id,
        journal,
        partial(_finished_steps, board),
        record.say,
        wakeup.wake,
        lambda: service.alive(Clock().monotonic()),
        claim,
    )


def _role(
    settings: RunSettings,
    rendezvous: Rendezvous | None,
    handed: Handed | None,
    check: NodeCheck,
    left_out: Callable[[], LeftOutNodes],
) -> Role:
    """Return the role; ``check`` is used on several nodes unless this one has been checked."""
    place = handed.place if handed else NO_PLACE
    check = (handed.check if handed else None) or check
    if rendezvous is None:
        return AloneRole()
    if not rendezvous.leads:
        return MemberRole(settings.endpoint, place, check)
    if handed is None or handed.taken is None:
        return HeadRole(settings.nodes, check=check, left_out=left_out())
    return HeadRole(settings.nodes, place.others + 1, handed.taken, check, left_out())


def _finished_steps(board: Board) -> int:
    """Return how many steps all ranks of this node have finished."""
    return min((slot.finished for slot in board.read_slots()), default=0)
