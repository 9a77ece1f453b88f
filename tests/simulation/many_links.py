"""What the hub of a head with many members sees of its sockets: lines that arrive, no kernel."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from elastic_ckpt.supervisor.agent import hub

if TYPE_CHECKING:
    from tests.simulation.many_members import Member
    from tests.simulation.many_nodes import ManyNodes


class Line:
    """The head's end of a connection (``LineSocket``)."""

    def __init__(self, world: ManyNodes, member: Member) -> None:
        self.lost = ""
        self.unsent = b""
        self.arrived: list[bytes] = []
        self._world = world
        self._member = member

    def receive(self) -> list[bytes]:
        lines, self.arrived = self.arrived, []
        return lines

    def send(self, data: bytes) -> None:
        self._world.carry_to(self._member, self, data)

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._member.closed(self)

    def deliver(self, line: bytes) -> None:
        self.arrived.append(line)
        self._world.ring(self)


class Selector:
    """What is ready at this moment; never waits."""

    def __init__(self) -> None:
        self.keys: dict[int, SimpleNamespace] = {}
        self.ready: dict[int, Any] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> None:
        self.keys[id(fileobj)] = SimpleNamespace(fileobj=fileobj, data=data)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> None:
        self.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> None:
        del self.keys[id(fileobj)]

    def select(self, timeout: float) -> list[tuple[SimpleNamespace, int]]:
        ready, self.ready = self.ready, {}
        return [(self.keys[number], 1) for number in ready if number in self.keys]


class Bell:
    """Wakes the hub's thread (``Waker``)."""

    def __init__(self, world: ManyNodes) -> None:
        self._world = world

    def wake(self) -> None:
        self._world.ring(self)

    def clear(self) -> None:
        return


class Listener:
    """Where members connect."""

    def __init__(self, world: ManyNodes) -> None:
        self.waiting: deque[Line] = deque()
        self._world = world

    def setblocking(self, flag: bool) -> None:
        return

    def accept(self) -> tuple[Line, str]:
        if not self.waiting:
            raise BlockingIOError
        if len(self.waiting) > hub.ACCEPT_AT_ONCE:
            self._world.ring(self)
        return self.waiting.popleft(), ""
