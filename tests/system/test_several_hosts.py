"""One job on several hosts, each with its own link, name and memory: they join, leave, are cut off.

``make test-hosts`` prints how long each took.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.hosts import Hosts, why_not

SIZE = 1203
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")


def make(root: Path, count: int, nnodes: str, *options: str) -> Hosts:
    arguments = ("--epochs", "3", "--size", str(SIZE), "--pause", "0.06")
    return Hosts(count, root, nnodes, *arguments, options=("--save-interval", "20", *options))


def tell(hosts: Hosts, what: str, began: float, sign: str, incarnation: int) -> None:
    """Print the seconds until the head noticed, launched, and saw a step of all ranks."""
    stepped = hosts.until_stepped(incarnation)
    events = [one for one in hosts.head.events() if not one["data"].get("follows")]
    later = [one for one in events if one["monotonic"] >= began]
    known = next(one["monotonic"] for one in later if one["event"] == sign)
    launched = next(
        one["monotonic"] for one in later
        if one["event"] == "launch" and one["data"]["incarnation"] == incarnation
    )  # fmt: skip
    print(
        f"\n{what}: detect {known - began:.2f} s, re-form {launched - known:.2f} s, "
        f"first step {stepped - launched:.2f} s"
    )


def test_joining_and_leaving_hosts_use_every_sample_once(tmp_path: Path) -> None:
    with make(tmp_path, 3, "1:3", "--rdzv-timeout", "20") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 20)
        secret = hosts.inside("h1", "sh", "-c", "echo mine > /dev/shm/secret; hostname")
        assert secret.strip() == "h1"
        assert "secret" in hosts.inside("h1", "ls", "/dev/shm")
        assert "secret" not in hosts.inside("h2", "ls", "/dev/shm")
        assert not Path("/dev/shm/secret").exists()

        number = hosts.head.view().incarnation  # more than one if h2 came late
        began = time.monotonic()
        hosts.start("h3")
        hosts.until_training(3, beyond=number)
        tell(hosts, "h3 joins (its start included)", began, "node_joined", number + 1)
        step = hosts.head.view().position.step

        hosts.until_step(3, step + 25)
        began = time.monotonic()
        hosts.cut("h2")
        hosts.until_training(2, beyond=number + 1)
        tell(hosts, "h2 is cut off", began, "ended", number + 2)

        step = hosts.head.view().position.step
        hosts.until_step(2, step + 5)
        began = time.monotonic()
        hosts["h3"].process.send_signal(signal.SIGTERM)
        assert hosts["h3"].wait() == 75, hosts.output()
        hosts.until_training(1, beyond=number + 2)
        tell(hosts, "h3 is preempted", began, "ended", number + 3)

        assert hosts["h2"].wait() == 75, hosts.output()  # it can be run again where it is reached
        hosts.finish("h1")
        for used in hosts.used_per_epoch():
            assert set(used) == set(range(SIZE))
            assert used.total() - SIZE < 3
        view = hosts.head.view()
        assert view.restarts.failures == 0
        kinds = [e["data"]["kind"] for e in hosts.head.events() if e["event"] == "crash"]
        assert kinds == ["membership"]


def test_losing_the_head_host_makes_the_others_ask_for_a_rerun(
    tmp_path: Path,
) -> None:
    """It continues alone where one node suffices; the others must stop, and do not hang."""
    with make(tmp_path, 2, "1:2", "--rdzv-timeout", "30") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 25)
        began = time.monotonic()
        hosts.cut("h1")
        assert hosts["h2"].wait(120) == 75, hosts.output()
        lost = next(e for e in hosts["h2"].events() if e["event"] == "head_lost")
        print(f"\nthe head is cut off: detect {lost['monotonic'] - began:.2f} s")
        hosts.repair("h1")
        hosts.options[hosts.options.index("30")] = "120"  # a start may take long
        hosts.start("h2")
        hosts.until_training(2, beyond=2)
        hosts.finish("h1", "h2")
        for used in hosts.used_per_epoch():
            assert set(used) == set(range(SIZE))
