"""In the guest: a job on a disk whose every write is recorded, with a mark after each save.

``python -m tests.power_cuts.guest PLACE DISK LOG KIND OPTIONS FSYNC STEPS [the next ...]``
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.seal import seals
from elastic_ckpt.checkpoint.ownership.fence import Ownership, new_record
from elastic_ckpt.checkpoint.prune import prune
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import make_header, open_job
from tests.power_cuts.scene import (
    DAMAGED_AT,
    KEPT,
    MARKER,
    OVERWRITTEN,
    RANKS,
    STEPS,
    archive,
    contents,
    keeper,
    script_contents,
)

FIELDS = 7
TOOK = "recorded: "
_fsync = os.fsync


def sync_directories(fd: int) -> None:
    """Make names durable, and no file's contents."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        _fsync(fd)


FSYNCS = {"on": _fsync, "off": lambda fd: None, "directories": sync_directories}

DM_IOCTL = struct.Struct("<3I 3I i 3I Q 128s 136s")
"""What every request to the device mapper begins with; see linux/dm-ioctl.h."""

DM_TARGET_MSG = 3 << 30 | DM_IOCTL.size << 16 | 0xFD << 8 | 14

Mark = Callable[[str], None]


def main(arguments: list[str]) -> None:
    """Run the job once for each seven arguments."""
    for at in range(0, len(arguments), FIELDS):
        place, disk, log, kind, options, fsync, steps = arguments[at : at + FIELDS]
        begun = time.monotonic()
        patched = mock.patch.object(os, "fsync", FSYNCS[fsync])
        with recorded(Path(place), disk, log, kind, options) as mark, patched:
            work(Path(place), mark, STEPS[: int(steps)])
        print(
            f"{TOOK}{kind} {options}, fsync {fsync}: {time.monotonic() - begun:.1f} s", flush=True
        )


@contextlib.contextmanager
def recorded(place: Path, disk: str, log: str, kind: str, options: str) -> Iterator[Mark]:
    """Mount a disk such that all that is written to it goes to the log, too."""
    name = place.name
    sectors = int(Path(f"/sys/block/{Path(disk).name}/size").read_text())
    run("dmsetup", "--noudevsync", "create", name, "--table",
        f"0 {sectors} log-writes {disk} {log}")  # fmt: skip
    run("dmsetup", "mknodes", name)
    run("mount", "-t", kind, "-o", options, f"/dev/mapper/{name}", str(place))
    with open("/dev/mapper/control", "rb") as control:
        yield partial(put_mark, control.fileno(), name)
    run("umount", str(place))
    run("dmsetup", "--noudevsync", "remove", name)  # now the log has all of it


def put_mark(control: int, name: str, text: str) -> None:
    """Put a mark into a disk's log, as ``dmsetup message NAME 0 mark TEXT`` does, only sooner: to
    start a process takes long in a guest."""
    message = struct.pack("<Q", 0) + f"mark {text}".encode() + b"\0"
    size = DM_IOCTL.size + len(message)
    head = DM_IOCTL.pack(4, 0, 0, size, DM_IOCTL.size, 0, 0, 0, 0, 0, 0, name.encode(), b"")
    fcntl.ioctl(control, DM_TARGET_MSG, bytearray(head + message))


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def work(place: Path, mark: Mark, steps: Sequence[int]) -> None:
    """Save at every step, by the ranks and by the script; delete, damage and set aside."""
    job = open_job(place / "job")
    tier = DiskTier(job, fence=Ownership.claim(job, 1, new_record(job, "guest", "1", "", None)))
    own, clock = keeper(job, place, 1), 0.0
    own.prepare(lambda: False)
    mark("begin")
    neighbour = open(place / "neighbour", "wb")  # another program, which never syncs
    with neighbour, ProcessPoolExecutor(RANKS, get_context("fork")) as ranks:
        for step in steps:
            neighbour.write(os.urandom(150_000))
            neighbour.flush()
            script_save(job, place, step, mark)
            ref = save(job, tier, ranks, step)
            mark(f"sealed:{step}")
            clock = look(job, own, clock, mark)
            delete(job, mark)
            if step == DAMAGED_AT:
                set_aside(job, tier, ref, step, mark)
    mark("end")


def save(job: JobDirectory, tier: DiskTier, ranks: ProcessPoolExecutor, step: int) -> Ref:
    """Save as the ranks do: each writes its part, then the first one seals."""
    attempt = tier.begin(step, 1_000_000)
    header = make_header(attempt, world_size=RANKS, run=1)
    tasks = [
        ranks.submit(write_part, job.root, attempt.ref, rank, step, header if rank == 0 else None)
        for rank in range(RANKS)
    ]
    entries = [entry for task in tasks for entry in task.result(60)]
    return attempt.seal(header, entries, Retention())


def write_part(root: Path, ref: Ref, rank: int, step: int, header) -> list[FileEntry]:
    """Write one rank's part, in its process."""
    part = DiskTier(JobDirectory.at(root)).join(ref).part(rank)
    for name, data in contents(step, rank).items():
        with part.open(name, len(data)) as file:
            file.write(data)
    return part.finish(RANKS, header)


def script_save(job: JobDirectory, place: Path, step: int, mark: Mark) -> None:
    """Save as scripts do: without any sync, the oldest deleted, one file overwritten in place."""
    out = place / "out"
    out.mkdir(exist_ok=True)
    for one in seals(job):
        if not one.copied and one.step <= step - 40:
            mark(f"own-going:{one.number}")
            shutil.rmtree(one.path, ignore_errors=True)
    made = out / f"step-{step}"
    made.mkdir()
    for name, data in script_contents(step).items():
        (made / name).write_bytes(data)
    if step % 20 == 0:
        for one in [one for one in seals(job) if one.copied][1:]:  # two copies are kept
            mark(f"own-going:{one.number}")
        (place / OVERWRITTEN).write_bytes(archive(step))


def look(job: JobDirectory, own: OwnKeeper, clock: float, mark: Mark) -> float:
    """Let time pass until all is sealed that the script has written; return the time."""
    before = {one.number for one in seals(job)}
    for _ in range(3):
        clock += 30.0
        own.look(clock)
    for one in sorted(seals(job), key=lambda one: one.number):
        if one.number not in before:
            mark(f"own-sealed:{one.number}:{one.step}")
    assert not (missing := unsealed(job, own)), missing
    return clock


def unsealed(job: JobDirectory, own: OwnKeeper) -> list[str]:
    known = {Path(one.path).name for one in seals(job)}
    out = [path.parent.name for path in job.root.parent.glob(f"out/*/{MARKER}")]
    return [name for name in out if name not in known]


def delete(job: JobDirectory, mark: Mark) -> None:
    """Apply the retention rule."""
    for one in prune(job, KEPT, dry_run=True):
        if not one.keep:
            mark(f"going:{one.step}")
    prune(job, KEPT)


def set_aside(job: JobDirectory, tier: DiskTier, ref: Ref, step: int, mark: Mark) -> None:
    """Damage a checkpoint, as a bad disk does, and have it set aside."""
    mark(f"damaging:{step}")
    damaged = job.root / ref.name / "lr_scheduler"
    with open(damaged, "r+b") as file:
        file.write(b"damaged")
        file.flush()
        os.fsync(file.fileno())
    tier.reject(ref, "damaged on purpose")
    mark(f"aside:{step}")


if __name__ == "__main__":
    main(sys.argv[1:])
