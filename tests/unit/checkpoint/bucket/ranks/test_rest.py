"""The ranks of a machine bring the chunks that they want, each once, and none that is damaged."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.bucket.attempt import local_files
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.ranks.reading import BucketReading, LocalRank
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.disk.tier import DiskAttempt
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, FileEntry
from elastic_ckpt.checkpoint.ranges.chunks import chunks_in
from elastic_ckpt.checkpoint.tier import Ranges, Ref
from elastic_ckpt.errors import BucketFailed, CheckpointRejected
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.progress import unwatched
from tests.buckets import Hooked, claim, memory_store
from tests.checkpoints import make_header, open_job

LARGE = "modeling/large"
DATA = secrets.token_bytes(3 * CHUNK_BYTES + 1000)
SMALL = b"small" * 100
JSON = b" " * (CHUNK_BYTES + 5)
"""A file that says what the others hold, and is larger than a chunk itself."""

FIRST, SECOND, THIRD, LAST = (range(n * CHUNK_BYTES, (n + 1) * CHUNK_BYTES) for n in range(4))


class Machine:
    """Two ranks of a machine that has nothing of a checkpoint in a bucket."""

    def __init__(
        self, place: Path, *, chunks: bool = True, store: BucketStore | None = None
    ) -> None:
        self.job = open_job(place)
        self.store = Hooked(store or memory_store())
        owned = claim(self.store)
        self.tiers = [
            BucketTier(self.store, self.job, lambda: owned, LocalRank(rank, 2)) for rank in range(2)
        ]
        self.ref = self._save(chunks)
        key = SealKey.parse("", self.ref.name)
        assert key is not None
        self.key, self.path = key, local_files(self.job, key)
        remove_tree(self.path)
        self.fetched = 0
        self.store.before = self._count

    def _save(self, chunks: bool) -> Ref:
        attempt = self.tiers[0].begin(5, len(DATA))
        header = make_header(DiskAttempt(self.job, attempt.ref.attempt, 5))
        header = msgspec.structs.replace(header, world_size=1)
        part = attempt.part(0)
        for path, data in ((LARGE, DATA), ("modeling/small", SMALL), ("modeling/x.json", JSON)):
            part.write(path, data)
        files = part.finish(1, header)
        if not chunks:
            files = [msgspec.structs.replace(one, chunks=()) for one in files]
        return attempt.seal(header, files, Retention())

    def _count(self, name: str, key: str) -> None:
        self.fetched += name == "get_range" and key.endswith("large")

    def load(self, *ranges: Ranges | None) -> list[BucketReading]:
        """Do what a load does, one rank after the other, up to its confirmation."""
        readings = [tier.open(self.ref) for tier in self.tiers]
        try:
            for reading in readings:
                reading.verify(0, 2, unwatched)
            rests = [reading.rest for reading in readings]
            assert all(rests) or not any(rests)
            for rest, wanted in zip(filter(None, rests), ranges, strict=False):
                rest.want(wanted)
            for rest in filter(None, rests):
                rest.bring(unwatched)
            for rest in filter(None, rests):
                rest.settle()
        finally:
            for reading in readings:
                reading.close()
        return readings

    def has(self, chunk: range) -> bool:
        data = (self.path / LARGE).read_bytes()
        assert len(data) == len(DATA)
        return data[chunk.start : chunk.stop] == DATA[chunk.start : chunk.stop]

    def damage(self, at: int) -> None:
        changed = bytearray(DATA)
        changed[at] ^= 1
        self.store.put(self.key.data + LARGE, bytes(changed))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "job")


def wanted(*chunks: range) -> Mapping[str, Sequence[tuple[int, int]]]:
    """A few bytes in the middle of each."""
    return {LARGE: [(chunk.start + 100, chunk.start + 200) for chunk in chunks]}


def test_each_chunk_that_a_rank_wants_is_fetched_once(machine: Machine) -> None:
    readings = machine.load(wanted(THIRD), wanted(THIRD, FIRST))
    assert machine.fetched == 2  # the first one, in which a header is, and what both want
    assert [machine.has(one) for one in (FIRST, SECOND, THIRD, LAST)] == [True, False, True, False]
    assert (machine.path / "modeling/small").read_bytes() == SMALL
    assert (machine.path / "modeling/x.json").read_bytes() == JSON
    for reading in readings:
        reading.confirm()


@pytest.mark.parametrize("ranges", [None, {}, {"modeling/small": []}])
def test_a_file_that_is_not_named_is_brought_in_full(machine: Machine, ranges: Ranges) -> None:
    machine.load(wanted(), ranges)
    assert machine.fetched == 4 and (machine.path / LARGE).read_bytes() == DATA


def test_what_is_here_is_kept(machine: Machine) -> None:
    machine.load(wanted(SECOND), wanted())
    machine.load(wanted(SECOND, LAST), wanted())
    assert machine.fetched == 3
    with (machine.path / LARGE).open("r+b") as file:
        file.seek(SECOND.start + 5)
        file.write(b"?")
    machine.load(wanted(SECOND, LAST), wanted())
    assert machine.fetched == 4 and machine.has(SECOND) and machine.has(LAST)


def test_a_checkpoint_without_digests_of_chunks_is_brought_in_full(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "job", chunks=False)
    readings = machine.load()
    assert [reading.rest for reading in readings] == [None, None]
    assert (machine.path / LARGE).read_bytes() == DATA


def test_a_damaged_chunk_that_a_rank_wants_is_a_rejection_and_not_written(machine: Machine) -> None:
    machine.damage(THIRD.start + 7)
    with pytest.raises(CheckpointRejected, match="large does not match"):
        machine.load(wanted(THIRD), wanted())
    assert machine.has(FIRST) and not machine.has(THIRD)
    data = (machine.path / LARGE).read_bytes()
    assert not any(data[THIRD.start : THIRD.stop])


def test_a_damaged_chunk_that_no_rank_wants_is_not_looked_at(machine: Machine) -> None:
    machine.damage(THIRD.start + 7)
    machine.load(wanted(SECOND), wanted(LAST))
    assert machine.has(SECOND) and machine.has(LAST)


def test_an_object_that_was_cut_or_is_gone_is_a_rejection(machine: Machine) -> None:
    machine.store.delete([machine.key.data + LARGE])
    with pytest.raises(CheckpointRejected):
        machine.load(wanted(SECOND), wanted())


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_store_that_fails_on_the_way_loses_nothing(machine: Machine, fails_at: int) -> None:
    """Nor does a kill: what is there in full is kept, and what is not is fetched."""
    seen = 0

    def fail(name: str, key: str) -> None:
        nonlocal seen
        if name == "get_range" and key.endswith("large"):
            seen += 1
            if seen > fails_at:
                raise BucketFailed("away")

    machine.store.before = fail
    with pytest.raises(BucketFailed):
        machine.load(None, None)
    machine.store.before = machine._count
    machine.load(None, None)
    assert machine.fetched == 4 - fails_at
    assert (machine.path / LARGE).read_bytes() == DATA


def test_a_half_written_chunk_is_fetched_again(machine: Machine) -> None:
    """As a kill leaves it."""
    machine.load(wanted(), wanted())
    with (machine.path / LARGE).open("r+b") as file:
        file.seek(SECOND.start)
        file.write(DATA[SECOND.start : SECOND.start + 5_000_000])
    machine.load(wanted(SECOND), wanted())
    assert machine.has(SECOND) and machine.fetched == 2


KILLED = """
import os, sys
from pathlib import Path
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ranks.reading import LocalRank
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import unwatched
from tests.buckets import Hooked

url, directory, name, limit = sys.argv[1:]
store = Hooked(open_store(BucketUrl.parse(url)))
seen = []

def kill(asked, key):
    seen.append(asked == "get_range" and key.endswith("large"))
    if sum(seen) > int(limit):
        os.kill(os.getpid(), 9)

store.before = kill
tier = BucketTier(store, JobDirectory.at(Path(directory)), lambda: None, LocalRank(0, 1))
reading = tier.open(Ref("bucket", name))
reading.verify(0, 1, unwatched)
reading.rest.want(None)
reading.rest.bring(unwatched)
"""


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_kill_in_the_middle_costs_at_most_what_was_under_way(tmp_path: Path, limit: int) -> None:
    url = BucketUrl.parse(f"file://{tmp_path}/bucket")
    machine = Machine(tmp_path / "job", store=open_store(url, make=True))
    arguments = (str(url), str(machine.job.root), machine.ref.name, str(limit))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    machine.load(None, None)
    assert (machine.path / LARGE).read_bytes() == DATA
    assert machine.fetched >= 4 - limit


def _remake(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


def _link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _second_name(path: Path) -> None:
    os.link(path, path.parents[3] / "second name")


@pytest.mark.parametrize("change", [_remake, _link, _second_name])
def test_a_local_file_that_is_not_ours_alone_is_made_anew(
    machine: Machine, change: Callable[[Path], None]
) -> None:
    machine.load(wanted(SECOND), wanted())
    change(machine.path / LARGE)
    machine.load(wanted(SECOND), wanted())
    path = machine.path / LARGE
    assert machine.has(SECOND) and not path.is_symlink() and path.lstat().st_nlink == 1


def test_a_chunk_that_changes_during_the_load_is_found(machine: Machine) -> None:
    for chunk, is_found in ((THIRD, False), (SECOND, True)):
        readings = machine.load(wanted(SECOND), wanted())
        with (machine.path / LARGE).open("r+b") as file:
            file.seek(chunk.start)
            file.write(b"changed!")
        found = 0
        for reading in readings:
            try:
                reading.confirm()
            except CheckpointRejected:
                found += 1
        assert found == is_found


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 1, {0}),
        (CHUNK_BYTES - 1, CHUNK_BYTES + 1, {0, 1}),
        (CHUNK_BYTES, 2 * CHUNK_BYTES, {1}),
        (5, 5, set()),
        (9, 5, set()),
        (-7, 10**12, {0, 1, 2, 3}),
        (10**12, 10**13, set()),
    ],
)
def test_ranges_in_chunks(begin: int, end: int, expected: set[int]) -> None:
    entry = FileEntry("x", len(DATA), "0" * 32, 0, ("0" * 32,) * 4)
    assert chunks_in(entry, {"x": [(begin, end)]}) == expected
