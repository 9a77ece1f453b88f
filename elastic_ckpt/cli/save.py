"""``elastic-ckpt save``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from elastic_ckpt.checkpoint.catalog import CheckpointView, newest_intact
from elastic_ckpt.cli.common import directory_argument, open_job, timeout_option
from elastic_ckpt.errors import ElasticCkptError, NotAnswered, UsageError
from elastic_ckpt.jobdir.node_record import NodeRecord, job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import ask_for_save
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import TERMINAL


@click.command("save")
@directory_argument
@timeout_option
def command(directory: Path, timeout: float) -> int:
    """Have the running job save now, and wait until the disk has it.

    \b
      elastic-ckpt save ckpt
      elastic-ckpt save ckpt --timeout 60 && elastic-ckpt verify ckpt --full

    All ranks save at the same step and train on. Prints the checkpoint's path.

    Exits with 0 if it is there, with 70 if none came in time, with 64 if no job runs in DIR.
    """
    click.echo(str(saved_now(open_job(directory), directory, timeout).path))
    return 0


def saved_now(job: JobDirectory, directory: Path, timeout: float) -> CheckpointView:
    """Ask the running job for a checkpoint, and wait, bounded, until the disk has it.

    Raises:
        UsageError: no job is running.
        NotAnswered: it made none.
    """
    running = running_records(job)
    if not running:
        raise UsageError(f"no job is running in {directory}: start one with elastic-ckpt run")
    reached = max((step_of(record) for record in running), default=0)
    before = newest_intact(job)
    request = ask_for_save(job)
    limit = time.monotonic() + timeout
    try:
        while time.monotonic() < limit:
            ended = not running_records(job)  # before the look, which then sees all that it left
            newest = newest_intact(job)
            # A request that finds its step sealed already is served by that checkpoint.
            if newest and (newest.step >= reached > 0 or not before or newest.path != before.path):
                return newest
            if ended:
                raise NotAnswered(
                    "the job has ended without a new checkpoint: see elastic-ckpt status"
                )
            time.sleep(0.1)
    finally:
        request.unlink(missing_ok=True)
    raise NotAnswered(f"no new checkpoint within {timeout:.0f} s: see elastic-ckpt status")


def running_records(job: JobDirectory) -> list[NodeRecord]:
    """What the supervisors say that run now, or that are on another host and may."""
    return [
        record
        for record in job_records(job)
        if record.state not in TERMINAL and record.owner.is_alive() is not False
    ]


def step_of(record: NodeRecord) -> int:
    """The step that the job had finished when it was asked; 0 where that cannot be seen."""
    try:
        slots = Board.open(record.board, writable=False).read_slots()
    except (OSError, ValueError, ElasticCkptError):
        return 0
    return max((slot.finished for slot in slots if slot.attached), default=0)
