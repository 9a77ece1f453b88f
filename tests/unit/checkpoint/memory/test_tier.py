"""The memory tier's files: two generations, of which one is always whole."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.memory.generation import check_covers
from elastic_ckpt.checkpoint.memory.mapped_file import MAPPED_FROM_BYTES, Mappings
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.tier import TierBusy
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import MODEL, open_job
from tests.memory_tiers import own, snapshot

LARGE = {MODEL: os.urandom(3 * MAPPED_FROM_BYTES + 17)}


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def tier(job: JobDirectory, place: Path) -> MemoryTier:
    return own(place, job).tier


def steps(tier: MemoryTier) -> list[int]:
    return [one.seal.step for one in tier.sealed()]


def test_the_newest_two_are_kept_and_each_holds_what_was_written(
    job: JobDirectory, tier: MemoryTier
) -> None:
    for step in (10, 20, 30):
        made = snapshot(job, tier, step, contents={MODEL: b"%d" % step})
        assert made is not None
        made.generation.settle(made.seal)
    assert steps(tier) == [30, 20]
    for one in tier.sealed():
        assert (one.generation.path / MODEL).read_bytes() == b"%d" % one.seal.step


def test_what_is_not_on_disk_is_never_overwritten(job: JobDirectory, tier: MemoryTier) -> None:
    first, second = snapshot(job, tier, 10), snapshot(job, tier, 20)
    assert first is not None and second is not None
    assert tier.free() is None and snapshot(job, tier, 30) is None
    second.generation.settle(second.seal)
    assert snapshot(job, tier, 30) is not None
    assert steps(tier) == [30, 10]


def test_older_of_two_makes_room_while_the_disk_refuses(
    job: JobDirectory, tier: MemoryTier
) -> None:
    for step in (10, 20):
        assert snapshot(job, tier, step) is not None
    tier.begin(30, 0, replaces=True)  # and it is cut off
    assert steps(tier) == [20]
    assert snapshot(job, tier, 30) is not None
    lock = tier.sealed()[1].generation.lock()
    with pytest.raises(TierBusy):
        tier.begin(40, 0, replaces=True)
    lock.release()
    with pytest.raises(TierBusy):
        tier.of_session("other").begin(40, 0, replaces=True)
    assert steps(tier) == [30, 20]


def test_generation_being_read_is_never_overwritten(job: JobDirectory, tier: MemoryTier) -> None:
    for step in (10, 20):
        made = snapshot(job, tier, step)
        assert made is not None
        made.generation.settle(made.seal)
    lock = tier.sealed()[1].generation.lock()
    assert snapshot(job, tier, 30) is not None
    assert steps(tier) == [30, 10]  # the older one is being read: the newer one went
    lock.release()
    assert tier.sealed()[0].settled is False


def test_a_save_that_is_cut_off_leaves_the_other_generation(
    job: JobDirectory, tier: MemoryTier
) -> None:
    assert snapshot(job, tier, 10) is not None
    generation = tier.free()
    assert generation is not None
    generation.begin()
    (generation.path / "half").write_bytes(b"half")
    assert steps(tier) == [10]
    assert snapshot(job, tier, 20) is not None
    assert steps(tier) == [20, 10]


@pytest.mark.parametrize("damage", ["shorter", "gone", "seal", "more"])
def test_one_that_is_not_whole_is_none(job: JobDirectory, tier: MemoryTier, damage: str) -> None:
    made = snapshot(job, tier, 10)
    assert made is not None
    model = made.generation.path / MODEL
    if damage == "shorter":
        model.write_bytes(b"short")
    elif damage == "gone":
        model.unlink()
    elif damage == "more":
        (model.parent / "other.safetensors").write_bytes(b"other")
    else:
        seal = made.generation.slot / "seal.json"
        seal.write_bytes(seal.read_bytes().replace(b'"step": 10', b'"step": 11'))
    assert tier.newest() is None


def test_buffers_are_used_again(job: JobDirectory, tier: MemoryTier) -> None:
    mappings = Mappings()
    inodes = []
    for step in (10, 20, 30, 40):
        made = snapshot(job, tier, step, contents=LARGE, mappings=mappings)
        assert made is not None
        made.generation.settle(made.seal)
        inodes.append((made.generation.path / MODEL).stat().st_ino)
        assert (made.generation.path / MODEL).read_bytes() == LARGE[MODEL]
    assert inodes[0] == inodes[2] and inodes[1] == inodes[3] and inodes[0] != inodes[1]


def test_a_smaller_one_leaves_nothing_of_a_larger_one(job: JobDirectory, tier: MemoryTier) -> None:
    for step, contents in ((10, LARGE), (20, LARGE), (30, {MODEL: b"small"})):
        made = snapshot(job, tier, step, contents=contents)
        assert made is not None
        made.generation.settle(made.seal)
    [newest, _] = tier.sealed()
    assert (newest.generation.path / MODEL).read_bytes() == b"small"
    assert not newest.generation.spare.exists()
    check_covers(newest.seal, 2)
    with pytest.raises(CheckpointRejected, match="2 ranks saved it, and there are 3"):
        check_covers(newest.seal, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small tmpfs")
def test_full_memory_still_notes_what_is_on_the_disk(job: JobDirectory, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        held = own(place, job)
        made = snapshot(job, held.tier, 10)
        assert made is not None and not made.settled
        with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        made.generation.settle(made.seal)
        assert made.settled
        held.release(remove=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_ring_wakes_the_supervisor(job: JobDirectory, place: Path) -> None:
    held = own(place, job)
    with pytest.raises(BlockingIOError):
        os.read(held.bell, 10)
    assert snapshot(job, MemoryTier(held.tier.root), 10) is not None
    assert os.read(held.bell, 10) == b"x"
    held.release(remove=False)
    assert snapshot(job, held.tier, 20) is not None  # no reader: no error, and no wait


FULL = """
import errno, sys
from pathlib import Path
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
mappings, place = Mappings(), Path(sys.argv[1])
try:
    file = mappings.open(place / "large", 64 << 20)
except OSError as error:
    print(errno.errorcode[error.errno])
file = mappings.open(place / "small", 1 << 20)
file.write(bytes(1 << 20))
print(file.finish()[0])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small tmpfs")
def test_a_full_memory_is_an_error_and_no_signal(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    try:
        command = [sys.executable, "-c", FULL, place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert (done.returncode, done.stdout.split()) == (0, ["ENOSPC", str(1 << 20)]), done.stderr


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 900_000),
        ({"memory.max": "max", "memory.current": "5"}, 900_000),
        ({"memory.max": "600000", "memory.current": "100000"}, 450_000),
        (
            {
                "memory.max": "600000",
                "memory.current": "500000",
                "memory.stat": "anon 1\ninactive_file 200000\n",
            },
            270_000,
        ),
        ({"memory.max": "600000", "memory.current": "700000"}, 0),
        ({"memory.max": "nonsense", "memory.current": "5"}, 900_000),
    ],
)
def test_room_is_the_tightest_limit_less_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], expected: int
) -> None:
    from elastic_ckpt.checkpoint.memory import room as memory_room

    monkeypatch.setattr(memory_room, "free_bytes", lambda place: 10_000_000)
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    write(proc / "self/mounts", f"tmpfs {tmp_path} tmpfs rw 0 0\n")
    write(proc / "meminfo", "MemTotal: 1 kB\nMemAvailable: 976 kB\n")
    write(proc / "self/cgroup", "0::/user/job\n")
    (groups / "user/job").mkdir(parents=True)
    for name, text in limits.items():
        write(groups / "user" / name, text)
    available = 976 * 1024
    found = room_bytes(tmp_path, proc, groups)
    assert found == (int(0.9 * available) if expected == 900_000 else expected)
