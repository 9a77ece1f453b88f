"""``elastic-ckpt adopt``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from elastic_ckpt.checkpoint.adopt import adopt
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, verify_full
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.util.units import human_bytes


@click.command("adopt")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--data-parallel-size",
    "ranks",
    metavar="RANKS",
    type=click.IntRange(min=1),
    help="Ranks that saw different data when it was written: its sample_start_index counts for "
    "each of them.",
)
def command(path: Path, ranks: int | None) -> int:
    """Seal a checkpoint that plain ColossalAI wrote.

    \b
      elastic-ckpt adopt ckpt/epoch-0_step-120 --data-parallel-size 4

    What can be checked of it is checked before. PATH is an epoch-N_step-M directory; the
    directory that it is in becomes the job's. Afterwards run, verify and all other commands take
    it for one of their own.

    Exits with 0 if it is sealed now, with 65 if it is incomplete.
    """
    if checkpoint_key(path.name) is None or path.is_symlink() or not path.is_dir():
        raise UsageError(
            f"{path} is not an epoch-N_step-M directory, as ColossalAI's scripts write them"
        )
    place = path.parent.resolve() / path.name
    job = JobDirectory.at(place.parent)
    job.prepare()
    lock = HeldLock(job.lock, run_id=f"adopt-{os.getpid()}")
    try:
        with progress_bar() as watch:
            if os.path.lexists(place / MANIFEST_NAME):
                verify_full(place)
                click.echo(f"{place.name}: sealed already, every byte hashed")
                return 0
            manifest = adopt(job, place, ranks, watch)
    finally:
        lock.release()
    click.echo(
        f"{place.name}: sealed, {len(manifest.files)} files, {human_bytes(manifest.total_bytes)}, "
        f"{manifest.sample_start_index} samples of epoch {manifest.epoch} used"
    )
    return 0
