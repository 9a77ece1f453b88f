"""Checkpoints on their way into a bucket and out of it."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.source import in_bucket, in_directory
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.transfer import in_order, pull, push
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.tier import Tier
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full
from elastic_ckpt.errors import BucketFailed, CheckpointRejected, RunSuperseded
from tests.buckets import Hooked, claim, failing, memory_store
from tests.checkpoints import FILES, MODEL, flip_bit, make_checkpoint, open_job, tree
from tests.memory_tiers import own

LARGE = {**FILES, MODEL: secrets.token_bytes(21_000_000)}
"""More than one request, and no whole number of them."""


def bring(store: Bucket, seal: SealKey, manifest: Manifest, target: Tier) -> None:
    with in_bucket(store, seal, in_order(manifest)) as source:
        pull(source, manifest, target)


def test_what_comes_out_is_what_went_in_to_the_byte(tmp_path: Path) -> None:
    """Manifest and part manifests, too."""
    source, target = open_job(tmp_path / "a"), open_job(tmp_path / "b")
    checkpoint = make_checkpoint(source, 10, contents=LARGE)
    owner = claim(memory_store())
    told: list[int] = []
    seal = push(owner, in_directory(checkpoint), read_manifest(checkpoint), told.append)
    assert sum(told) == read_manifest(checkpoint).total_bytes
    assert catalog.newest(owner.store) == seal
    pulled = catalog.read_seal(owner.store, seal)
    assert pulled == read_manifest(checkpoint)
    bring(owner.store, seal, pulled, DiskTier(target))
    assert tree(target.checkpoint(0, 10)) == tree(checkpoint)
    verify_full(target.checkpoint(0, 10))


def test_straight_into_memory(tmp_path: Path) -> None:
    """A generation there has the bytes, without a disk between."""
    checkpoint = make_checkpoint(open_job(tmp_path / "a"), 10, contents=LARGE)
    owner = claim(memory_store())
    seal = push(owner, in_directory(checkpoint), read_manifest(checkpoint))
    job = open_job(tmp_path / "b")
    owned = own(tmp_path, job)
    try:
        bring(owner.store, seal, read_manifest(checkpoint), owned.tier)
        found = owned.tier.newest()
        assert found is not None
        reading = owned.tier.open(found.ref)
        assert (reading.path / MODEL).read_bytes() == LARGE[MODEL]
        reading.close()
    finally:
        owned.release(remove=True)


def test_a_repeat_sends_only_what_is_missing(tmp_path: Path) -> None:
    """An upload that was cut off goes on where it was."""
    checkpoint = make_checkpoint(open_job(tmp_path), 10, contents=LARGE)
    manifest = read_manifest(checkpoint)
    store = Hooked(memory_store())
    owner = claim(store)
    store.before = failing("put", f"{SealKey.of(manifest, owner.number).data}optimizer")
    with pytest.raises(BucketFailed):
        push(owner, in_directory(checkpoint), manifest)
    assert catalog.newest(store) is None
    store.before = lambda *_: None
    store.asked.clear()
    told: list[int] = []
    push(owner, in_directory(checkpoint), manifest, told.append)
    assert sum(told) == manifest.total_bytes
    assert "upload" not in store.asked
    assert catalog.newest(store) is not None


@pytest.mark.parametrize("name", [MODEL, "lr_scheduler"])
def test_damage_on_the_disk_is_not_sealed_in_the_bucket(tmp_path: Path, name: str) -> None:
    """The damaged object is not even there: a repeat does not take it for sent."""
    checkpoint = make_checkpoint(open_job(tmp_path), 10, contents=LARGE)
    flip_bit(checkpoint / name)
    manifest = read_manifest(checkpoint)
    owner = claim(memory_store())
    with pytest.raises(CheckpointRejected, match=f"{name} does not match"):
        push(owner, in_directory(checkpoint), manifest)
    assert catalog.newest(owner.store) is None
    data = SealKey.of(manifest, owner.number).data
    there = [one.key for page in owner.store.listing(data) for one in page]
    assert data + name not in there


@pytest.mark.parametrize("way", ["changed", "shorter", "longer", "missing"])
def test_damage_in_the_bucket_is_not_sealed_on_the_disk(tmp_path: Path, way: str) -> None:
    """Nothing is left that a job could load."""
    source, target = open_job(tmp_path / "a"), open_job(tmp_path / "b")
    checkpoint = make_checkpoint(source, 10, contents=LARGE)
    owner = claim(memory_store())
    seal = push(owner, in_directory(checkpoint), read_manifest(checkpoint))
    key, data = seal.data + MODEL, bytearray(LARGE[MODEL])
    if way == "missing":
        owner.store.delete([key])
    else:
        data[9_000_000] ^= way == "changed"
        owner.store.put(
            key, bytes(data[:-1] if way == "shorter" else data + b"x" * (way == "longer"))
        )
    if way == "longer":  # what the manifest names is all there
        bring(owner.store, seal, read_manifest(checkpoint), DiskTier(target))
        verify_full(target.checkpoint(0, 10))
        return
    with pytest.raises(CheckpointRejected, match="model"):
        bring(owner.store, seal, read_manifest(checkpoint), DiskTier(target))
    assert not target.checkpoint(0, 10).exists()
    assert not list(target.attempts.iterdir())


def test_an_owner_that_was_taken_over_does_not_call_its_seal_saved(tmp_path: Path) -> None:
    """Whether the next one came before the seal or after it; the next one's is the newest."""
    job = open_job(tmp_path)
    store = Hooked(memory_store())
    first = claim(store)
    paths = [make_checkpoint(job, step) for step in (10, 20, 30, 40)]
    push(first, in_directory(paths[0]), read_manifest(paths[0]))
    second = None

    def take_over(name: str, key: str) -> None:
        nonlocal second
        if second is None and name == "put_new" and key.startswith("seals/"):
            second = claim(store)

    store.before = take_over
    with pytest.raises(RunSuperseded):
        push(first, in_directory(paths[3]), read_manifest(paths[3]))
    assert second is not None
    with pytest.raises(RunSuperseded):
        push(first, in_directory(paths[2]), read_manifest(paths[2]))
    push(second, in_directory(paths[1]), read_manifest(paths[1]))
    newest = catalog.newest(store)
    assert newest is not None and (newest.claim, newest.step) == (second.number, 20)
    rows = {one.seal.step: one.superseded for one in catalog.listed(store)}
    assert rows == {20: False, 40: True, 10: False}
