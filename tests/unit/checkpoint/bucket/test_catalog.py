"""What a bucket holds: the newest in few requests, superseded ones, hostile keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from elastic_ckpt.checkpoint.bucket import catalog, ownership
from elastic_ckpt.checkpoint.bucket.keys import SealKey, seals_of
from elastic_ckpt.checkpoint.bucket.ownership import read_beat
from elastic_ckpt.checkpoint.bucket.retain import SWEEP_SECONDS, judged, remove, sweep
from elastic_ckpt.checkpoint.bucket.store import StoredObject
from elastic_ckpt.errors import CheckpointRejected, RunSuperseded
from elastic_ckpt.policy.retention import Retention
from tests.buckets import Hooked, claim, memory_store


def key(claim_number: int, step: int, epoch: int = 0, attempt: str = "a") -> SealKey:
    return SealKey("", claim_number, epoch, step, f"{attempt}{claim_number}-{step}")


def put(store: Hooked, *keys: SealKey) -> None:
    for one in keys:
        store.put(one.key, b"{}")
        store.put(f"{one.data}modeling/x", b"data")


def test_the_newest_of_ten_thousand_takes_three_requests_and_its_manifest_one() -> None:
    store = Hooked(memory_store())
    owner = claim(store)
    every = [key(1, step, epoch=step // 100) for step in range(10_000)]
    for one in every:
        store.put(one.key, b"{}")
    owner.sealed("", every[-1].key)
    store.asked.clear()
    assert catalog.newest(store) == every[-1]
    assert store.asked == ["list", "list", "get"]


def test_a_key_says_what_it_was_made_of() -> None:
    for one in (key(1, 0), key(7, 10**18 - 1, epoch=3), SealKey("fold0", 2, 5, 6, "ab12")):
        assert SealKey.parse(one.session, one.key) == one
    assert key(1, 120, epoch=3).name == "epoch-3_step-120"


@pytest.mark.parametrize(
    "name", ["x", "1-2-3_a.json", f"{'9' * 18}-{'9' * 18}-{'9' * 18}_epoch-0_step-0_../x.json", ""]
)
def test_other_keys_are_no_seals(name: str) -> None:
    store = Hooked(memory_store())
    assert SealKey.parse("", seals_of("") + name) is None
    if name and ".." not in name:
        store.put(seals_of("") + name, b"x")
    put(store, key(1, 5))
    assert [one.seal.step for one in catalog.listed(store)] == [5]


def test_what_a_later_owner_went_past_is_superseded() -> None:
    store = Hooked(memory_store())
    put(store, key(1, 10), key(1, 20), key(1, 30), key(1, 40))
    put(store, key(2, 25), key(2, 50))
    put(store, key(3, 45))
    found = {(one.seal.claim, one.seal.step): one.superseded for one in catalog.listed(store)}
    assert found == {
        (3, 45): False, (2, 50): True, (2, 25): False,
        (1, 40): True, (1, 30): True, (1, 20): False, (1, 10): False,
    }  # fmt: skip


def test_a_seal_that_is_not_listed_yet_was_told() -> None:
    class Old(Hooked):
        def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
            for page in super().listing(prefix):
                yield [one for one in page if "step-20" not in one.key]

    store = Old(memory_store())
    owner = claim(store)
    put(store, key(1, 10), key(1, 20))
    owner.sealed("", key(1, 20).key)
    assert catalog.newest(store) == key(1, 20)
    later = claim(store)
    assert later.newest == {"": key(1, 20).key}
    assert catalog.newest(store) == key(1, 20)


def test_a_manifest_that_is_torn_or_of_another_checkpoint_is_rejected() -> None:
    store = Hooked(memory_store())
    put(store, key(1, 5))
    with pytest.raises(CheckpointRejected, match="torn or changed"):
        catalog.read_seal(store, key(1, 5))
    with pytest.raises(CheckpointRejected, match="not in s3://bucket/job any more"):
        catalog.read_seal(store, key(1, 6))


def test_the_seal_goes_first() -> None:
    """A kill between the two leaves data without a seal, never a seal without data."""
    store = Hooked(memory_store())
    put(store, key(1, 5), key(1, 6))
    deleted: list[str] = []
    store.before = lambda name, at: deleted.append(at) if name == "delete" else None
    remove(store, [key(1, 5)])
    assert deleted[0] == key(1, 5).key
    assert [one.seal.step for one in catalog.listed(store)] == [6]
    assert not [one for page in store.listing(key(1, 5).data) for one in page]


def test_what_was_never_sealed_goes_once_it_is_old() -> None:
    class Aged(Hooked):
        age = 0.0

        def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
            for page in super().listing(prefix):
                yield [
                    StoredObject(one.key, one.bytes, one.modified - self.age * ("data/" in prefix))
                    for one in page
                ]

    store = Aged(memory_store())
    owner = claim(store)
    put(store, key(1, 5))
    store.put(f"{key(1, 7).data}modeling/x", b"data")
    assert sweep(owner) == 0
    store.age = SWEEP_SECONDS + 60
    assert sweep(owner) == 1
    assert [one.key for page in store.listing("data/") for one in page] == [
        f"{key(1, 5).data}modeling/x"
    ]


def test_an_owner_beats_during_a_long_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BUCKET_BEAT_SECONDS", -1.0)
    store = Hooked(memory_store())
    owner = claim(store)
    put(store, key(1, 5))
    store.put(f"{key(1, 7).data}modeling/x", b"data")
    before = read_beat(store, owner.number)
    sweep(owner)
    after = read_beat(store, owner.number)
    assert before is not None and after is not None and after.count > before.count
    claim(store, "elsewhere")
    with pytest.raises(RunSuperseded):
        sweep(owner)


def test_retention_reads_no_manifest_that_it_does_not_need() -> None:
    store = Hooked(memory_store())
    put(store, *(key(1, step) for step in range(1, 8)), key(2, 3))
    store.asked.clear()
    done = judged(store, "", Retention(last=2))
    assert "get" not in store.asked
    assert [(one.seal.step, verdict.keep) for one, verdict in done] == [
        (3, True), (7, True), (6, True), (5, True), (4, True), (3, True), (2, True), (1, False),
    ]  # fmt: skip
    gone = judged(store, "", Retention(last=2), keep_superseded=1)
    assert [one.seal.step for one, verdict in gone if not verdict.keep] == [6, 5, 4, 3, 1]
