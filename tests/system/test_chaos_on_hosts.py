"""Hosts are cut off, lost, preempted and stopped at random; every sample of an epoch counts once.

Some jobs train on as many of three hosts as there are; others on two of three, so that their bits
can be compared with those of a job that nothing disturbed: a sum of three ranks' gradients depends
on its order, which torch changes after the first step. More of it: make chaos-hosts N=100 SEED=1
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.verify import verify_full
from tests.clocks import SteppedClock
from tests.clocks import why_not as no_clocks
from tests.cluster import STEADY
from tests.faults.test_bit_exact import belonging_to, directories_of
from tests.hosts import why_not
from tests.job import Job, used_samples
from tests.system.disturbances_on_hosts import KINDS, DisturbedHosts

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261125"))
COUNT = int(os.environ.get("ELASTIC_CKPT_TEST_DISTURBANCES", "6"))
ONLY = os.environ.get("ELASTIC_CKPT_TEST_KINDS", "")
SIZE, HOSTS = 3001, 3
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")


@pytest.mark.timeout(0)  # each wait has its own bound
def test_disturbed_hosts_use_every_sample_once(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    has_spare = dice.random() < 0.5
    replicas, interval = dice.choice((0, 1, 1, 2)), dice.choice((2, 10))
    job = (
        f"{'2 of 3' if has_spare else '1 to 3'} hosts, {replicas} replicas, saves after {interval}"
    )
    print(f"\nseed {SEED}, {COUNT} disturbances; {job} steps")
    epochs = 1 + COUNT // 4
    options = ("--save-interval", str(interval), "--replicas", str(replicas))
    with disturbed_hosts(tmp_path, epochs, *options, has_spare=has_spare) as hosts:
        hosts.start(*hosts.names)
        for number, kind in enumerate(draw_kinds(dice), 1):
            step = hosts.ready() + dice.randrange(1, 15)
            hosts.until_step(hosts.most, step)
            name = dice.choice([one for one in hosts.names if one != hosts.head_name()])
            print(f"{number} of {COUNT}, step {step}: {kind.__name__}", flush=True)
            kind(hosts, name, dice)
        hosts.ready()
        hosts.finish(*hosts.names, seconds=300 + 40 * COUNT)
        check_nothing_is_left(hosts)
        check_samples(hosts, epochs)
        if has_spare:
            check_bits(hosts, epochs)
        for path in hosts.head.checkpoints():
            verify_full(path)


@contextmanager
def disturbed_hosts(
    root: Path, epochs: int, *options: str, has_spare: bool
) -> Iterator[DisturbedHosts]:
    arguments = ("--epochs", str(epochs), "--size", str(SIZE), "--pause", "0.15")
    options = (*options, "--max-failures", "1000", "--rdzv-timeout", "60")
    least, most = (2, 2) if has_spare else (1, HOSTS)
    hosts = DisturbedHosts(HOSTS, root, least, most, *arguments, options=options)
    if not no_clocks():
        hosts.clocks = {name: SteppedClock(root, name) for name in hosts.names}
    with hosts:
        yield hosts


def draw_kinds(dice: random.Random) -> list:
    possible = [kind for kind in KINDS if not ONLY or kind.__name__ in ONLY.split(",")]
    kinds = [kind for kind in possible for _ in range(-(-COUNT // len(possible)))]
    dice.shuffle(kinds)
    return kinds[:COUNT]


def check_samples(hosts: DisturbedHosts, epochs: int) -> None:
    used = hosts.used_per_epoch()
    assert len(used) == epochs
    for counter in used:
        assert set(counter) == set(range(SIZE))
        assert counter.total() - SIZE < hosts.most


def check_bits(hosts: DisturbedHosts, epochs: int) -> None:
    """Compare the samples and the losses of each step with those of a job that nothing disturbed.

    Losses are sums of doubles: they are equal if the parameters were, bit for bit.
    """
    kept = Path(os.environ.get("ELASTIC_CKPT_TEST_CALM", hosts.root))
    trace = kept / f"calm-{epochs}" / "trace"
    arguments = ("--epochs", str(epochs), "--size", str(SIZE), "--trace", str(trace))
    if not (trace.parent / "done").exists():
        with Job(trace.parent, *arguments, nproc=hosts.most, script=STEADY) as job:
            assert job.start().wait(1200) == 0, job.output()
        (trace.parent / "done").touch()
    calm, disturbed = (used_samples(one, hosts.most) for one in (trace, hosts.root / "trace"))
    assert calm.keys() == disturbed.keys()
    for step, (*same, _) in calm.items():
        assert disturbed[step][:-1] == same, f"step and rank {step}"


def check_nothing_is_left(hosts: DisturbedHosts) -> None:
    for name in hosts.names:
        left = [one for one in hosts.inside(name, "ls", "/dev/shm").split() if "elastic" in one]
        assert not left, f"in the memory of {name}: {left}"
    job = hosts.head
    job.started = hosts.pids
    assert belonging_to(job) == []
    assert directories_of(job) == []
    assert not list((job.directory / ".attempts").iterdir())
    for journal in (job.directory / ".elastic-ckpt" / "journal").iterdir():
        assert all(json.loads(line) for line in journal.read_text().splitlines() if line)
