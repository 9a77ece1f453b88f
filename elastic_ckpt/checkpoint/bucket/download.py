"""A sealed checkpoint on its way into another tier."""

from __future__ import annotations

from elastic_ckpt.checkpoint.bucket.source import Source
from elastic_ckpt.checkpoint.disk.part import part_name
from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest, header_of
from elastic_ckpt.checkpoint.tier import Tier
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Advance, ignore


def in_order(manifest: Manifest) -> list[FileEntry]:
    """Return the files in the order in which :func:`pull` reads them: rank by rank, without the
    part manifests, which are the target's own affair."""
    files = [entry for entry in manifest.files if entry.path != part_name(entry.rank)]
    return sorted(files, key=lambda entry: entry.rank)


def pull(source: Source, manifest: Manifest, target: Tier, advance: Advance = ignore) -> None:
    """Copy a checkpoint into another tier, and seal it there once every byte matches.

    Does nothing if the target holds the attempt already. Killed at any moment it leaves nothing
    that could be loaded.

    Raises:
        CheckpointRejected: a file is not what the manifest says.
        TierFull: there is no room.
        BucketFailed, BucketRefused, OSError: the source or the target failed.
    """
    if target.holds(manifest):
        return
    attempt = target.begin(manifest.step, manifest.total_bytes, manifest.attempt)
    header = header_of(manifest)
    files: list[FileEntry] = []
    try:
        for rank in range(manifest.world_size):
            part = attempt.part(rank)
            for entry in in_order(manifest):
                if entry.rank == rank:
                    with part.open(entry.path, entry.bytes) as file:
                        for data in source(entry):
                            file.write(data)
                            advance(len(data))
            files += part.finish(manifest.world_size, header if rank == 0 else None)
        attempt.seal(header, files, Retention())
    except BaseException:
        attempt.drop()
        raise
