"""What tests of several hosts rely on: cables that get worse, clocks that step, memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clocks import SteppedClock
from tests.clocks import why_not as no_clocks
from tests.hosts import Hosts, address, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")

_RECEIVE = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("", 5000))
link.settimeout(1.0)
print("up", flush=True)
try:
    while True:
        print(int.from_bytes(link.recv(2000)[:4], "big"))
except TimeoutError:
    pass
"""
_SEND = """
import socket, sys, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(int(sys.argv[2])):
    link.sendto(number.to_bytes(4, "big") + bytes(1000), (sys.argv[1], 5000))
    if number % 10 == 9:  # ten at once, or a busy machine would put none behind another
        time.sleep(0.01)
"""


def received(hosts: Hosts, sender: str, receiver: str, count: int = 200) -> list[int]:
    """Send numbered packets from one host to another; return those that arrive, in order."""
    listens = ["ip", "netns", "exec", f"{hosts.tag}{receiver}", sys.executable, "-c", _RECEIVE]
    with subprocess.Popen(listens, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        hosts.inside(sender, sys.executable, "-c", _SEND, address(receiver), str(count))
        return [int(line) for line in process.stdout]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    with Hosts(2, tmp_path_factory.mktemp("hosts"), "1:2") as found:
        assert received(found, "h1", "h2", 20) == list(range(20))
        yield found


@pytest.mark.parametrize("incoming", [True, False])
def test_cut_in_one_direction_leaves_the_other(hosts: Hosts, *, incoming: bool) -> None:
    hosts.link("h2").lose(1.0, incoming=incoming, outgoing=not incoming)
    arrived = received(hosts, "h1", "h2", 20), received(hosts, "h2", "h1", 20)
    hosts.link("h2").restore()
    assert [bool(found) for found in arrived] == [not incoming, incoming]
    assert received(hosts, "h1", "h2", 20) == received(hosts, "h2", "h1", 20) == list(range(20))


def test_some_packets_are_lost(hosts: Hosts) -> None:
    hosts.link("h2").lose(0.3)
    arrived = received(hosts, "h1", "h2")
    hosts.link("h2").restore()
    assert 100 < len(arrived) < 180


def test_some_packets_are_overtaken(hosts: Hosts) -> None:
    hosts.link("h2").reorder(0.3, kbit=2000)
    arrived = received(hosts, "h1", "h2")
    hosts.link("h2").restore()
    assert sorted(arrived) == list(range(200)) != arrived


def test_slow_link_does_not_carry_what_is_too_much(hosts: Hosts) -> None:
    hosts.link("h2").slow_down(500)
    arrived = received(hosts, "h1", "h2")
    hosts.link("h2").restore()
    assert 10 < len(arrived) < 150


def test_memory_of_a_host_stays_until_it_is_switched_off(hosts: Hosts) -> None:
    hosts.inside("h1", "touch", "/dev/shm/kept")
    assert "kept" in hosts.inside("h1", "ls", "/dev/shm")
    assert "kept" not in hosts.inside("h2", "ls", "/dev/shm")
    hosts.switch_off("h1")
    assert "kept" not in hosts.inside("h1", "ls", "/dev/shm")


@pytest.mark.skipif(bool(no_clocks()), reason=no_clocks() or "clocks")
def test_clock_steps_while_monotonic_time_goes_on(tmp_path: Path) -> None:
    code = "import time\nwhile input(): print(time.time(), time.monotonic(), flush=True)"
    clock = SteppedClock(tmp_path, "h1")
    command = ["env", *clock.variables, sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def look() -> tuple[float, float]:
            process.stdin.write("look\n")
            process.stdin.flush()
            wall, monotonic = process.stdout.readline().split()
            return float(wall) - time.time(), float(monotonic) - time.monotonic()

        assert all(abs(seconds) < 5.0 for seconds in look())
        clock.step(-86400.0)
        wall, monotonic = look()
        assert abs(wall + 86400.0) < 5.0 and abs(monotonic) < 5.0
        process.stdin.close()
        process.wait(20)
