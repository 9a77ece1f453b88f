"""A host's cable that becomes worse: one direction dead, packets lost or overtaken, a slow link.

Token buckets, and filters of classic BPF that draw a random number for each packet: the kernel of a
small machine has these, and has no netem. Needs iproute2.
"""

from __future__ import annotations

import subprocess

_SHOT, _PASS = 2, 0xFFFFFFFF  # TC_ACT_SHOT, TC_ACT_UNSPEC
_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM


class Link:
    """A cable with a device at each end.

    Args:
        device: the end outside of the host.
        space: the network namespace of the host, where the other end is eth0.
    """

    def __init__(self, device: str, space: str) -> None:
        self._outside = ["tc"], device
        self._inside = ["tc", "-n", space], "eth0"

    def lose(self, share: float, *, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop a share of the packets that the host receives, sends, or both; 1 is a cut."""
        tc, device = self._outside
        run(*tc, "qdisc", "add", "dev", device, "clsact")
        for direction, wanted in (("egress", incoming), ("ingress", outgoing)):
            if wanted:
                program = _one_of(share, _SHOT, _PASS)
                found = "filter", "add", "dev", device, direction, "bpf", "da", "bytecode", program
                run(*tc, *found)

    def slow_down(self, kbit: int) -> None:
        """Let no more than this through in a second, in each direction."""
        for tc, device in (self._outside, self._inside):
            bucket = "tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "400ms"
            run(*tc, "qdisc", "add", "dev", device, "root", *bucket)

    def reorder(self, share: float, kbit: int) -> None:
        """Send a share of the packets through a slow queue, so that others overtake them."""
        for tc, device in (self._outside, self._inside):
            here = "dev", device, "parent", "1:"
            run(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
            rates = ("1", ("rate", "1gbit", "quantum", "60000")), ("2", ("rate", f"{kbit}kbit"))
            for number, rate in rates:
                run(*tc, "class", "add", *here, "classid", f"1:{number}", "htb", *rate)
            run(*tc, "filter", "add", *here, "bpf", "bytecode", _one_of(share, 0x10002, 0))

    def restore(self) -> None:
        """Be a good cable again."""
        for (tc, device), kind in (
            (self._outside, "clsact"), (self._outside, "root"), (self._inside, "root"),
        ):  # fmt: skip
            subprocess.run([*tc, "qdisc", "del", "dev", device, kind], capture_output=True)


def _one_of(share: float, chosen: int, other: int) -> str:
    """Return a BPF program that answers ``chosen`` for a share of the packets."""
    limit = min(int((1.0 - share) * 2**32), 2**32 - 1)
    load, compare = f"32 0 0 {_RANDOM}", f"53 0 1 {limit}"  # if not >= limit, skip one
    return f"4,{load},{compare},6 0 0 {chosen},6 0 0 {other}"


def run(*command: str) -> str:
    """Return the output of a command, which must not fail."""
    found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert found.returncode == 0, f"{' '.join(command)}: {found.stderr}"
    return found.stdout
