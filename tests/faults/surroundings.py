"""Disturbances of what is around a job: its disk, memory, output, lock, names, and its user."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.lineage import superseded
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.faults.disturbances import end_all, full_disk, term_supervisor
from tests.faults.wild import WildJob
from tests.job import environment

FAR_STEPS = 150
"""A superseded checkpoint older than this takes too long to train on from."""


def nothing_reads_the_output(job: WildJob, dice: random.Random) -> None:
    """Stop the reader of a chatty job, which trains on and may get a notice; or the reader goes."""
    before = job.view().incarnation
    job.chatty.touch()
    job.pager.stop()
    try:
        job.until_step(job.step() + dice.choice((3, 60)))
        assert job.view().incarnation == before
        has_notice, has_gone = dice.random() < 0.4, dice.random() < 0.3
        if has_gone:
            job.new_pager()
            job.until_step(job.step() + 5)
        if has_notice or has_gone:
            began = time.monotonic()
            term_supervisor(job, dice)
            assert time.monotonic() - began < 20.0
            job.until_training()
    finally:
        job.chatty.unlink()
        job.pager.go_on()


def lock_lost(job: WildJob, dice: random.Random) -> None:
    """Remove what says that the job is owned; of two runs one ends with 73, before it seals."""
    control = job.directory / ".elastic-ckpt"
    lost = ("lock", "lock.owner", "runs", "locks")
    for name in dice.sample(lost, dice.choice((1, 1, 2, 4))):
        path = control / name
        for one in path.iterdir() if path.is_dir() else [path]:
            one.unlink(missing_ok=True)
    first, other = job.process, job.another_run()
    try:
        limit = time.monotonic() + 60
        while first.poll() is None and other.process.poll() is None:
            assert time.monotonic() < limit, "two runs train in one directory"
            time.sleep(0.05)
        if other.process.poll() is not None:
            assert other.process.returncode == 73, other.output()
        else:
            assert first.returncode == 73, job.output()
            job.process, other.process = other.process, None
            term_supervisor(job, dice)  # the next run takes over what the first had in memory
    finally:
        if other.process is not None and other.process.poll() is None:
            other.process.kill()
            other.process.wait(30)


def memory_full(job: WildJob, dice: random.Random) -> None:
    """Fill the memory tier's file system; the job saves to the disk meanwhile."""
    filler = job.memory / "filler"
    before = job.view().incarnation
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(dice.choice((512, 65536))))
    try:
        job.until_step(job.step() + dice.choice((2, 30)))
        assert job.view().incarnation == before
        act = dice.choice(("nothing", "kill", "notice"))
        if act == "kill":
            job.note_kept()
            dice.choice(job.workers()).send_signal(signal.SIGKILL)
            job.until(lambda view: view.incarnation > before, "the next incarnation")
            job.until_training()
        elif act == "notice":
            term_supervisor(job, dice)
            job.until_training()
    finally:
        filler.unlink()


def rank_leaves_with_0(job: WildJob, dice: random.Random) -> None:
    """Have one rank leave in the midst, which is a failure; or all, which is an end with a save."""
    before = job.view()
    how = dice.choice(("os._exit", "os._exit", "sys.exit"))
    rank = dice.choice((0, 1)) if how == "os._exit" else dice.choice((0, 1, -1))
    at = before.position.step + 12
    job.note_kept()
    new = job.leave.with_name("leave.new")
    new.write_text(f"{at} {rank} {how}")
    new.rename(job.leave)
    if rank >= 0:
        job.until(lambda view: view.incarnation > before.incarnation, "the next incarnation")
        record = job.record()
        assert record.last_failure is not None and record.last_failure.rank == rank, record
        return
    assert job.wait() == 0, job.output()
    job.leave.unlink()
    assert job.newest_sealed() == at, (job.newest_sealed(), at, job.output())
    job.start()


def disk_away_and_back(job: WildJob, dice: random.Random) -> None:
    """Unmount the job's directory, or mount another one over it, for a while."""
    assert job.place is not None
    before = job.view()
    act = dice.choice(("train", "train", "kill", "notice"))
    job.place.take_disk_away(dice)
    try:
        job.until_step(before.position.step + dice.choice((1, 10, 40)))
        assert job.view().incarnation == before.incarnation
        if act == "kill":
            job.note_kept()
            dice.choice(job.workers()).send_signal(signal.SIGKILL)
            job.until(lambda view: view.incarnation > before.incarnation, "the next incarnation")
            if dice.random() < 0.5:
                job.until_training()
        elif act == "notice":
            job.process.send_signal(signal.SIGTERM)
            # A rerun on the empty mount point would begin anew, if there was a checkpoint.
            code = job.wait()
            assert code == 73 or (code == 76 and not before.newest_intact), job.output()
            assert job.newest_sealed() >= before.position.step, job.output()  # in memory
    finally:
        job.place.bring_disk_back()
    if act == "notice":
        job.start()


def host_renamed(job: WildJob, dice: random.Random) -> None:
    """Have the next run find another host name, as in a pod; what is in memory is not lost."""
    end_all(job) if dice.random() < 0.6 else end(job)
    job.hosts += 1
    name = f"pod-{job.hosts}"
    if dice.random() < 0.5 and can_name_hosts():
        job.prefix = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        job.start()
    else:
        job.start("--node-name", name)


def rewind(job: WildJob, dice: random.Random) -> None:
    """Go back to an older checkpoint, or to one of another branch, between two runs."""
    end_all(job) if dice.random() < 0.5 else end(job)
    directory = JobDirectory(job.directory.resolve())
    newest = job.newest_sealed()
    there = scan(directory) + [Path(one.path) for one in superseded(directory)]
    near = [path for path in there if step_of(path) > newest - FAR_STEPS]
    if not near:
        job.start()
        return
    chosen = dice.choice(near)
    attempt = read_manifest(chosen).attempt
    if dice.random() < 0.5 and attempt not in job.gone_back_to:
        job.gone_back_to.add(attempt)
        job.start("--from", chosen.name)
    else:
        command = [sys.executable, "-m", "elastic_ckpt", "restore", str(job.directory), chosen.name]
        subprocess.run(command, check=True, env=environment(), capture_output=True)
        job.start()
    job.kept, job.rewound_to = 0, step_of(chosen)


def end(job: WildJob) -> None:
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint, in place or superseded."""
    return int(checkpoint.name.split("-")[2])


def can_name_hosts() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--uts", "true"]).returncode == 0


AROUND = [nothing_reads_the_output, lock_lost, rank_leaves_with_0, host_renamed, rewind]
ON_MOUNTS = [full_disk, memory_full, disk_away_and_back]
