"""Claims: one owner, whatever answers are lost and however old a listing is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import ownership
from elastic_ckpt.checkpoint.bucket import take as taking
from elastic_ckpt.checkpoint.bucket.keys import RUNS, beat_key, run_key, told_key
from elastic_ckpt.checkpoint.bucket.ownership import (
    Owner,
    claim_after,
    identify,
    new_owner,
    newest_claim,
    read_beat,
    read_owner,
    read_told,
)
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.store import StoredObject, create
from elastic_ckpt.checkpoint.bucket.take import (
    is_in_step,
    last_seen,
    newest_owner,
    note_own,
    note_pulled,
    require_step,
    take,
    take_for,
    was_in_step,
)
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.errors import (
    BucketFailed,
    BucketRefused,
    LockHeld,
    RunSuperseded,
    StopAborted,
)
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.buckets import Hooked, claim, failing, memory_store
from tests.checkpoints import open_job

ELSEWHERE = ProcessIdentity("other", "another-boot", 7, 1.0)


def owner_elsewhere(nonce: str) -> Owner:
    """An owner of which nothing can be told but its beat."""
    return Owner(run_id="other-run", node="n", owner=ELSEWHERE, nonce=nonce)


def test_of_two_that_claim_the_same_number_one_is_refused() -> None:
    store = memory_store()
    first, second = new_owner("a", "n"), new_owner("b", "n")
    assert claim_after(store, 0, first).number == 1
    with pytest.raises(LockHeld, match="run a"):
        claim_after(store, 0, second)
    assert claim_after(store, 0, first).number == 1  # a repeat: its answer was lost
    assert claim_after(store, 1, second).number == 2


def test_an_answer_that_is_lost_is_looked_up() -> None:
    """Whether the object is there decides, not what the request seemed to do."""
    store = Hooked(memory_store())
    store.after = failing("put_new")
    assert create(store, "a", b"mine")
    store.before = failing("put_new")
    assert not create(store, "a", b"theirs")
    with pytest.raises(BucketFailed):
        create(store, "b", b"mine")  # it did not get there


def test_an_owner_notices_the_next_one() -> None:
    store = memory_store()
    first = claim(store)
    first.check()
    first.beat()
    claim(store, "later")
    for ask in (first.check, first.beat, lambda: first.sealed("", "seals/x")):
        with pytest.raises(RunSuperseded, match="run later"):
            ask()


def test_the_newest_owner_is_found_although_listings_are_old() -> None:
    store = Hooked(memory_store())
    for _ in range(3):
        claim(store)

    class Old(Hooked):
        def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
            for page in super().listing(prefix):
                yield [one for one in page if not one.key.startswith(f"{RUNS}000003")]

    old = Old(store)
    assert newest_claim(old) == 2
    assert newest_owner(old) == 3


def test_another_job_is_refused() -> None:
    store = memory_store()
    identify(store, "one")
    identify(store, "one")
    with pytest.raises(BucketRefused, match="elastic-ckpt pull s3://bucket/job"):
        identify(store, "two")


def test_one_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = memory_store()
    monkeypatch.setattr(taking.time, "sleep", lambda _: pytest.fail("it waited"))
    claim_after(store, 0, owner_elsewhere("x")).beat(ended=True)
    assert take(store, "job", new_owner("b", "n"), Patience()).number == 2


@pytest.mark.parametrize("beats", [True, False])
def test_one_elsewhere_is_watched(monkeypatch: pytest.MonkeyPatch, beats: bool) -> None:
    """It is refused while it beats, and taken over when it has been silent for its lease."""
    store, now, said = memory_store(), [0.0], []
    first = claim_after(store, 0, owner_elsewhere("x"))

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if beats:
            first.beat()

    monkeypatch.setattr(taking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(taking.time, "sleep", sleep)
    if beats:
        with pytest.raises(LockHeld, match=r"pid 7 on other.*alive"):
            take(store, "job", new_owner("b", "n"), Patience(said.append))
        assert now[0] < 10
    else:
        assert take(store, "job", new_owner("b", "n"), Patience(said.append)).number == 2
        assert 40 <= now[0] < 50
    assert "waiting up to 40 s" in said[0]


def test_a_signal_ends_the_wait() -> None:
    store = memory_store()
    claim_after(store, 0, owner_elsewhere("x"))
    with pytest.raises(StopAborted, match="rerun the same command"):
        take(store, "job", new_owner("b", "n"), Patience(leaves=lambda: True))


def test_a_directory_knows_whether_the_bucket_went_on_without_it(tmp_path: Path) -> None:
    store, here, there = memory_store(), open_job(tmp_path / "a"), open_job(tmp_path / "b")
    assert is_in_step(here, store)
    mine = take_for(here, store, new_owner("a", "n"), Patience())
    note_own(here, mine)
    mine.sealed("", "seals/1")
    assert is_in_step(here, store)
    assert not is_in_step(there, store)
    note_pulled(there, store.url, last_seen(store))
    assert is_in_step(there, store)
    mine.sealed("", "seals/0")  # it was alive, and went on
    assert is_in_step(here, store)
    assert not is_in_step(there, store)
    claim(store)
    assert not is_in_step(here, store)
    assert not is_in_step(here, at_url("s3://bucket/other", store))


def test_a_kill_around_a_claim_leaves_a_directory_as_in_step_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has noted that it will claim; whether it did, and how often, does not matter."""
    now = [0.0]  # the leases of five owners that are waited for
    monkeypatch.setattr(taking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(taking.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    store, here, there = memory_store(), open_job(tmp_path / "a"), open_job(tmp_path / "b")
    identity = here.identity()
    (there.control / "identity").write_text(identity)
    note_own(here, take_for(here, store, new_owner("a", "n"), Patience()))
    for _ in range(2):
        take_for(here, store, new_owner("killed", "n"), Patience())
    assert is_in_step(here, store)
    again = take_for(here, store, new_owner("once", "n"), Patience())
    assert was_in_step(here, again)
    later = open_job(tmp_path / "c")
    (later.control / "identity").write_text(identity)
    note_pulled(later, store.url, last_seen(store))
    killed = take_for(later, store, new_owner("killed", "n"), Patience())
    assert was_in_step(later, killed)
    assert is_in_step(later, store)
    stranger = take_for(there, store, new_owner("stranger", "n"), Patience())
    assert not was_in_step(there, stranger)
    assert not is_in_step(there, store)  # and a kill here does not make it so
    assert not is_in_step(later, store)


def test_what_the_last_owner_sealed_during_the_wait_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in step when it began to wait for the other machine."""
    store, here, now = memory_store(), open_job(tmp_path), [0.0]
    other = claim_after(store, 0, owner_elsewhere("x"))
    identify(store, here.identity())
    other.sealed("", "seals/1")
    note_pulled(here, store.url, last_seen(store))
    assert is_in_step(here, store)
    monkeypatch.setattr(taking.time, "monotonic", lambda: now[0])
    taken: list[float] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if not taken:
            taken.append(now[0])
            other.sealed("", "seals/0")
            other.beat(ended=True)

    monkeypatch.setattr(taking.time, "sleep", sleep)
    mine = take_for(here, store, new_owner("b", "n"), Patience())
    assert not was_in_step(here, mine)
    with pytest.raises(BucketRefused, match="elastic-ckpt pull s3://bucket/job"):
        require_step(here, store, mine)


def at_url(url: str, store: object) -> Hooked:  # as a class
    """The same store under another URL."""
    found = Hooked(store)  # type: ignore[arg-type]
    found.url = url
    return found


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b"null" * 100])
def test_records_of_nobody(data: bytes) -> None:
    """Who can write into the bucket can stop the job, with one line, and no more."""
    store = memory_store()
    store.put(beat_key(1), data)
    store.put(told_key(1), data)
    assert read_beat(store, 1) is None
    assert read_told(store, 1) is None
    store.put(run_key(1), data)
    with pytest.raises(BucketRefused, match=r"runs/000001\.json is not what"):
        read_owner(store, 1)


def test_claims_are_forgotten_at_some_time() -> None:
    store = memory_store()
    for _ in range(40):
        claim(store)
    keys = [one.key for page in store.listing(RUNS) for one in page]
    assert len(keys) == 60  # twenty records, what they told, and their beats
    assert newest_claim(store) == 40


def test_a_store_that_ignores_conditions_is_refused() -> None:
    class Ignorant(Hooked):
        def put_new(self, key: str, data: bytes) -> None:
            self.put(key, data)

    store = Ignorant(memory_store())
    with pytest.raises(BucketRefused, match=r"ignores conditions.*If-None-Match"):
        probe(store)
    assert not [one for page in store.listing("probe/") for one in page]
    probe(Hooked(memory_store()))


def test_two_sealers_of_a_run_know_of_each_other(job: JobDirectory) -> None:
    """The ranks' leader and a drain, which seals older steps later; keys count down."""
    store = memory_store()
    leader = claim(store).share(job)
    drain = leader.twin()
    leader.sealed("", "seals/3")
    leader.sealed("", "seals/1")
    drain.sealed("", "seals/2")
    assert leader.learn() == {"": "seals/1"}
    with leader.alone():
        assert leader.sealed_before("", "seals/1") == ["seals/2", "seals/3"]
        leader.take_back("", "seals/1", "seals/2")
    assert read_told(store, leader.number) == {"": "seals/2"}
    drain.sealed("", "seals/0")
    assert leader.learn() == {"": "seals/0"}


def test_lock_of_a_claim_that_stays_taken_is_an_error(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_LOCK_SECONDS", 0.1)
    leader = claim(memory_store()).share(job)
    with leader.alone(), pytest.raises(BucketFailed, match="has held"):
        leader.twin().sealed("", "seals/1")
    leader.twin().sealed("", "seals/1")
