"""Several hosts on this one: network namespaces on a bridge, each with names and memory of its own.

Each host has its own interfaces, ``/etc/hosts``, host name and ``/dev/shm``, which stays until the
host is switched off, and a time of day of its own if it is in ``clocks``. Needs root and iproute2;
everything goes when the context ends.
"""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

from tests.clocks import SteppedClock
from tests.cluster import Cluster, Node
from tests.links import Link, run

_BRIDGES = itertools.count()
_BOOT = 'hostname "$1"; mount -t tmpfs -o size="$2" tmpfs /dev/shm; echo up; exec cat'


def why_not() -> str:
    """Return why such hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare") and shutil.which("nsenter")):
        return "no iproute2 or util-linux"
    probe = ["unshare", "--net", "--mount", "--uts", "true"]
    return "" if subprocess.run(probe, capture_output=True).returncode == 0 else "no namespaces"


class Hosts(Cluster):
    """A cluster with a host for each node, h1 to hN; the first one hosts the rendezvous.

    Args:
        memory: how large the /dev/shm of each is at the most.
    """

    def __init__(self, count: int, *arguments, memory: str = "512m", **keywords):
        super().__init__(*arguments, **keywords)
        self.memory = memory
        self.tag = f"ec{os.getpid() % 100000}x{next(_BRIDGES)}"
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self.endpoint = "h1:29400"
        self.clocks: dict[str, SteppedClock] = {}
        self._machines: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Hosts":
        try:
            run("ip", "link", "add", self.tag, "type", "bridge")
            run("ip", "link", "set", self.tag, "up")
            for name in self.names:
                self.add(name)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *about) -> None:
        super().__exit__(*about)
        self.remove()

    def add(self, name: str) -> None:
        space, cable = f"{self.tag}{name}", self.cable(name)
        etc = Path("/etc/netns") / space
        etc.mkdir(parents=True)
        hosts = ["127.0.0.1 localhost", "::1 localhost"]
        for other in self.names:
            hosts += [f"{address(other)} {other}", f"::ffff:{address(other)} {other}"]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        (etc / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
        (etc / "resolv.conf").write_text("")  # a query to an unreachable server takes long
        run("ip", "netns", "add", space)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", cable, "master", self.tag, "up")
        run("ip", "-n", space, "addr", "add", f"{address(name)}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in list(self._machines):
            self.switch_off(name)
        for name in self.names:
            space = f"{self.tag}{name}"
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.tag], capture_output=True)
        if not any(Path("/etc/netns").glob("*")):
            shutil.rmtree("/etc/netns", ignore_errors=True)

    def make(self, name: str) -> Node:
        node = super().make(name)
        node.prefix = ["nsenter", *self._spaces(name), "env", "-C", str(Path.cwd())]
        if name in self.clocks:
            node.prefix += self.clocks[name].variables
        return node

    def lose(self, name: str) -> None:
        super().lose(name)
        self.switch_off(name)

    def switch_off(self, name: str) -> None:
        """Have a host forget what is in its memory; its processes have ended."""
        machine = self._machines.pop(name, None)
        if machine is not None:
            machine.stdin.close()
            machine.wait(20)

    def _spaces(self, name: str) -> list[str]:
        """Return how to enter a host, which is switched on."""
        if name not in self._machines:
            inner = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-ec", _BOOT]
            boot = ["ip", "netns", "exec", f"{self.tag}{name}", *inner, "sh", name, self.memory]
            pipe = subprocess.PIPE  # a host goes when its input ends, as when this process dies
            machine = self._machines[name] = subprocess.Popen(boot, stdin=pipe, stdout=pipe)
            assert machine.stdout.readline() == b"up\n"
        return ["-t", str(self._machines[name].pid), "--mount", "--net", "--uts"]

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        run("ip", "link", "set", self.cable(name), "down")

    def repair(self, name: str) -> None:
        run("ip", "link", "set", self.cable(name), "up")

    def cable(self, name: str) -> str:
        return f"{self.tag}{name}"[-15:]

    def link(self, name: str) -> Link:
        return Link(self.cable(name), f"{self.tag}{name}")

    def inside(self, name: str, *command: str) -> str:
        """Return a command's output on a host."""
        return run("nsenter", *self._spaces(name), *command)


def address(name: str) -> str:
    return f"10.77.0.{name[1:]}"
