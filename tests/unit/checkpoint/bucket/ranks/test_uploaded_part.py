"""A drain from memory into a bucket: past the disk, resumable, and whole or not at all."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.ranks import uploaded_part
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import BucketFailed, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import unwatched
from tests.buckets import Hooked, claim, memory_store
from tests.memory_tiers import own, snapshot

CONTENTS = {
    "modeling/large": secrets.token_bytes(2 * CHUNK_BYTES + 1000),
    "modeling/other": secrets.token_bytes(uploaded_part.SMALL_BYTES + 1),
    "running_states.json": b'{"epoch": 0}',
}


class Bench:
    """A sealed generation, and the bucket that is its job's place."""

    def __init__(self, place: Path, job: JobDirectory) -> None:
        self.job = job
        self.owned = own(place, job)
        found = snapshot(job, self.owned.tier, 7, contents=CONTENTS, world_size=1)
        assert found is not None
        self.sealed: Sealed = found
        self.store = Hooked(memory_store())
        self.claim = claim(self.store)
        self.tier = BucketTier(self.store, job, lambda: self.claim, keeps_files=False)

    def drain(self) -> int:
        return sum(drain(self.sealed, self.tier))


@pytest.fixture
def bench(tmp_path: Path, job: JobDirectory):
    made = Bench(tmp_path, job)
    yield made
    made.owned.release(remove=True)
    left = [one.name for one in threading.enumerate() if one.name.startswith("upload")]
    assert left == []


def test_all_bytes_arrive_and_nothing_stays_on_the_disk(bench: Bench) -> None:
    assert bench.drain() == bench.sealed.seal.total_bytes
    assert not (bench.job.control / "bucket").exists()
    newest = bench.tier.newest()
    assert newest is not None and newest.key == (0, 7)
    reading = bench.tier.open(newest.ref)
    reading.verify(0, 1, unwatched)
    if reading.rest is not None:
        reading.rest.want(None)
        reading.rest.bring(unwatched)
        reading.rest.settle()
    for path, data in CONTENTS.items():
        assert (reading.path / path).read_bytes() == data
    reading.close()
    assert bench.tier.holds(bench.sealed.seal)


def test_a_drain_that_fails_leaves_no_seal_and_the_next_one_sends_the_rest(bench: Bench) -> None:
    sent: list[str] = []

    def refuse(name: str, key: str) -> None:
        sent.extend([key] if name == "upload" else [])
        if key.endswith("modeling/other"):
            raise BucketFailed("the store is away")

    bench.store.before = refuse
    with pytest.raises(BucketFailed, match="is away"):
        bench.drain()
    assert bench.tier.newest() is None
    assert [key.rpartition("/")[2] for key in sent] == ["large", "other"]
    sent.clear()
    bench.store.before = lambda name, key: sent.extend([key] if name == "upload" else [])
    bench.drain()
    assert [key.rpartition("/")[2] for key in sent] == ["other"]
    assert bench.tier.newest() is not None


def test_a_drain_that_is_given_up_ends_its_upload(bench: Bench) -> None:
    copying = drain(bench.sealed, bench.tier)
    next(copying)
    copying.close()
    assert bench.tier.newest() is None
    large = [one for page in bench.store.listing("data/") for one in page if "large" in one.key]
    assert large == []


def test_a_file_that_an_engine_wrote_by_path_is_refused(bench: Bench) -> None:
    attempt = bench.tier.join(Ref("bucket", "1.7", "a" * 16))
    with pytest.raises(CheckpointRejected, match="not in memory"):
        attempt.part(0).claim("modeling/large")


def test_an_earlier_claim_is_gone_past_by_a_later_seal(bench: Bench) -> None:
    assert not bench.tier.has_gone_past(0)
    bench.drain()
    assert bench.tier.has_gone_past(0)
    assert not bench.tier.has_gone_past(bench.claim.number)
    assert next(catalog.listed(bench.store)).seal.claim == bench.claim.number
