"""What systemd is told, and for how long it is asked to wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.systemd import STOP_SECONDS, Service


class Manager:
    """The other end of the socket."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.setblocking(False)
        path = directory / "notify"
        self.channel.bind(str(path))
        self.environment = {"NOTIFY_SOCKET": str(path), **environment}
        self.service = Service(self.environment)

    def told(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.channel.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def manager(tmp_path: Path):
    found = Manager(tmp_path, WATCHDOG_USEC="4000000", WATCHDOG_PID=str(os.getpid()))
    yield found
    found.channel.close()


def test_workers_do_not_inherit_the_socket(manager: Manager) -> None:
    assert manager.environment == {}


def test_it_is_ready_once_the_workers_step_and_the_start_is_extended_until_then(manager) -> None:
    manager.service.serve(100.0, RunState.STARTING, "starting")
    told = manager.told()
    assert told == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=30000000", "STATUS=starting"]
    manager.service.serve(100.5, RunState.STARTING, "starting")
    assert manager.told() == []
    manager.service.serve(101.0, RunState.STARTING, "starting")
    assert manager.told() == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=30000000"]
    manager.service.serve(101.5, RunState.RUNNING, "training")
    assert manager.told() == ["STATUS=training", "READY=1"]
    manager.service.serve(103.0, RunState.BACKING_OFF, "training")
    assert manager.told() == ["WATCHDOG=1"]


def test_a_stop_is_extended_while_something_moves_and_not_longer(manager: Manager) -> None:
    extended = []
    for second in range(60):
        seen = min(second, 20)  # it moves for twenty seconds
        manager.service.stopping(100.0 + second, seen)
        extended.append("EXTEND_TIMEOUT_USEC=15000000" in manager.told())
    assert extended.index(False) == 20 + STOP_SECONDS
    assert not any(extended[extended.index(False) :])


def test_ranks_in_a_long_step_need_not_move(manager: Manager) -> None:
    extended = []
    for second in range(100):
        manager.service.stopping(100.0 + second, "the same", step_seconds=40.0)
        extended.append("EXTEND_TIMEOUT_USEC=15000000" in manager.told())
    assert extended.index(False) == 80


def test_stopping_is_sent_once(manager: Manager) -> None:
    for second in range(3):
        manager.service.stopping(100.0 + second, second)
    assert manager.told().count("STOPPING=1") == 1


def test_a_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    manager = Manager(tmp_path, WATCHDOG_USEC="4000000", WATCHDOG_PID="1")
    manager.service.alive(100.0)
    assert not any("WATCHDOG" in message for message in manager.told())
    manager.channel.close()


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        service = Service(environment)
        service.serve(100.0, RunState.RUNNING, "training")
        service.stopping(100.0, 1)


def test_a_manager_that_does_not_read_is_not_waited_for(manager: Manager) -> None:
    for number in range(5000):
        manager.service.serve(100.0, RunState.RUNNING, f"message {number}")
    assert 0 < len(manager.told()) < 5000


def test_a_message_is_one_field(manager: Manager) -> None:
    manager.service.serve(100.0, RunState.STARTING, "it failed:\nMAINPID=1")
    assert "STATUS=it failed:\\nMAINPID=1" in manager.told()
