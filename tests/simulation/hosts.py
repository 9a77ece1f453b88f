"""Hosts, and the teams that run the job on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.kernel import HostClock, Kernel
from tests.simulation.storage import HostMemory

if TYPE_CHECKING:
    from tests.simulation.run import Run
    from tests.simulation.shared_memory import HeldShare


class Host:
    """A machine: its clock, its shared memory, and the run on it, if there is one.

    Attributes:
        machine: the same for two containers of one machine.
        dials: whom it reaches where the nodes of the job are to meet.
        storage_at: until then the disk does not answer to it.
        paused_until: until then none of its processes runs.
        domain: what fails together with it.
        power: counts how often its memory was lost.
        shares: what it has in memory of a job of several nodes.
        passed_on: its earlier run, if the head of that has passed the job on; until the next one.
    """

    def __init__(self, kernel: Kernel, team: Team, number: int) -> None:
        self.number = self.machine = number
        self.name = f"n{number}"
        self.team = team
        self.clock = HostClock(kernel)
        self.memory = HostMemory()
        self.shares: list[HeldShare] = []
        self.passed_on: Run | None = None
        self.domain = ""
        self.power = 0
        self.run: Run | None = None
        self.dials = self
        self.is_down = False
        self.is_cut = False
        self.is_claiming = False
        self.storage_at = self.paused_until = 0.0
        self._kernel = kernel
        self._waiting: list[Callable[[], None]] = []

    def lose_memory(self) -> None:
        self.power += 1
        self.memory.generations.clear()
        self.shares.clear()

    @property
    def leads(self) -> bool:
        """Whether it is the head of its team."""
        return self is self.team.head

    @property
    def is_busy(self) -> bool:
        """Whether a run is there."""
        return self.run is not None and not self.run.is_gone

    @property
    def is_paused(self) -> bool:
        """Whether none of its processes runs: a virtual machine that is suspended."""
        return self._kernel.now < self.paused_until

    def when_it_runs(self, act: Callable[[], None]) -> bool:
        """Have something happen once the host goes on; False if it is not paused."""
        if self.is_paused:
            self._waiting.append(act)
            return True
        return False

    def go_on(self) -> None:
        """Do what was due during a pause that is over."""
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            self._kernel.after(0.001, act)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have a process of this host do something, when it runs."""

        def do() -> None:
            if not self.when_it_runs(do):
                act()

        self._kernel.after(seconds, do)


class Team:
    """The hosts on which a job is started with one command: ``srun``, or one requeue of it.

    Attributes:
        is_called: whether a service manager keeps its runs up.
    """

    def __init__(self, kernel: Kernel, first: int, size: int) -> None:
        self.is_called = False
        self.hosts = [Host(kernel, self, first + number) for number in range(size)]
        self.call_to(self.head)

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def call_to(self, head: Host) -> None:
        """Have all of them meet there."""
        for host in self.hosts:
            host.dials = head
