"""Exchanges between ranks that do not make the same ones, and waits for ranks that do not come."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from elastic_ckpt.errors import LeaderLost, SaveFailed, UnequalSteps
from elastic_ckpt.training.ranks import peer_wait
from elastic_ckpt.training.ranks.peers import Peers


def on_ranks(*scripts: Callable[[Peers], Any], limit: float = 20.0, store: Any = None) -> list[Any]:
    """What each rank's script returned or raised; each runs in a thread of its own."""
    store = store or dist.HashStore()
    results: list[Any] = [None] * len(scripts)

    def enter(rank: int) -> None:
        try:
            results[rank] = scripts[rank](Peers(rank, len(scripts), store, limit))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(len(scripts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def at(name: str) -> Callable[[Peers], bytes]:
    return lambda peers: peers.agree(name, str(peers.rank).encode(), b" ".join)


def test_all_ranks_receive_what_the_leader_makes_of_their_values() -> None:
    assert on_ranks(*[at("step 1")] * 3) == [b"0 1 2"] * 3


def test_an_error_of_the_leaders_judgement_is_raised_on_all_ranks() -> None:
    def judge(values: list[bytes]) -> bytes:
        raise UnequalSteps("rank 1 is late")

    results = on_ranks(*[lambda peers: peers.agree("step 1", b"", judge)] * 2)
    assert [str(error) for error in results] == ["rank 1 is late"] * 2


@pytest.mark.parametrize("other", [0, 1])
def test_ranks_that_meet_at_two_places_raise_an_error_that_names_both(other: int) -> None:
    scripts = [at("the save after step 7"), at("the save after step 7")]
    scripts[other] = at("the batches of epoch 1 after step 6")
    results = on_ranks(*scripts)
    assert [type(error) for error in results] == [UnequalSteps] * 2
    for error in results:
        assert "step 7" in str(error)
        assert "step 6" in str(error)
        assert "rank 1" in str(error)


def test_a_leader_that_went_on_learns_that_a_rank_has_diverged() -> None:
    def leader(peers: Peers) -> Any:
        peers.tell("attempt", b"x")
        return peers.agree("the save after step 7", b"", lambda _: b"")

    results = on_ranks(leader, at("the batches of epoch 1"))
    assert [type(error) for error in results] == [UnequalSteps] * 2
    assert "the batches of epoch 1" in str(results[0])


def test_a_wait_names_who_is_missing_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.MEETING_SECONDS", 1.0)
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.FAILURE_GRACE_SECONDS", 0.5)
    came = at("the save after step 7")
    results = on_ranks(came, came, lambda peers: "absent", limit=2.5)
    assert [type(error) for error in results[:2]] == [SaveFailed] * 2
    said = capfd.readouterr().err
    assert "rank 0 has waited 1 s for rank 2 at 'the save after step 7'" in said
    assert "rank 1 has waited" not in said  # the leader is there, and reports
    assert peer_wait.MEETING_SECONDS == 10.0


def test_a_missing_leader_is_named_by_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.MEETING_SECONDS", 1.0)
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.FAILURE_GRACE_SECONDS", 0.5)
    results = on_ranks(lambda peers: "absent", at("the save after step 7"), limit=2.0)
    assert isinstance(results[1], SaveFailed)
    assert "for rank 0 at" in capfd.readouterr().err


def collecting(value: bytes, late: float = 0.0) -> Callable[[Peers], list[bytes]]:
    def produce() -> bytes:
        time.sleep(late)
        return value

    return lambda peers: peers.collect("the save after step 7", produce)


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    def produce() -> bytes:
        raise ValueError("no such layer")

    def broken(peers: Peers) -> Any:
        return peers.collect("the save after step 7", produce)

    results = on_ranks(collecting(b"a"), broken, collecting(b"c"))
    assert [type(error) for error in results] == [SaveFailed] * 3
    assert {str(error) for error in results} == {str(results[0])}
    assert "rank 1" in str(results[0]) and "no such layer" in str(results[0])


def test_a_rank_that_is_stuck_does_not_hold_up_an_error_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does one that is dead."""
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.FAILURE_GRACE_SECONDS", 0.5)
    monkeypatch.setattr("elastic_ckpt.training.ranks.peers.LOOK_SECONDS", 0.1)

    def broken(peers: Peers) -> Any:
        return peers.collect("the save after step 7", lambda: b"" + None)  # type: ignore[operator]

    results = on_ranks(collecting(b"a"), broken, lambda peers: "stuck", limit=600.0)
    assert [type(error) for error in results[:2]] == [SaveFailed] * 2
    assert "rank 1" in str(results[0])


class Counted:
    """A store that counts its calls."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.calls = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            self.calls += 1
        return getattr(self._store, name)


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_an_exchange_takes_a_few_calls_of_each_rank_however_long_it_waits(late: float) -> None:
    rounds, calls = 3, {}
    for count in (4, 16):
        store = Counted()

        def script(peers: Peers, count: int = count) -> Any:
            found = []
            for number in range(rounds):
                value = b"%d" % peers.rank
                wait = late if peers.rank == count - 1 else 0.0
                found.append(
                    peers.collect(f"{number}", lambda: (time.sleep(wait), value)[1])  # noqa: B023
                )
            return found

        results = on_ranks(*[script] * count, store=store)
        assert results[0] == [[b"%d" % rank for rank in range(count)]] * rounds
        assert results[1] == [[]] * rounds
        calls[count] = store.calls
    assert calls[4] <= 6 * 4 * rounds
    assert calls[16] <= 6 * 16 * rounds


def test_nothing_of_earlier_exchanges_is_left_in_the_store() -> None:
    store = dist.HashStore()
    rounds = 20
    on_ranks(*[lambda peers: [collecting(b"x")(peers) for _ in range(rounds)]] * 3, store=store)
    assert store.num_keys() <= 8


def test_a_signal_interrupts_a_wait_at_once() -> None:
    """The handler runs while the other rank, which never comes, is waited for."""

    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            collecting(b"x")(Peers(1, 2, dist.HashStore(), 600.0))
    finally:
        timer.join(10)
        signal.signal(signal.SIGUSR1, before)


HOST = """
from torch import distributed
store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""

RANK = """
import sys
from torch import distributed
from elastic_ckpt.training.ranks.peers import Peers

def connect():
    port = int(sys.argv[1])
    return distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

def begin_to_wait():
    store = connect()
    print("waits", flush=True)
    return store

peers = Peers(1, 2, connect(), float(sys.argv[2]), begin_to_wait)
try:
    peers.tell("attempt", b"")
except Exception as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture
def store_host():
    """A process that hosts a TCP store, and a way to start a rank that waits for its leader."""
    started = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def test_a_rank_whose_store_dies_raises_that_the_leader_is_lost(store_host: Any) -> None:
    host = store_host(HOST)
    port = host.stdout.readline()
    rank = store_host(RANK, port, 600.0)
    assert rank.stdout.readline() == "waits\n"
    host.kill()
    assert rank.stdout.readline() == f"{LeaderLost.__name__}\n"
    assert rank.wait(20) == 0


def test_a_wait_that_ends_without_an_answer_prints_no_warning_of_the_store(store_host: Any) -> None:
    host = store_host(HOST)
    rank = store_host(
        "from elastic_ckpt.training.ranks import peers\npeers.FAILURE_GRACE_SECONDS = 0.1\n" + RANK,
        host.stdout.readline(), 0.5,
    )  # fmt: skip
    out, err = rank.communicate(timeout=60)
    assert (out, rank.returncode) == (f"waits\n{SaveFailed.__name__}\n", 0)
    assert "waitForInput" not in err and "terminate" not in err
