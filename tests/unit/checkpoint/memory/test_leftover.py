"""What is in memory only is never removed by itself, whatever its job's directory looks like."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.memory.leftover import (
    DRAINED_SECONDS,
    drop_drained,
    leftovers,
    remove_leftover,
)
from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.errors import LockHeld, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.memory_tiers import own, snapshot


@pytest.fixture
def held(job: JobDirectory, place: Path) -> OwnedTier:
    return own(place, job)


def grow_old(root: Path, seconds: float = DRAINED_SECONDS + 60) -> None:
    then = time.time() - seconds
    for path in (root, *root.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def test_it_is_listed_once_no_run_uses_it_and_stays_when_the_directory_is_gone(
    job: JobDirectory, place: Path, held: OwnedTier
) -> None:
    snapshot(job, held.tier, 10)
    made = snapshot(job, held.tier, 20)
    assert made is not None and leftovers([place]) == []  # its supervisor lives
    held.release(remove=False)
    shutil.rmtree(job.root)  # or unmounted: nobody can tell
    root = held.tier.root
    grow_old(root)
    assert drop_drained(place) == []
    [left] = leftovers([place, place])
    assert (left.tier, left.job, left.step) == (root, str(job.root), 20)
    assert left.bytes >= 2 * made.seal.total_bytes
    assert left.age_seconds == pytest.approx(DRAINED_SECONDS + 60, abs=30)


def test_what_the_disk_has_goes_after_an_hour_without_use(
    job: JobDirectory, place: Path, held: OwnedTier
) -> None:
    made = snapshot(job, held.tier, 10)
    assert made is not None
    made.generation.settle(made.seal)
    grow_old(held.tier.root)
    assert drop_drained(place) == []  # its supervisor lives
    held.release(remove=False)
    assert leftovers([place]) == []
    grow_old(held.tier.root, DRAINED_SECONDS - 60)
    assert drop_drained(place) == []  # its job may be about to run again
    grow_old(held.tier.root)
    assert drop_drained(place) == [held.tier.root] and list(place.iterdir()) == []


def test_one_command_removes_it(job: JobDirectory, place: Path, held: OwnedTier) -> None:
    snapshot(job, held.tier, 10)
    with pytest.raises(LockHeld, match="stop that first"):
        remove_leftover(held.tier.root)
    held.release(remove=False)
    assert remove_leftover(held.tier.root, dry_run=True).step == 10
    assert leftovers([place])
    assert remove_leftover(held.tier.root).job == str(job.root)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["ckpt", "elastic-ckpt-{uid}-link", "elastic-ckpt-{uid}-file"])
def test_nothing_but_a_tier_is_removed(place: Path, tmp_path: Path, name: str) -> None:
    root = place / name.format(uid=os.getuid())
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere/file").touch()
    if "link" in name:
        root.symlink_to(tmp_path / "elsewhere")
    elif "file" in name:
        root.touch()
    else:
        root.mkdir(mode=0o700)
    with pytest.raises(UsageError, match="not a memory tier of this user"):
        remove_leftover(root)
    assert os.path.lexists(root) and (tmp_path / "elsewhere/file").exists()


def test_generation_of_a_newer_version_is_kept(
    job: JobDirectory, place: Path, held: OwnedTier
) -> None:
    """This version cannot read it; the next run of the newer one can."""
    from elastic_ckpt.checkpoint.manifest import sign

    made = snapshot(job, held.tier, 10)
    assert made is not None
    seal = made.generation.slot / "seal.json"
    newer = sign(seal.read_bytes().replace(b'"format": 2', b'"format": 99'))
    seal.write_bytes(newer)
    for step in (20, 30, 40):
        assert (snapshot(job, held.tier, step) is None) == (step > 20)
    [other] = held.tier.sealed()
    other.generation.settle(other.seal)
    held.release(remove=False)
    grow_old(held.tier.root)
    assert drop_drained(place) == [] and seal.read_bytes() == newer
    [left] = leftovers([place])
    assert left.step is None


@pytest.mark.parametrize("kind", ["seal", "settled", "owner", "state", "slot", "names"])
def test_place_with_anything_in_it_is_listed_without_an_error(
    job: JobDirectory, place: Path, held: OwnedTier, kind: str
) -> None:
    snapshot(job, held.tier, 10)
    root = held.tier.root
    held.release(remove=False)
    if kind == "names":
        prefix = place / f"elastic-ckpt-{os.getuid()}-"
        os.mkfifo(f"{prefix}fifo")
        Path(f"{prefix}loop").symlink_to(f"{prefix}loop")
        Path(f"{prefix}\n\x1b[31m").mkdir(mode=0o700)
        Path(f"{prefix}theirs").mkdir(mode=0o777)
    elif kind == "slot":
        shutil.rmtree(root / "a")
        (root / "a").symlink_to("/")
    elif kind == "state":
        shutil.rmtree(root / "a/state")
        (root / "a/state").symlink_to("/")
    else:
        path = root / {"seal": "a/seal.json", "settled": "a/settled", "owner": "owner.json"}[kind]
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    found = leftovers([place])
    if kind in ("names", "settled", "owner"):
        assert [one.step for one in found] == [10]
    grow_old(root)
    drop_drained(place)
    assert Path("/etc/passwd").exists()
    if kind == "names":
        assert [one.seal.step for one in MemoryTier(root).sealed()] == [10]
