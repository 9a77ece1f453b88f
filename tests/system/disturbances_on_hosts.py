"""What is done to a job on several hosts: each takes the hosts, one of them, and dice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

from elastic_ckpt.errors import ExitCode
from tests.clocks import why_not as no_clocks
from tests.hosts import Hosts

Disturbance = Callable[["DisturbedHosts", str, random.Random], None]

SAVED = int(ExitCode.PREEMPTED_SAVED)


class DisturbedHosts(Hosts):
    """Hosts of a job; more of them than train at a time have one in reserve.

    Attributes:
        least: nodes that it needs to train.
        most: nodes that it trains on.
    """

    def __init__(self, count: int, root, least: int, most: int, *arguments, options=()) -> None:
        nodes = f"{least}:{most}" if least < most else str(most)
        super().__init__(count, root, nodes, *arguments, options=options)
        self.least, self.most = least, most
        self.pids: list[int] = []

    def start(self, *names: str) -> None:
        super().start(*names)
        self.pids += [self[name].process.pid for name in names]

    def ready(self) -> int:
        """Start again what has ended by itself, as a requeue would, until all are there and as many
        as may be train; return the step."""
        while True:
            for name in self.names:
                code = self[name].process.poll()
                if code is not None:
                    assert code == SAVED, f"{name} ended with {code}:\n{self.output()}"
                    self.start(name)
            try:
                self.head.until(
                    lambda view: {one.node for one in view.nodes} == set(self.names),
                    "all hosts in the job",
                )
                return self.until_training(self.most).position.step
            except AssertionError:
                if all(self[name].process.poll() is None for name in self.names):
                    raise

    def head_name(self) -> str:
        return str(self.head.view().supervisor.node)

    def members(self) -> list[str]:
        """Return the nodes that train and do not lead."""
        view = self.head.view()
        return sorted({one.node for one in view.workers} - {str(view.supervisor.node)})

    def until_the_rest_trains(self, gone: int, before: int, dice: random.Random) -> None:
        """Wait for an incarnation without the lost hosts; a while if they are too many."""
        rest = min(self.most, len(self.names) - gone)
        if rest >= self.least:
            self.until_training(rest, beyond=before)
        else:
            time.sleep(dice.uniform(0.0, 12.0))


# -- hosts and processes that go -------------------------------------------------------------------


def lose(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    hosts.lose(name)
    time.sleep(dice.uniform(0.0, 3.0))
    hosts.start(name)


def lose_a_pair(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """Of two or three nodes any two are one: each share's replica is on the other, or may be."""
    before, pair = hosts.head.view().incarnation, hosts.members()
    if len(pair) == 1:
        pair.append(hosts.head_name())
    for one in pair:
        hosts.lose(one)
    if dice.random() < 0.5:
        hosts.until_the_rest_trains(len(pair), before, dice)
    hosts.start(*pair)


def lose_the_head(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    lose(hosts, hosts.head_name(), dice)


def lose_the_head_for_long(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """Until another host leads."""
    head, before = hosts.head_name(), hosts.head.view().incarnation
    hosts.lose(head)
    hosts.until_the_rest_trains(1, before, dice)
    hosts.start(head)


def lose_head_and_another(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    head, before = hosts.head_name(), hosts.head.view().incarnation
    other = dice.choice(hosts.members())
    hosts.lose(head)
    hosts.lose(other)
    hosts.until_the_rest_trains(2, before, dice)
    hosts.start(head, other)


def preempt(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    hosts[name].process.send_signal(signal.SIGTERM)
    assert hosts[name].wait() == SAVED, hosts.output()
    hosts.start(name)


def preempt_the_head(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    preempt(hosts, hosts.head_name(), dice)


def interrupt_the_head(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """A person ends the job, and starts it again."""
    hosts[hosts.head_name()].process.send_signal(signal.SIGINT)
    for one in hosts.names:
        assert hosts[one].wait() == SAVED, hosts.output()
    hosts.start(*hosts.names)


def kill_supervisor(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """The host stays, with what is in its memory."""
    name = dice.choice((name, hosts.head_name()))
    hosts[name].process.kill()
    hosts[name].process.wait(30)
    hosts.start(name)


def kill_all_supervisors(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """As when the job is killed on all hosts, and started there again."""
    for one in hosts.names:
        hosts[one].process.kill()
    for one in hosts.names:
        hosts[one].process.wait(30)
    hosts.start(*hosts.names)


def kill_worker(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    view = hosts.head.view()
    os.kill(dice.choice(view.workers).pid, signal.SIGKILL)
    hosts.head.until(lambda now: now.incarnation > view.incarnation, "the next incarnation")


def kill_agent(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    view = hosts.head.view()
    hosts[dice.choice(view.workers).node].agent().send_signal(signal.SIGKILL)
    hosts.head.until(lambda now: now.incarnation > view.incarnation, "the next incarnation")


def stop_agent(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """It is given up while it sleeps, and finds that out when it wakes."""
    agent = hosts[name].agent()
    agent.send_signal(signal.SIGSTOP)
    time.sleep(dice.choice((1.0, 4.0)))
    agent.send_signal(signal.SIGCONT)


# -- links ----------------------------------------------------------------------------------------


def cut_off(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """For less than it takes to be given up, or for more."""
    hosts.cut(name)
    time.sleep(dice.choice((0.3, 1.5, 5.0)))
    hosts.repair(name)


def cut_the_head_off(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    cut_off(hosts, hosts.head_name(), dice)


def cut_off_one_way(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """It receives nothing, or nothing that it sends arrives."""
    link, receives = hosts.link(dice.choice((name, hosts.head_name()))), dice.random() < 0.5
    link.lose(1.0, incoming=not receives, outgoing=receives)
    time.sleep(dice.choice((1.5, 5.0, 9.0)))
    link.restore()


def lose_packets(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    link = hosts.link(dice.choice((name, hosts.head_name())))
    link.lose(dice.choice((0.02, 0.1, 0.3)))
    time.sleep(dice.uniform(1.0, 6.0))
    link.restore()


def reorder_packets(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    link = hosts.link(dice.choice((name, hosts.head_name())))
    link.reorder(dice.choice((0.05, 0.3)), kbit=dice.choice((500, 5000)))
    time.sleep(dice.uniform(1.0, 6.0))
    link.restore()


def slow_the_link_down(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    link = hosts.link(dice.choice((name, hosts.head_name())))
    link.slow_down(dice.choice((200, 1000, 10_000)))
    time.sleep(dice.uniform(1.0, 6.0))
    link.restore()


# -- clocks ---------------------------------------------------------------------------------------


def step_clock(hosts: DisturbedHosts, name: str, dice: random.Random) -> None:
    """The time of day of a host, and stays so."""
    name = dice.choice((name, hosts.head_name()))
    seconds = dice.choice((2.0, 60.0, 3600.0, 30 * 86400.0))
    hosts.clocks[name].step(dice.choice((-1, 1)) * seconds)


KINDS: list[Disturbance] = [
    cut_off, lose, preempt, interrupt_the_head, preempt_the_head, lose_the_head,
    lose_the_head_for_long, lose_head_and_another, cut_the_head_off, kill_worker, kill_agent,
    stop_agent, cut_off_one_way, slow_the_link_down, lose_packets, reorder_packets, lose_a_pair,
    kill_supervisor, kill_all_supervisors, *([] if no_clocks() else [step_clock]),
]  # fmt: skip
