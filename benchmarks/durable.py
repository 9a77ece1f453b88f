"""How long a checkpoint takes from memory to the disk, with its hash.

A sealed generation of two ranks' files lies in the memory tier. In turns: the floor, which writes
the same files' bytes from the same pages past the page cache and syncs each; our drain, which also
hashes them and seals; and our save straight to the disk from the same pages.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from harness import Options, Places, Report, goal, places, ratios, read_options, summary

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import EngineInfo, SealHeader
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.memory.generation import Generation, Sealed
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
from elastic_ckpt.checkpoint.memory.part import MemoryPart
from elastic_ckpt.checkpoint.memory.seal import make_memory_seal
from elastic_ckpt.jobdir.paths import JobDirectory

CHUNK_BYTES = 16 * 1024 * 1024
PAGE_BYTES = 4096
WORLD_SIZE = 2
FLOOR = "O_DIRECT write + fsync, the floor"
DRAIN = "drain of the memory tier, with hash"
DIRECT = "save straight to the disk, with hash"


def header(step: int) -> SealHeader:
    """A seal's header of which nothing but its identity matters."""
    return SealHeader(
        job="benchmark", attempt=secrets.token_hex(8), incarnation=1, created="",
        reason="interval", epoch=0, step=step, step_in_epoch=step, sample_start_index=0,
        samples_per_step=0, order_seed=None, dataset_fingerprint="", dataset_size=0,
        world_size=WORLD_SIZE, data_parallel_size=WORLD_SIZE, engine=EngineInfo("torch"), torch="",
    )  # fmt: skip


def fill(owned: OwnedTier, megabytes: float) -> Sealed:
    """A generation as the torch engine lays it out: a third of it the model."""
    block = os.urandom(1024 * 1024)
    generation = owned.tier.free()
    assert generation is not None
    generation.begin()
    files = []
    for rank in range(WORLD_SIZE):
        part = MemoryPart(generation, rank, Mappings())
        for folder, share in (("modeling", 1), ("optimizer", 2)):
            size = int(megabytes * 1e6 / WORLD_SIZE * share / 3)
            with part.open(f"{folder}/{rank:05d}.safetensors", size) as file:
                for at in range(0, size, len(block)):
                    file.write(block[: size - at])
        part.write(f"ranks/{rank:05d}.json", b"{}")
        files += part.finish(WORLD_SIZE, None)
    generation.close(make_memory_seal(header(1), files))
    return owned.tier.sealed()[0]


def write_raw_files(source: Path, files: Mapping[str, int], target: Path) -> None:
    """The floor: files of these sizes, from pages in memory past the page cache, each synced."""
    for name, size in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        read = os.open(source / name, os.O_RDONLY)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
            for offset in range(0, size, CHUNK_BYTES):
                length = min(CHUNK_BYTES, size - offset)
                with closing(mmap.mmap(read, length, prot=mmap.PROT_READ, offset=offset)) as window:
                    _write_window(fd, window, length)
            os.fsync(fd)
        finally:
            os.close(fd)
            os.close(read)


def _write_window(fd: int, window: mmap.mmap, length: int) -> None:
    whole = length // PAGE_BYTES * PAGE_BYTES
    with memoryview(window) as view:
        at = 0
        while at < whole:
            at += os.write(fd, view[at:whole])
        if at < length:  # the last page is not whole
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            os.write(fd, view[at:length])


def save_straight(job: JobDirectory, sealed: Sealed, step: int) -> None:
    """What a save without a memory tier does with the same bytes."""
    attempt = DiskAttempt.begin(job, step)
    head = header(step)
    files = []
    for rank in range(WORLD_SIZE):
        part = attempt.part(rank)
        for entry in sealed.seal.files:
            if entry.rank == rank:
                _copy(sealed.generation, entry.path, entry.bytes, part)
        files += part.finish(WORLD_SIZE, head if rank == 0 else None)
    attempt.publish(head, files)


def _copy(generation: Generation, path: str, size: int, part: DiskPart) -> None:
    with open(generation.path / path, "rb") as source, part.open(path, size) as target:
        for offset in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - offset)
            with closing(
                mmap.mmap(source.fileno(), length, prot=mmap.PROT_READ, offset=offset)
            ) as window:
                target.write(window)


def measure(options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each pass; everything that was written is gone again."""
    job = JobDirectory(where.disk / "job")
    job.root.mkdir()
    job.prepare()
    owned = OwnedTier(where.memory, job, "benchmark")
    raw = where.disk / "raw"
    try:
        sealed = fill(owned, options.megabytes)
        files = {entry.path: entry.bytes for entry in sealed.seal.files}
        acts: dict[str, Callable[[], object]] = {
            FLOOR: lambda: write_raw_files(sealed.generation.path, files, raw),
            DRAIN: lambda: sum(drain(sealed, DiskTier(job))),
            DIRECT: lambda: save_straight(job, sealed, 2),
        }
        found: dict[str, list[float]] = {name: [] for name in acts}
        for turn in range(options.repeats + 1):
            for name, act in acts.items():
                os.sync()  # what one left must not be the next one's burden
                began = time.perf_counter()
                act()
                if turn:
                    found[name].append(time.perf_counter() - began)
                for path in (raw, *job.root.glob("epoch-*")):
                    shutil.rmtree(path, ignore_errors=True)
        return found
    finally:
        owned.release(remove=True)


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, repeats=9)
    with places(options.directory) as where:
        found = measure(options, where)
    title = f"Durable write, {options.megabytes:.0f} MB in the files of 2 ranks"
    report = Report("durable", title, {"megabytes": options.megabytes})
    report.rows = [summary(name, values, found[FLOOR]) for name, values in found.items()]
    what = "durable write with hash (drain) / raw O_DIRECT write + fsync"
    report.goals.append(goal(what, ratios(found[DRAIN], found[FLOOR]), 1.15))
    report.show(options)


if __name__ == "__main__":
    main()
