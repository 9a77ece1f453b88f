"""One run: the real supervisor in its loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_ckpt.checkpoint.ownership.fence import Fence, RunOwner
from elastic_ckpt.errors import ExitCode, RunSuperseded
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.notices import NoticeSource, Report
from elastic_ckpt.policy.deadline import Notice, StopNow
from elastic_ckpt.policy.hang import Effort
from elastic_ckpt.policy.interval import SaveInterval
from elastic_ckpt.policy.lease import LEASE_SECONDS
from elastic_ckpt.protocol.run_state import TERMINAL, RunState
from elastic_ckpt.protocol.succession import NO_PLACE, Leader, RosterPlace
from elastic_ckpt.supervisor.cluster.head import HeadRole
from elastic_ckpt.supervisor.cluster.member import MemberRole
from elastic_ckpt.supervisor.cluster.role import AloneRole, Role
from elastic_ckpt.supervisor.listener import Listener
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key, Ports
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.supervisor.saves.mirror_port import MirrorPort, NoMirror
from elastic_ckpt.supervisor.saves.own_watch import NoOwnSaves
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.supervisor.supervisor import Supervisor
from elastic_ckpt.supervisor.watch.stacks import Stack
from tests.simulation.agents import AgentHandle, SimAgent
from tests.simulation.bucket_copies import SimMirror
from tests.simulation.disk import Disk
from tests.simulation.ranks import SimBoard
from tests.simulation.storage import Directory, Tier

if TYPE_CHECKING:
    from tests.simulation.hosts import Host
    from tests.simulation.world import World

TICK = 2.4
"""Between two turns of a loop that nothing wakes; the real one turns more often for nothing."""


class SimFence(Fence):
    """The real fence, on a directory that is a number."""

    def __init__(self, disk: Disk, number: int) -> None:
        super().__init__(JobDirectory(Path("/job")), number, str(number))
        self._disk = disk

    def _newest(self) -> tuple[int, RunOwner | None]:
        return self._disk.number, None


class Signals(NoticeSource):
    """Signals to a supervisor, as ``SignalSource`` has them."""

    name = "signal"

    def __init__(self) -> None:
        self._arrived: deque[Any] = deque()
        self._report: Report = lambda event: None

    def start(self, report: Report) -> None:
        self._report = report

    @property
    def pending(self) -> bool:
        return bool(self._arrived)

    def hold(self) -> None:
        return

    def arrive(self, event: Any) -> None:
        self._arrived.append(event)

    def deliver(self) -> None:
        while self._arrived:
            self._report(self._arrived.popleft())


class Platform(NoticeSource):
    """A cloud's notices, which arrive in a thread."""

    name = "cloud"

    def __init__(self) -> None:
        self.report: Report = lambda event: None

    def start(self, report: Report) -> None:
        self.report = report


class Events:
    """A journal that keeps only what the invariants need."""

    def __init__(self, run: Run) -> None:
        self.incarnation = 0
        self._run = run

    def write(self, *event: Any, **data: Any) -> None:
        return

    note = write


class Service:
    is_there = False

    def _nothing(self, *arguments: Any) -> None:
        return

    serve = alive = stopping = reloading = reloaded = _nothing


@dataclass(frozen=True)
class Part:
    """A run's part in a job of several hosts.

    Attributes:
        endpoint: where its nodes meet.
        place: this one's in the order of succession.
        taken: the run that it takes the place of; None for none.
    """

    leads: bool
    endpoint: str = "head:1"
    place: RosterPlace = NO_PLACE
    taken: Leader | None = None


class Run:
    """One supervisor of ``elastic-ckpt run`` on a host, whose turns are events."""

    def __init__(
        self, world: World, host: Host, number: int, start_from: Key | None = None,
        part: Part | None = None,
    ) -> None:  # fmt: skip
        """``start_from`` is the checkpoint of ``--from``; the ``part`` is the host's if None."""
        self.world = world
        self.kernel = world.kernel
        self.host = host
        self.name = f"run {number} on {host.name}"
        self.part = part or Part(host.leads)
        self.leads = self.part.leads
        self.is_gone = False
        self.began = self.kernel.now
        self.code: ExitCode | None = None
        self.failures_injected = 0
        self.board = SimBoard()
        self.agent: SimAgent | None = None
        self.signals, self.cloud = Signals(), Platform()
        self.deadline = float("inf")
        self.decided_at = 0.0
        self.newest_at_notice: tuple[Key, float] = (NO_CHECKPOINT, float("inf"))
        self._due: float | None = None
        self._number = 0
        self.number = self.beats = self.rewound = 0
        self.start_from: Key | None = None
        self.lost = ""
        self.has_ended = self.passed_on = False
        self.beat_at = self.began
        if self.leads:
            self.number = world.disk.number = world.disk.number + 1
            world.disk.owner = self
        self.fence = SimFence(world.disk, self.number)
        if self.leads:
            self._beat()
        memory = host.memory if world.size == 1 and world.has_memory else None
        self.tier = Tier(self, memory, world.disk)
        events = Events(self)
        self.directory = Directory(self, world.disk)
        if self.leads:
            self.directory.sweep()
            if start_from is not None and start_from in world.disk.sealed:
                self.start_from = start_from
                world.disk.go_back(start_from, self)
            self.rewound = world.disk.rewound
        first = NodeRecord(
            job="job", run_id=self.name, node=host.name, owner=world.identity, since=0.0,
            state=RunState.STARTING, incarnation=world.disk.incarnations,
            head=host.name if self.leads else "?",
        )  # fmt: skip
        self.record = RunRecord(first, events, lambda record: None, self._show)
        settings = RunSettings(
            directory=Path("d"), script=Path("x"), args=(), name="job", node=host.name,
            grace=world.grace, max_failures=8, hang_seconds=12.0,
            interval=SaveInterval(seconds=world.interval_seconds),
            nodes=world.nodes, endpoint=self.part.endpoint if world.size > 1 else "",
            gather_seconds=60.0,
        )  # fmt: skip
        ports = Ports(
            clock=host.clock, board=self.board, directory=self.directory,
            journal=events, memory=self.tier, own=NoOwnSaves(), mirror=self._mirror(),
            listener=Listener(self.signals, [self.cloud], events, lambda: self.wake(0.0)),
            host=self, service=Service(), start_agent=self._start_agent,
        )  # fmt: skip
        self.supervisor = Supervisor(settings, ports, self.record, self._role(), lambda: settings)
        self.supervisor.begin()
        self._settle_turn()

    def _role(self) -> Role:
        part = self.part
        if self.world.size == 1:
            return AloneRole()
        if not part.leads:
            return MemberRole(part.endpoint, part.place)
        return HeadRole(self.world.nodes, part.place.others + 1 if part.taken else 0, part.taken)

    def _mirror(self) -> MirrorPort:
        bucket = self.world.bucket
        if bucket.is_there and self.world.size == 1:
            return SimMirror(self, bucket)
        return NoMirror()

    def _show(self, line: str) -> None:
        self.kernel.say(f"{self.name}: {line}")

    def _start_agent(self, settings: RunSettings) -> AgentHandle:
        self.agent = SimAgent(self, settings)
        return self.agent.handle

    # -- the loop -------------------------------------------------------------------------------

    def wake(self, seconds: float) -> None:
        """Have the loop turn by then."""
        at = self.kernel.now + seconds
        if self.is_gone or (self._due is not None and self._due <= at):
            return
        self._due = at
        self._number += 1
        number = self._number
        self.kernel.after(seconds, lambda: self._turn(number))

    def _turn(self, number: int) -> None:
        if self.is_gone or number != self._number:
            return
        if self.host.when_it_runs(lambda: self._turn(number)):
            return
        self._due = None
        self.supervisor.turn()
        self._settle_turn()

    def _settle_turn(self) -> None:
        """The turn is over, with the time that it was blocked; the next one is due."""
        supervisor, clock = self.supervisor, self.host.clock
        if supervisor.state in TERMINAL and not self.decided_at:
            self.decided_at = self.kernel.now
        if supervisor.is_over:
            supervisor.finish()
            blocked, clock.blocked = clock.blocked, 0.0
            self._due = 0.0  # no more turns
            self.host.after(blocked, self._exit)
            return
        due = supervisor.next_due()
        blocked, clock.blocked = clock.blocked, 0.0
        self._due = None
        self.wake(blocked + min(due, TICK))

    def _exit(self) -> None:
        if self.is_gone:
            return
        if self.supervisor.goes_on is not None:
            self.world.change_part(self)
            return
        code = self.record.node.exit_code
        self.code = ExitCode.FAILED if code is None else ExitCode(code)
        self.is_gone = True
        self.world.on_exit(self)

    # -- what happens to it -----------------------------------------------------------------------

    def notice(self, source: str, grace: float, *, is_guess: bool = False) -> None:
        """Its node will go away."""
        if self.is_gone:
            return
        deadline = self.host.clock.monotonic() + grace
        notice = Notice(source, "preempted", deadline, is_guess=is_guess)
        if source == "signal":
            self.signals.arrive(notice)
        else:
            self.cloud.report(notice)
        if self.kernel.now < self.newest_at_notice[1]:
            self.newest_at_notice = self.world.disk.newest, self.kernel.now
        self.wake(0.0)

    def stop_now(self) -> None:
        """A second Ctrl-C."""
        if not self.is_gone:
            self.signals.arrive(StopNow())
            self.notice("signal", 300.0)

    def die(self) -> None:
        """SIGKILL of the supervisor; the kernel lets go of its locks, its agent follows."""
        if self.is_gone:
            return
        self.is_gone = True
        agent = self.agent
        if agent is not None:
            agent.die()
        self.world.on_death(self)

    # -- the run number -------------------------------------------------------------------------

    def _beat(self) -> None:
        if self.is_gone:
            return
        if not self.host.is_paused and not self.world.disk.hangs(self.host):
            self.beats += 1
            self.beat_at = self.kernel.now
            if not self.still_owns():
                return
        self.kernel.after(self.world.beat_seconds, self._beat)

    @property
    def is_reachable(self) -> bool:
        """Whether it can beat, and could for as long as a lease lasts."""
        now = self.kernel.now
        return now - max(self.host.paused_until, self.world.disk.answers(self.host)) > LEASE_SECONDS

    def still_owns(self) -> bool:
        """Check the fence as the thread for files does, which tells the loop."""
        try:
            self.fence.check()
        except RunSuperseded as error:
            self.lost = str(error)
            self.wake(0.0)
        return not self.lost

    def may_seal(self) -> bool:
        """Check the fence, as every process does before it seals."""
        try:
            self.fence.check()
        except RunSuperseded:
            return False
        return True

    # -- HostPort -------------------------------------------------------------------------------

    def start(self) -> None:
        return

    def wait(self, fds: Iterable[int | None], seconds: float) -> None:
        raise AssertionError("the simulation waits")

    def turn(self, agent_pid: int) -> None:
        return

    def activity(self, pids: Iterable[int]) -> object:
        return None

    def process_states(self, pids: Iterable[int]) -> Mapping[int, str]:
        return dict.fromkeys(pids, "S")

    def send(self, pid: int, number: int) -> None:
        raise AssertionError("every process runs")

    def effort(self, pids: Iterable[int]) -> Effort:
        return Effort.IDLE

    def aside(self, work: Callable[[], None]) -> None:
        self.host.after(self.kernel.between(0.1, 1.0), lambda: (work(), self.wake(0.0))[0])

    def stacks(self, pids: Mapping[int, int]) -> Mapping[int, Stack]:
        return {rank: Stack(("train (x:1)",)) for rank in pids}

    def stop(self) -> None:
        return
