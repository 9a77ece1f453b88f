"""Hosts are cut off, lost, preempted and stopped at random; every sample of an epoch counts once.

More of it: ELASTIC_CKPT_TEST_DISTURBANCES=40 ELASTIC_CKPT_TEST_SEED=1 make test-hosts
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import Hosts, why_not

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261125"))
COUNT = int(os.environ.get("ELASTIC_CKPT_TEST_DISTURBANCES", "12"))
SIZE = 4003
ALL = ("h1", "h2", "h3")
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")


def cut_off(hosts: Hosts, name: str, dice: random.Random) -> None:
    """For less than it takes to be given up, or for more."""
    hosts.cut(name)
    time.sleep(dice.choice((0.3, 1.5, 5.0)))
    hosts.repair(name)


def lose(hosts: Hosts, name: str, dice: random.Random) -> None:
    hosts.lose(name)
    time.sleep(dice.uniform(0.0, 3.0))
    hosts.start(name)


def preempt(hosts: Hosts, name: str, dice: random.Random) -> None:
    hosts[name].process.send_signal(signal.SIGTERM)
    assert hosts[name].wait() == 75, hosts.output()
    hosts.start(name)


def head_of(hosts: Hosts) -> str:
    return str(hosts.head.view().supervisor.node)


def interrupt_the_head(hosts: Hosts, name: str, dice: random.Random) -> None:
    """A person ends the job, and starts it again."""
    hosts[head_of(hosts)].process.send_signal(signal.SIGINT)
    for one in ALL:
        assert hosts[one].wait() == 75, hosts.output()
    hosts.start(*ALL)


def preempt_the_head(hosts: Hosts, name: str, dice: random.Random) -> None:
    preempt(hosts, head_of(hosts), dice)


def lose_the_head(hosts: Hosts, name: str, dice: random.Random) -> None:
    lose(hosts, head_of(hosts), dice)


def lose_the_head_for_long(hosts: Hosts, name: str, dice: random.Random) -> None:
    """Until another host leads."""
    head, before = head_of(hosts), hosts.head.view().incarnation
    hosts.lose(head)
    hosts.until_training(2, beyond=before)
    hosts.start(head)


def lose_head_and_another(hosts: Hosts, name: str, dice: random.Random) -> None:
    head, before = head_of(hosts), hosts.head.view().incarnation
    other = dice.choice([one for one in ALL if one != head])
    hosts.lose(head)
    hosts.lose(other)
    hosts.until_training(1, beyond=before)
    hosts.start(head, other)


def cut_the_head_off(hosts: Hosts, name: str, dice: random.Random) -> None:
    cut_off(hosts, head_of(hosts), dice)


def kill_worker(hosts: Hosts, name: str, dice: random.Random) -> None:
    view = hosts.head.view()
    victim = dice.choice(view.workers)
    os.kill(victim.pid, signal.SIGKILL)
    hosts.head.until(lambda now: now.incarnation > view.incarnation, "the next incarnation")


def kill_agent(hosts: Hosts, name: str, dice: random.Random) -> None:
    view = hosts.head.view()
    hosts[dice.choice(ALL)].agent().send_signal(signal.SIGKILL)
    hosts.head.until(lambda now: now.incarnation > view.incarnation, "the next incarnation")


def stop_agent(hosts: Hosts, name: str, dice: random.Random) -> None:
    """It is given up while it sleeps, and finds that out when it wakes."""
    agent = hosts[name].agent()
    agent.send_signal(signal.SIGSTOP)
    time.sleep(dice.choice((1.0, 4.0)))
    agent.send_signal(signal.SIGCONT)


KINDS: list[Callable[[Hosts, str, random.Random], None]] = [
    cut_off, lose, preempt, interrupt_the_head, preempt_the_head, lose_the_head,
    lose_the_head_for_long, lose_head_and_another, cut_the_head_off, kill_worker, kill_agent,
    stop_agent,
]  # fmt: skip


@pytest.mark.timeout(0)  # each wait has its own bound
def test_disturbed_hosts_use_every_sample_once(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    print(f"\nseed {SEED}, {COUNT} disturbances")
    epochs = 1 + COUNT // 2
    arguments = ("--epochs", str(epochs), "--size", str(SIZE), "--pause", "0.03")
    options = ("--save-interval", "25", "--max-failures", "1000", "--rdzv-timeout", "60")
    kinds = [kind for kind in KINDS for _ in range(-(-COUNT // len(KINDS)))]
    dice.shuffle(kinds)
    with Hosts(3, tmp_path, "1:3", *arguments, options=options) as hosts:
        hosts.start(*ALL)
        for number, kind in enumerate(kinds[:COUNT], 1):
            step = hosts.until_training(3).position.step
            hosts.until_step(3, step + dice.randrange(1, 40))
            print(f"{number} of {COUNT}: {kind.__name__}", flush=True)
            others = [one for one in ALL if one != head_of(hosts)]
            kind(hosts, dice.choice(others), dice)
        hosts.until_training(3)
        hosts.finish(*ALL)
        used = hosts.used_per_epoch()
        assert len(used) == epochs
        for counter in used:
            assert set(counter) == set(range(SIZE))
            assert counter.total() - SIZE < 3
    for journal in (tmp_path / "job" / ".elastic-ckpt" / "journal").iterdir():
        assert all(json.loads(line) for line in journal.read_text().splitlines() if line)
    assert not list((tmp_path / "job" / ".attempts").iterdir())
