"""Exchanges between ranks that do not make the same ones, and waits for ranks that do not come."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from elastic_ckpt.errors import SaveFailed, UnequalSteps
from elastic_ckpt.training.ranks import peer_wait
from elastic_ckpt.training.ranks.peers import Peers


def on_ranks(*scripts: Callable[[Peers], Any], limit: float = 20.0) -> list[Any]:
    """What each rank's script returned or raised; each runs in a thread of its own."""
    store = dist.HashStore()
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
