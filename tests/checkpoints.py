"""Checkpoints and attempts for tests, made as a job makes them, without torch.

Also the bounds that such tests need: a call that must not hang on a FIFO, and a lock that
another process holds.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Expired
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import msgspec

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.hashed_file import digest_file
from elastic_ckpt.checkpoint.manifest import (
    EngineInfo,
    FileEntry,
    Manifest,
    SealHeader,
    decode_manifest,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory

T = TypeVar("T")

_COARSE = 5
"""CLOCK_REALTIME_COARSE: the time that files get; Python has no name for it."""

MODEL = "modeling/model.safetensors"
FILES: dict[str, bytes] = {
    MODEL: b"model" * 100,
    "optimizer/state.safetensors": b"moments" * 100,
    "lr_scheduler": b"gamma",
    "running_states.json": b'{"epoch":0,"step":10,"sample_start_index":80}',
}
"""What rank 0 writes by default; each rank adds ``ranks/<rank>.json``."""

HOLDER = """
import sys
from pathlib import Path
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock

lock = HeldLock(Path(sys.argv[1]), "other-run")
print("held", flush=True)
sys.stdin.read()
"""

READER = """
import sys
from pathlib import Path
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock

lock = ReadLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def open_job(root: Path) -> JobDirectory:
    """Prepare a job directory."""
    job = JobDirectory.at(root)
    job.prepare()
    return job


def make_header(
    attempt: DiskAttempt, *, epoch: int = 0, world_size: int = 2, **changes: Any
) -> Any:
    """Return rank 0's header of a checkpoint; ``changes`` replace single fields."""
    header = SealHeader(
        job="tested",
        attempt=attempt.identity,
        incarnation=1,
        created="2026-01-02T03:04:05Z",
        reason="interval",
        epoch=epoch,
        step=attempt.step,
        step_in_epoch=attempt.step,
        sample_start_index=8 * attempt.step,
        samples_per_step=8,
        order_seed=5,
        dataset_fingerprint="numbers",
        dataset_size=203,
        world_size=world_size,
        data_parallel_size=world_size,
        engine=EngineInfo("torch"),
        torch="2.9",
    )
    return msgspec.structs.replace(header, **changes)


def fill(
    attempt: DiskAttempt,
    header: SealHeader,
    *,
    contents: Mapping[str, bytes] = FILES,
    ranks: Iterable[int] | None = None,
) -> list[FileEntry]:
    """Write the files and the part manifests of ``ranks``, by default of all of them."""
    found: list[FileEntry] = []
    for rank in range(header.world_size) if ranks is None else ranks:
        own = {f"ranks/{rank:05d}.json": b'{"rank":%d}' % rank}
        if rank == 0:
            own.update(contents)
        part = attempt.part(rank)
        for name in sorted(own):
            part.write(name, own[name])
        found += part.finish(header.world_size, header if rank == 0 else None)
    return found


def make_attempt(
    job: JobDirectory,
    step: int = 10,
    *,
    epoch: int = 0,
    world_size: int = 2,
    contents: Mapping[str, bytes] = FILES,
    ranks: Iterable[int] | None = None,
    **changes: Any,
) -> DiskAttempt:
    """Make an unsealed attempt with all its parts, or only those of ``ranks``."""
    attempt = DiskAttempt.begin(job, step)
    header = make_header(attempt, epoch=epoch, world_size=world_size, **changes)
    fill(attempt, header, contents=contents, ranks=ranks)
    return attempt


def make_checkpoint(
    job: JobDirectory,
    step: int = 10,
    *,
    epoch: int = 0,
    world_size: int = 2,
    contents: Mapping[str, bytes] = FILES,
    durable: bool = False,
    one_host: bool = True,
    **changes: Any,
) -> Path:
    """Make a sealed checkpoint; not ``durable``, because few tests are about power cuts."""
    unsynced = mock.patch.object(os, "fsync", lambda fd: None)
    with contextlib.nullcontext() if durable else unsynced:
        attempt = DiskAttempt.begin(job, step, one_host=one_host)
        header = make_header(attempt, epoch=epoch, world_size=world_size, **changes)
        return attempt.publish(header, fill(attempt, header, contents=contents))


def seal_in_place(attempt: DiskAttempt, *, epoch: int = 0) -> None:
    """Put the seal into an attempt and stop there, as a kill before the rename leaves it."""
    entries = fill(attempt, make_header(attempt, epoch=epoch))
    manifest = make_manifest(make_header(attempt, epoch=epoch), entries)
    (attempt.path / MANIFEST_NAME).write_bytes(encode(manifest))


def change_manifest(checkpoint: Path, **changes: Any) -> Manifest:
    """Rewrite single fields of a seal; the fingerprint stays what it was unless given."""
    manifest = msgspec.structs.replace(read_manifest(checkpoint), **changes)
    (checkpoint / MANIFEST_NAME).write_bytes(encode(manifest))
    return manifest


def flip_bit(path: Path) -> None:
    """Change one bit and keep the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tick() -> None:
    """Wait until the kernel gives files a later time than at the call."""
    before = time.clock_gettime(_COARSE)
    limit = time.monotonic() + 10
    while time.clock_gettime(_COARSE) == before and time.monotonic() < limit:
        time.sleep(0.001)


def tree(root: Path) -> dict[str, bytes | str]:
    """Map each path below a directory to its contents, ``dir``, or ``-> target``."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "dir"
        else:
            found[name] = path.read_bytes()
    return found


def bounded(call: Callable[[], T], fifo: Path, seconds: float = 60.0) -> T:
    """Return the result of a call that must not wait for a FIFO's other end.

    If it does wait, the FIFO is fed until the call returns, so that no thread stays.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            return future.result(seconds)
        except Expired:
            while not future.done():
                with contextlib.suppress(OSError):
                    os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))
                time.sleep(0.01)
            raise AssertionError(f"the call waited for the other end of {fifo.name}") from None


def held_elsewhere(path: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Hold a lock in another process until the block ends or the test kills it."""
    return _holding(HOLDER, path)


def read_locked_elsewhere(
    checkpoint: Path,
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Keep a checkpoint open in another process, as :func:`held_elsewhere`."""
    return _holding(READER, checkpoint)


@contextlib.contextmanager
def _holding(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def seal_again(checkpoint: Path) -> None:
    """Seal changed files as an attacker with write access would: sizes, digests, fingerprint."""
    old = decode_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    files = [
        digest_file(checkpoint / entry.path).entry(entry.path, entry.rank)
        for entry in old.files
        if (checkpoint / entry.path).exists()
    ]
    (checkpoint / MANIFEST_NAME).write_bytes(encode(make_manifest(old, files)))
