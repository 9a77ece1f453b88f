"""What every tier must do. A new tier is a new ``Bench`` here, and passes all of it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.bucket import tier as bucket_tier
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ownership import (
    claim_after,
    claim_of,
    new_owner,
    newest_claim,
    read_owner,
)
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.disk import tier as disk_tier
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.memory import tier as memory_tier
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.memory.owner import tier_path
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.tier import Attempt, Ref, Tier, TierFull
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.progress import unwatched
from tests.checkpoints import make_header, open_job
from tests.memory_tiers import own

WORLD_SIZE = 2
LARGE = secrets.token_bytes(200_000)
"""Takes the mapped way in memory, and is not a whole number of pages."""


class Bench(ABC):
    """One kind of tier, and how to get at its files from outside."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.job = open_job(place / "job")

    @abstractmethod
    def tier(self) -> Tier:
        """Return the tier as another process would make it."""

    @abstractmethod
    def seal_path(self, ref: Ref) -> Path:
        """Return the file that holds the seal."""

    @abstractmethod
    def make_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the room away."""

    def file(self, ref: Ref) -> Path:
        """Return one of the checkpoint's files."""
        reading = self.tier().open(ref)
        reading.close()
        return reading.path / "modeling/large"

    def free_all(self) -> None:  # noqa: B027 - most tiers have room for all
        """Let the next attempts overwrite what a tier of limited size holds."""


class DiskBench(Bench):
    """The disk tier."""

    def tier(self) -> Tier:
        return DiskTier(self.job)

    def seal_path(self, ref: Ref) -> Path:
        return self.job.root / ref.name / "manifest.json"

    def make_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk_tier, "ensure_space", _full)


class MemoryBench(Bench):
    """The memory tier."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.root = tier_path(place, self.job)

    def tier(self) -> Tier:
        return MemoryTier(self.root)

    def seal_path(self, ref: Ref) -> Path:
        return self.root / ref.name / "seal.json"

    def make_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory_tier, "room_bytes", lambda _: 0)

    def free_all(self) -> None:
        for one in MemoryTier(self.root).sealed():
            one.generation.settle(one.seal)


class BucketBench(Bench):
    """The bucket tier, on a store in a directory."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.store = open_store(BucketUrl.parse(f"file://{place}/bucket"), make=True)
        owner = new_owner("run", "node")
        made = None if newest_claim(self.store) else claim_after(self.store, 0, owner)
        self.nonce = made.owner.nonce if made else getattr(read_owner(self.store, 1), "nonce", "")

    def tier(self) -> Tier:
        return BucketTier(self.store, self.job, lambda: claim_of(self.store, 1, self.nonce))

    def seal_path(self, ref: Ref) -> Path:
        return self.place / "bucket" / ref.name

    def file(self, ref: Ref) -> Path:
        remove_tree(self.job.control / "bucket")  # what the machine still has of it
        seal = SealKey.parse("", ref.name)
        assert seal is not None
        return self.place / "bucket" / seal.data / "modeling/large"

    def make_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bucket_tier, "ensure_space", _full)


def _full(*_: object) -> None:
    raise TierFull(0, "no room")


@pytest.fixture(params=[DiskBench, MemoryBench, BucketBench], ids=["disk", "memory", "bucket"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made: Bench = request.param(tmp_path)
    owned = own(tmp_path, made.job)
    yield made
    owned.release(remove=True)


def contents(step: int, rank: int) -> dict[str, bytes]:
    return {f"modeling/{rank}": b"%d" % step, "modeling/large": LARGE} if rank == 0 else {
        f"modeling/{rank}": b"%d" % step
    }  # fmt: skip


def write(bench: Bench, attempt: Attempt, step: int, *, epoch: int = 0) -> list[FileEntry]:
    """Write all ranks' parts, each through its own handle on the attempt."""
    head = header(bench.job, attempt, step, epoch=epoch)
    files: list[FileEntry] = []
    for rank in range(WORLD_SIZE):
        joined = bench.tier().join(Ref.decode(attempt.ref.encode())) if rank else attempt
        part = joined.part(rank)
        for name, data in contents(step, rank).items():
            with part.open(name, len(data)) as file:
                file.write(data)
        files += part.finish(WORLD_SIZE, head if rank == 0 else None)
    return files


def header(job: JobDirectory, attempt: Attempt, step: int, *, epoch: int = 0):
    made = make_header(disk_tier.DiskAttempt(job, attempt.ref.attempt, step), epoch=epoch)
    return msgspec.structs.replace(made, world_size=WORLD_SIZE)


def save(bench: Bench, step: int, *, epoch: int = 0) -> Ref:
    attempt = bench.tier().begin(step, len(LARGE))
    files = write(bench, attempt, step, epoch=epoch)
    return attempt.seal(header(bench.job, attempt, step, epoch=epoch), files, Retention())


def key_of(tier: Tier) -> tuple[int, int] | None:
    newest = tier.newest()
    return newest.key if newest else None


# -- saving and reading ---------------------------------------------------------------------------


def test_a_sealed_checkpoint_is_read_back_bit_for_bit(bench: Bench) -> None:
    save(bench, 10)
    newest = bench.tier().newest()
    assert newest is not None and newest.key == (0, 10) and newest.why is None
    for rank in range(WORLD_SIZE):
        reading = bench.tier().open(newest.ref)
        try:
            reading.verify(rank, WORLD_SIZE, unwatched)
            for owner in range(WORLD_SIZE):
                for name, data in contents(10, owner).items():
                    assert (reading.path / name).read_bytes() == data
            assert reading.seal.step == 10 and reading.seal.world_size == WORLD_SIZE
            reading.confirm()
            reading.mark_verified()
            reading.mark_verified()
        finally:
            reading.close()
            reading.close()


def test_an_empty_tier_has_nothing(bench: Bench) -> None:
    assert bench.tier().newest() is None and bench.tier().candidates(WORLD_SIZE) == []


def test_newest_is_by_epoch_and_step_as_numbers(bench: Bench) -> None:
    save(bench, 100, epoch=2)
    save(bench, 9, epoch=10)
    assert key_of(bench.tier()) == (10, 9)
    assert bench.tier().candidates(WORLD_SIZE)[0].key == (10, 9)


def test_a_tier_holds_the_attempts_that_were_sealed_in_it_alone(bench: Bench) -> None:
    save(bench, 10)
    newest = bench.tier().newest()
    assert newest is not None and newest.seal is not None
    assert bench.tier().holds(newest.seal)
    assert not bench.tier().holds(msgspec.structs.replace(newest.seal, attempt="0" * 16))


def test_a_file_of_other_code_is_claimed(bench: Bench) -> None:
    attempt = bench.tier().begin(10, 100)
    part = attempt.part(0)
    (attempt.path / "index.json").write_bytes(b"{}")
    part.claim("index.json")
    part.claim("index.json")
    assert part.paths == ["index.json"]
    os.link(attempt.path / "index.json", bench.place / "second name")
    with pytest.raises(CheckpointRejected):
        part.claim("index.json")


def test_a_file_is_written_once_and_inside(bench: Bench) -> None:
    part = bench.tier().begin(10, 100).part(0)
    part.write("one", b"1")
    with pytest.raises(FileExistsError):
        part.write("one", b"2")
    for path in ("../out", "/etc/out", "a/../../out"):
        with pytest.raises(CheckpointRejected):
            part.write(path, b"")


def test_a_file_whose_writer_failed_does_not_belong_to_the_part(bench: Bench) -> None:
    part = bench.tier().begin(10, 100).part(0)
    with pytest.raises(ZeroDivisionError), part.open("half", 100) as file:
        file.write(b"x")
        raise ZeroDivisionError
    assert part.paths == []


# -- repeats and ends -----------------------------------------------------------------------------


def test_a_repeated_seal_changes_nothing(bench: Bench) -> None:
    attempt = bench.tier().begin(10, len(LARGE))
    files = write(bench, attempt, 10)
    head = header(bench.job, attempt, 10)
    first = attempt.seal(head, files, Retention())
    assert attempt.seal(head, files, Retention()) == first
    assert key_of(bench.tier()) == (0, 10)


def test_finish_may_be_repeated(bench: Bench) -> None:
    attempt = bench.tier().begin(10, 100)
    part = attempt.part(1)
    part.write("ranks/1", b"1")
    assert part.finish(WORLD_SIZE, None) == part.finish(WORLD_SIZE, None)


def test_a_dropped_attempt_leaves_the_previous_checkpoint(bench: Bench) -> None:
    save(bench, 10)
    attempt = bench.tier().begin(20, len(LARGE))
    write(bench, attempt, 20)
    attempt.drop()
    attempt.drop()
    assert key_of(bench.tier()) == (0, 10)


def test_a_drop_after_the_seal_does_nothing(bench: Bench) -> None:
    attempt = bench.tier().begin(10, len(LARGE))
    attempt.seal(header(bench.job, attempt, 10), write(bench, attempt, 10), Retention())
    attempt.drop()
    assert key_of(bench.tier()) == (0, 10)


KILLED = """
import os, sys
from pathlib import Path
from tests.unit.checkpoint import test_tiers

kind, place = sys.argv[1:]
bench = getattr(test_tiers, kind)(Path(place))
test_tiers.write(bench, bench.tier().begin(20, 1000), 20)
print("written", flush=True)
os.kill(os.getpid(), 9)
"""


def test_an_attempt_that_was_killed_is_never_newest(bench: Bench) -> None:
    save(bench, 10)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, type(bench).__name__, str(bench.place)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-9, "written\n"), done.stderr
    assert key_of(bench.tier()) == (0, 10)
    bench.free_all()
    save(bench, 20)  # what it left is not in the way
    assert key_of(bench.tier()) == (0, 20)


def test_of_two_attempts_at_one_step_one_is_there_in_full(bench: Bench) -> None:
    save(bench, 10)
    save(bench, 10)
    newest = bench.tier().newest()
    assert newest is not None and newest.key == (0, 10)
    reading = bench.tier().open(newest.ref)
    reading.verify(0, WORLD_SIZE, unwatched)
    reading.close()


def test_a_full_tier_refuses_and_keeps_what_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(bench, 10)
    bench.make_full(monkeypatch)
    with pytest.raises(TierFull):
        bench.tier().begin(20, len(LARGE))
    assert key_of(bench.tier()) == (0, 10)


# -- damage and hostile content -------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "gone", "link", "pipe", "unlisted", "seal", "no seal"])
def test_a_damaged_checkpoint_is_neither_newest_nor_read(bench: Bench, damage: str) -> None:
    save(bench, 10)
    ref = save(bench, 20)
    path, seal = bench.file(ref), bench.seal_path(ref)
    if bench.tier().name == "bucket" and damage in ("link", "pipe"):
        damage = "gone"  # no object is one
    if damage == "cut":
        os.truncate(path, 5)
    elif damage == "unlisted":
        (path.parent / "evil").write_bytes(b"")
    elif damage == "seal":
        seal.write_bytes(seal.read_bytes().replace(b'"step": 20', b'"step": 21'))
    elif damage == "no seal":
        seal.unlink()
    else:
        path.unlink()
    if damage == "link":
        (bench.place / "copy").write_bytes(LARGE)
        path.symlink_to(bench.place / "copy")
    elif damage == "pipe":
        os.mkfifo(path)
    assert key_of(bench.tier()) == (0, 10)
    bad = [one for one in bench.tier().candidates(WORLD_SIZE) if one.key == (0, 20)]
    assert all(one.why is not None and one.seal is None for one in bad)
    with pytest.raises(CheckpointRejected):
        reading = bench.tier().open(ref)
        try:
            reading.verify(0, WORLD_SIZE, unwatched)
        finally:
            reading.close()


def test_a_flipped_bit_is_found_where_every_byte_is_read(bench: Bench) -> None:
    ref = save(bench, 10)
    path = bench.file(ref)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(bytes([LARGE[1000] ^ 1]))
    reading = bench.tier().open(ref)
    found = 0
    for rank in range(WORLD_SIZE):
        try:
            reading.verify(rank, WORLD_SIZE, unwatched)
        except CheckpointRejected:
            found += 1
    reading.close()
    assert found == (1 if bench.tier().every_byte else 0)


def test_a_missing_checkpoint_is_a_typed_error(bench: Bench) -> None:
    place = "b" if bench.tier().name == "memory" else "epoch-0_step-99"
    with pytest.raises(CheckpointRejected):
        bench.tier().open(Ref(bench.tier().name, place, "0" * 16))


def test_a_rejected_checkpoint_may_be_rejected_again(bench: Bench) -> None:
    save(bench, 10)
    ref = save(bench, 20)
    moved = bench.tier().reject(ref, "bits")
    assert bench.tier().reject(ref, "bits") == ""
    assert key_of(bench.tier()) == ((0, 10) if moved else (0, 20))
    assert not moved or Path(moved.removeprefix("file://")).exists()


def test_what_is_open_is_not_overwritten(bench: Bench) -> None:
    ref = save(bench, 10)
    reading = bench.tier().open(ref)
    try:
        for step in (20, 30):
            bench.free_all()
            save(bench, step)
        assert (reading.path / "modeling/large").read_bytes() == LARGE
        assert reading.seal.step == 10
        reading.verify(0, WORLD_SIZE, unwatched)
    finally:
        reading.close()


def test_a_drain_copies_a_checkpoint_to_the_tier_below(bench: Bench, tmp_path: Path) -> None:
    """From memory into each tier: bit for bit, under the same attempt; a repeat copies nothing."""
    (tmp_path / "other").mkdir()
    source = MemoryBench(tmp_path / "other")
    owned = own(source.place, source.job)
    save(source, 10)
    [sealed] = owned.tier.sealed()
    assert sum(drain(sealed, bench.tier())) > len(LARGE)
    assert bench.tier().holds(sealed.seal)
    assert sum(drain(sealed, bench.tier())) == 0
    newest = bench.tier().newest()
    assert newest is not None
    reading = bench.tier().open(newest.ref)
    for rank in range(WORLD_SIZE):
        reading.verify(rank, WORLD_SIZE, unwatched)
    assert (reading.path / "modeling/large").read_bytes() == LARGE
    reading.close()
    owned.release(remove=True)
