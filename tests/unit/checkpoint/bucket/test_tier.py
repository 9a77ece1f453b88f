"""What a machine keeps of a bucket's checkpoints, and what the leader looks at before it seals."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.tier import BucketReading, BucketTier
from elastic_ckpt.checkpoint.disk.tier import DiskAttempt
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import BucketFailed
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched
from tests.buckets import Hooked, claim, memory_store
from tests.checkpoints import make_header, open_job

DATA = b"state" * 100


class Machine:
    """A machine with a directory of its own, which is the only one of its job."""

    def __init__(self, place: Path, store: Hooked) -> None:
        self.job = open_job(place)
        self.store = store
        owned = claim(store)
        self.tier = BucketTier(store, self.job, lambda: owned)

    def save(self, step: int) -> Ref:
        attempt = self.tier.begin(step, len(DATA))
        header = make_header(DiskAttempt(self.job, attempt.ref.attempt, step))
        header = msgspec.structs.replace(header, world_size=1)
        part = attempt.part(0)
        part.write("modeling/x", DATA)
        return attempt.seal(header, part.finish(1, header), Retention())

    def load(self, ref: Ref) -> BucketReading:
        reading = self.tier.open(ref)
        reading.verify(0, 1, unwatched)
        return reading


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "job", Hooked(memory_store()))


def test_what_is_here_is_not_fetched_again_unless_a_bit_differs(machine: Machine) -> None:
    ref = machine.save(5)
    machine.store.asked.clear()
    reading = machine.load(ref)
    assert "get_range" not in machine.store.asked
    (reading.path / "modeling/x").write_bytes(b"T" + DATA[1:])
    assert (machine.load(ref).path / "modeling/x").read_bytes() == DATA
    assert "get_range" in machine.store.asked


def test_a_file_that_no_digest_covers_is_removed_before_an_engine_sees_it(machine: Machine) -> None:
    ref = machine.save(5)
    path = machine.load(ref).path
    (path / "modeling/evil").write_bytes(b"")
    machine.load(ref)
    assert [one.name for one in (path / "modeling").iterdir()] == ["x"]


def test_a_machine_keeps_the_newest_two_attempts(machine: Machine) -> None:
    for step in (5, 10, 15, 20):
        machine.save(step)
    [place] = (machine.job.control / "bucket").iterdir()
    assert sorted(one.name.split("-")[0] for one in place.iterdir()) == ["1.15", "1.20"]


def test_nothing_is_sealed_of_which_the_store_lacks_a_file(machine: Machine) -> None:
    """It said that it has it."""
    machine.save(5)

    def lose(name: str, key: str) -> None:
        if name == "put" and "modeling/x" in key:
            machine.store.delete([key])

    machine.store.after = lose
    with pytest.raises(BucketFailed, match="modeling/x was uploaded and is not there"):
        machine.save(10)
    newest = catalog.newest(machine.store)
    assert newest is not None and newest.step == 5
