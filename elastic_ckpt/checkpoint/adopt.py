"""A checkpoint that plain ColossalAI wrote: looked over, and sealed where it is.

What can be checked without its digests: that everything its indexes speak of is there, that no
save was not interrupted, and that each archive of tensors passes its own checksums.
Nothing is unpickled.
"""

from __future__ import annotations

import os
import secrets
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.archive import check_archive
from elastic_ckpt.checkpoint.colossalai_layout import RunningStates, read_index, read_running_states
from elastic_ckpt.checkpoint.disk.part import DiskPart, part_name
from elastic_ckpt.checkpoint.manifest import (
    ORDER_VERSION,
    EngineInfo,
    Manifest,
    SealHeader,
    decode_manifest,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME
from elastic_ckpt.errors import CheckpointRejected, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.util.files import (
    files_below,
    remove_temporaries,
    sync_directory,
    sync_tree,
    write_atomic,
)
from elastic_ckpt.util.progress import Watch
from elastic_ckpt.util.text import printable

_PARTS: Final = "parts"
_INTERRUPTED: Final = "tmp_index_files"
"""ColossalAI's pipeline stages meet there, and remove it when they have."""


def adopt(job: JobDirectory, path: Path, ranks: int | None, watch: Watch) -> Manifest:
    """Check a checkpoint and seal it. By the holder of the job's lock; may be repeated.

    Args:
        ranks: data-parallel ranks that wrote it; its ``sample_start_index`` counts for each.
        watch: shows how far the reading is.

    Raises:
        CheckpointRejected: it is incomplete, or not what its name says.
        UsageError: ``ranks`` is missing where it matters.
        OSError: it cannot be read, or written to.
    """
    for directory in (path, path / _PARTS):
        remove_temporaries(directory)  # of an adoption that was killed
    ours = (part_name(0), MANIFEST_NAME)  # of such an adoption, too
    files = [name for name in files_below(path) if name not in ours]
    running = _check(path, files)
    if running.sample_start_index and not ranks:
        raise UsageError(
            f"its sample_start_index {running.sample_start_index} counts for each rank: give the "
            "number of ranks that saw different data with --data-parallel-size"
        )
    total = sum(os.lstat(path / name).st_size for name in files)
    advance = watch(f"reading {path.name}", total)
    for name in files:
        advance(check_archive(path, name))
    header = _header(job, running, ranks or 1)
    (path / _PARTS).mkdir(exist_ok=True)
    part = DiskPart(path, header.attempt, 0)
    for name in files:
        part.claim(name)
    data = encode(make_manifest(header, part.finish(1, header)))
    manifest = decode_manifest(data)  # do not seal what cannot be read
    sync_tree(path)
    write_atomic(path / MANIFEST_NAME, data)
    sync_directory(path.parent)
    return manifest


def _check(path: Path, files: list[str]) -> RunningStates:
    running = read_running_states(path)
    if checkpoint_key(path.name) != (running.epoch, running.step):
        raise CheckpointRejected(
            f"running_states.json is of epoch {running.epoch}, step {running.step}: the name says "
            "otherwise, so two saves may have gone there"
        )
    if any(_INTERRUPTED in name.split("/") for name in files):
        raise CheckpointRejected(f"it holds {_INTERRUPTED}: its save was interrupted")
    for part in ("modeling", "optimizer"):
        if part == "optimizer" and not (path / part).is_dir():
            continue  # a script may train without one, or not save it
        indexes = [name for name in files if fnmatchcase(name, f"{part}/*.index.json")]
        if not indexes:
            raise CheckpointRejected(f"{part}/ has no index: was it saved with shard=True?")
        for index in indexes:
            _check_index(path / index, files, part)
    return running


def _check_index(index: Path, files: list[str], part: str) -> None:
    names = read_index(index).files
    if not names:
        raise CheckpointRejected(f"{part}/{index.name} speaks of no file")
    for name in sorted(set(names)):
        if f"{part}/{name}" not in files:
            raise CheckpointRejected(f"{part}/{printable(name)} is missing: its index speaks of it")


def _header(job: JobDirectory, running: RunningStates, ranks: int) -> SealHeader:
    return SealHeader(
        job=job.root.name,
        attempt=secrets.token_hex(8),
        incarnation=0,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        reason="manual",
        epoch=running.epoch,
        step=running.step,
        step_in_epoch=running.step,
        sample_start_index=running.sample_start_index * ranks,
        samples_per_step=0,
        order_seed=None,
        order_version=ORDER_VERSION,
        dataset_fingerprint="",
        dataset_size=0,
        world_size=1,
        data_parallel_size=ranks,
        engine=EngineInfo("colossalai"),
        torch="",
    )
