"""How the store grows: many checkpoints in one directory, many parts in one checkpoint.

Times each operation at a size and at half and a quarter of it, and prints the times and the
exponent of their growth between quarter and full: 1 is linear. Goal for finding the newest and for
a seal: under a second at the full size, and linear.

- *newest intact*: what a restart asks, among many sealed checkpoints.
- *status*: the same, and what lies newer or in quarantine.
- *list*: every checkpoint's manifest and sizes.
- *seal*: the leader's work in a live save, from the digests that it received.
- *newest intact, many parts*: manifest and sizes of one checkpoint of so many ranks.
- *recovery, many parts*: a killed run's complete attempt, read and hashed from its parts.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import list_checkpoints, newest_and_rejected, newest_intact
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.hashed_file import digest_file
from elastic_ckpt.checkpoint.disk.part import part_name
from elastic_ckpt.checkpoint.manifest import (
    EngineInfo,
    FileEntry,
    PartManifest,
    SealHeader,
    encode,
    make_manifest,
)
from elastic_ckpt.jobdir.paths import JobDirectory

GOALS = {"newest intact": 1.0, "seal": 1.0}
CONTENTS = b"state" * 20


def header(attempt: str, step: int, world_size: int) -> SealHeader:
    """Of a checkpoint that holds nothing of interest."""
    return SealHeader(
        job="benchmark", attempt=attempt, incarnation=1, created="", reason="interval", epoch=0,
        step=step, step_in_epoch=step, sample_start_index=step, samples_per_step=1,
        order_seed=0, dataset_fingerprint="", dataset_size=0, world_size=world_size,
        data_parallel_size=world_size, engine=EngineInfo("torch"), torch="",
    )  # fmt: skip


def write_plain(path: Path, data: bytes, rank: int) -> FileEntry:
    """A file as the store would write it, but not made durable: thousands of them take minutes."""
    path.write_bytes(data)
    return digest_file(path).entry("", rank)


def fill_parts(attempt: DiskAttempt, ranks: int) -> list[FileEntry]:
    """Two files and a part manifest for each rank."""
    entries: list[FileEntry] = []
    for rank in range(ranks):
        own: list[FileEntry] = []
        for name in (f"ranks/{rank:05d}.json", f"ranks/{rank:05d}.safetensors"):
            found = write_plain(attempt.path / name, CONTENTS, rank)
            own.append(FileEntry(name, found.bytes, found.xxh3_128, rank))
        part = PartManifest(
            attempt=attempt.identity, rank=rank, world_size=ranks, files=own,
            header=header(attempt.identity, attempt.step, ranks) if rank == 0 else None,
        )  # fmt: skip
        found = write_plain(attempt.path / part_name(rank), encode(part), rank)
        entries += [*own, FileEntry(part_name(rank), found.bytes, found.xxh3_128, rank)]
    return entries


def make_checkpoints(job: JobDirectory, count: int) -> None:
    """So many sealed checkpoints with one small file each."""
    for step in range(1, count + 1):
        path = job.checkpoint(0, step)
        (path / "modeling").mkdir(parents=True)
        found = write_plain(path / "modeling" / "state.bin", CONTENTS, 0)
        entry = FileEntry("modeling/state.bin", found.bytes, found.xxh3_128, 0)
        manifest = make_manifest(header(f"{step:016x}", step, 1), [entry])
        (path / "manifest.json").write_bytes(encode(manifest))


def seconds(act: Callable[[], object], rounds: int) -> float:
    """The median of several times."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def fresh_job(place: Path) -> JobDirectory:
    """An empty job directory."""
    job = JobDirectory.at(tempfile.mkdtemp(dir=place))
    job.prepare()
    return job


def measure_checkpoints(place: Path, count: int, rounds: int) -> dict[str, float]:
    """Seconds for each question about so many checkpoints."""
    job = fresh_job(place)
    make_checkpoints(job, count)
    newest = newest_intact(job)
    if newest is None or newest.step != count:
        raise SystemExit(f"the newest of {count} checkpoints is not {count}")
    return {
        "newest intact": seconds(lambda: newest_intact(job), rounds),
        "status": seconds(lambda: newest_and_rejected(job), rounds),
        "list": seconds(lambda: list_checkpoints(job), 1),
    }


def measure_parts(place: Path, ranks: int, rounds: int) -> dict[str, float]:
    """Seconds for sealing, finding and recovering a checkpoint of so many ranks."""
    seals, finds, recoveries = [], [], []
    for _ in range(rounds):
        job = fresh_job(place)
        attempt = DiskAttempt.begin(job, 1)
        entries = fill_parts(attempt, ranks)
        os.sync()
        sealed = header(attempt.identity, 1, ranks)
        seals.append(seconds(lambda a=attempt, h=sealed, e=entries: a.publish(h, e), 1))
        finds.append(seconds(lambda j=job: newest_intact(j), 1))
        fill_parts(DiskAttempt.begin(job, 2), ranks)
        os.sync()
        recoveries.append(seconds(lambda j=job: recover(j), 1))
        newest = newest_intact(job)
        if newest is None or newest.step != 2:
            raise SystemExit("the attempt was not recovered")
        shutil.rmtree(job.root)
    return {
        "seal": statistics.median(seals),
        "newest intact, many parts": statistics.median(finds),
        "recovery, many parts": statistics.median(recoveries),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default=".", help="on the disk that is to be measured")
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--parts", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.directory, prefix=".store-scale-"))
    try:
        for measure, full, unit in (
            (measure_checkpoints, options.checkpoints, "checkpoints"),
            (measure_parts, options.parts, "parts"),
        ):
            sizes = [full // 4, full // 2, full]
            found = [measure(place, size, options.rounds) for size in sizes]
            for name in found[-1]:
                show(name, unit, sizes, [one[name] for one in found])
    finally:
        shutil.rmtree(place)
    print(f"{os.cpu_count()} cores, python {platform.python_version()}")


def show(name: str, unit: str, sizes: list[int], times: list[float]) -> None:
    """One line: times, growth, and whether the goal is met."""
    growth = math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])
    each = ", ".join(f"{size:,}: {t:.3f} s" for size, t in zip(sizes, times, strict=True))
    goal = GOALS.get(name)
    met = "" if goal is None else f" (goal {goal:.0f} s{'' if times[-1] < goal else ', MISSED'})"
    print(f"{name:26} {each} {unit}; grows as n^{growth:.2f}{met}")


if __name__ == "__main__":
    main()
