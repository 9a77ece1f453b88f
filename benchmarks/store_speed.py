"""What hashing costs: beside a durable write, and beside a raw read of the same files.

Everything is a ratio from one run, in which the two sides take turns, because disks and neighbours
change from minute to minute: of medians for reads, the median over pairs for writes.

- *durable write*: the store's writer, which hashes what it writes, against the same writer with
  the hash left out; both end with an fsync. Goal: at most 1.05.
- *verify, from the disk* and *from the page cache*: ``verify --full`` of a sealed checkpoint
  against reading the same files in the same order and doing nothing. Goal: at least 0.8 of the
  raw speed.
- *bytes from the disk*: what the kernel read for a verification and a load behind it, per byte of
  the checkpoint. Goal: 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.hashed_file import BLOCK_BYTES, HashedFile
from elastic_ckpt.checkpoint.manifest import EngineInfo, SealHeader
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full
from elastic_ckpt.jobdir.paths import JobDirectory

BLOCK = 64 * 1024 * 1024


class _NoDigest:
    """Stands in for the hash, so that all else stays the same."""

    def update(self, data: object) -> None:
        pass


def seconds(act: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def take_turns(rounds: int, *acts: Callable[[], float]) -> list[float]:
    """The median of each, measured one after the other and again."""
    found = [[act() for act in acts] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*found, strict=True)]


# -- writing -------------------------------------------------------------------------------------


def durable_write(path: Path, data: bytes, blocks: int, *, hashed: bool) -> float:
    """Seconds to write ``blocks`` times ``data`` and have it on the disk."""

    def write() -> None:
        file = HashedFile(path)
        if not hashed:
            file._digest = _NoDigest()
            file._helper = _Inline()
        for _ in range(blocks):
            file.write(data)
        file.sync()
        file.close()

    try:
        return seconds(write)
    finally:
        path.unlink()
        os.sync()  # what one side left must not be the other one's burden


class _Inline:
    """A helper thread that does nothing, at once."""

    def submit(self, *_: object) -> _Inline:
        return self

    def result(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def write_pair(place: Path, data: bytes, blocks: int, *, first: bool) -> tuple[float, float]:
    """Seconds hashed and not hashed, one behind the other; ``first`` says which goes first."""
    found = {
        hashed: durable_write(place / "written", data, blocks, hashed=hashed)
        for hashed in (first, not first)
    }
    return found[True], found[False]


# -- reading -------------------------------------------------------------------------------------


def make_checkpoint(root: Path, data: bytes, files: int, blocks: int) -> Path:
    """A sealed checkpoint of ``files`` files."""
    job = JobDirectory.at(root)
    job.prepare()
    attempt = DiskAttempt.begin(job, 1)
    part = attempt.part(0)
    for index in range(files):
        with part.open(f"modeling/{index:05d}.bin") as file:
            for block in range(blocks):
                file.write(block.to_bytes(8, "little") + data[8:])
    header = SealHeader(
        job="benchmark", attempt=attempt.identity, incarnation=1, created="", reason="interval",
        epoch=0, step=1, step_in_epoch=1, sample_start_index=0, samples_per_step=0,
        order_seed=None, dataset_fingerprint="", dataset_size=0, world_size=1,
        data_parallel_size=1, engine=EngineInfo("torch"), torch="",
    )  # fmt: skip
    return attempt.publish(header, part.finish(1, header))


def read_raw(checkpoint: Path) -> None:
    """Every file that the manifest lists, in its order, into one buffer."""
    buffer = bytearray(BLOCK_BYTES)
    for entry in read_manifest(checkpoint).files:
        with open(checkpoint / entry.path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(checkpoint: Path) -> None:
    """Drop the checkpoint's files from the page cache."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(checkpoint: Path, act: Callable[[Path], object]) -> float:
    """Seconds, with every byte on the disk alone."""
    forget(checkpoint)
    return seconds(lambda: act(checkpoint))


def warm(checkpoint: Path, act: Callable[[Path], object]) -> float:
    """Seconds, with every byte in the page cache."""
    return seconds(lambda: act(checkpoint))


def bytes_from_disk(checkpoint: Path) -> float:
    """Read by the kernel for a verification and a load behind it, per byte of the checkpoint."""
    forget(checkpoint)
    before = _read_bytes()
    verify_full(checkpoint)
    read_raw(checkpoint)
    return (_read_bytes() - before) / read_manifest(checkpoint).total_bytes


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default=".", help="on the disk that is to be measured")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    data = os.urandom(BLOCK)
    blocks = max(1, round(options.gigabytes * 1e9 / BLOCK))
    place = Path(tempfile.mkdtemp(dir=options.directory, prefix=".store-speed-"))
    try:
        measure(place, data, blocks, options.rounds)
    finally:
        shutil.rmtree(place)
    print(
        f"{os.cpu_count()} cores, python {platform.python_version()}, "
        f"{blocks * BLOCK / 1e9:.1f} GB, medians of {options.rounds} rounds"
    )


def measure(place: Path, data: bytes, blocks: int, rounds: int) -> None:
    """Print one line for each figure."""
    few = min(blocks, 4)  # small and often: a disk's moods last for seconds
    pairs = [write_pair(place, data, few, first=turn % 2 == 0) for turn in range(4 * rounds)]
    hashed, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    written = few * BLOCK / 1e9
    what = "durable write, seconds hashed / not hashed"
    show(what, ratio, written / hashed, written / plain, "<= 1.05")
    for files in (8, 1):
        root = place / f"job-{files}"
        checkpoint = make_checkpoint(root, data, files, max(1, blocks // files))
        measure_verify(checkpoint, files, rounds)
        shutil.rmtree(root)


def measure_verify(checkpoint: Path, files: int, rounds: int) -> None:
    """Print the figures of reading a checkpoint of so many files."""
    size = read_manifest(checkpoint).total_bytes / 1e9
    for name, how in (("disk", cold), ("page cache", warm)):
        raw, verified = take_turns(
            rounds,
            lambda: how(checkpoint, read_raw),  # noqa: B023  # called before the loop goes on
            lambda: how(checkpoint, verify_full),  # noqa: B023
        )
        what = f"verify --full, {files} file(s), from the {name}, speed / raw read's"
        show(what, raw / verified, size / verified, size / raw, ">= 0.8")
    found = bytes_from_disk(checkpoint)
    what = f"bytes from the disk for a verification and a load, {files} file(s)"
    print(f"{what:66} {found:5.2f}  (goal 1)")


def show(what: str, ratio: float, ours: float, floor: float, goal: str) -> None:
    """One line: a ratio, its goal, and both speeds."""
    print(f"{what:66} {ratio:5.2f}  (goal {goal}; {ours:.2f} and {floor:.2f} GB/s)")


if __name__ == "__main__":
    main()
