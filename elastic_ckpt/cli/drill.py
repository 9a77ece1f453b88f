"""``elastic-ckpt drill``: rehearse a preemption."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from elastic_ckpt.checkpoint.catalog import CheckpointView, newest_of_job
from elastic_ckpt.cli.common import (
    Duration,
    directory_argument,
    echo_json,
    open_job,
    timeout_option,
)
from elastic_ckpt.cli.progress.live_line import LiveLine, live_line
from elastic_ckpt.cli.save import predicted_seconds, running_records, saved_now
from elastic_ckpt.errors import NotAnswered, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.journal.bucket_events import Mirrored
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.util.units import human_bytes, human_duration


class Drill(msgspec.Struct, frozen=True):
    """The result of a rehearsal, in seconds.

    Attributes:
        predicted_seconds: the prediction for a notice at that moment; None if unknown.
        measured_seconds: from the request until the checkpoint was where the job is: on the disk,
            or in the bucket of ``--dir URL``.
        grace_seconds: from a notice until the node goes away.
        fits: whether the measured time is within the grace.
    """

    step: int
    bytes: int
    predicted_seconds: float | None
    measured_seconds: float
    grace_seconds: float
    fits: bool


@click.command("drill")
@directory_argument
@click.option(
    "--grace",
    metavar="DURATION",
    type=Duration(min=0),
    help="Time from a notice until the node goes away.  [default: the job's own]",
)
@timeout_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(directory: Path, grace: float | None, timeout: float, as_json: bool) -> int:
    """Rehearse a preemption: does the save fit into the grace?

    \b
      elastic-ckpt drill ckpt
      elastic-ckpt drill ckpt --grace 120

    The running job saves as it would on a notice, and continues to train. The measured time lasts
    from the request until the checkpoint is on the disk, and with --dir URL in the bucket. It
    includes up to 0.5 s until the request is seen, up to 1 s from another host, which a signal does
    not need.

    Exits with 0 if it fits, 1 if it does not, 70 if no checkpoint was saved in time.
    """
    job = open_job(directory)
    with live_line("drill: waiting for the checkpoint") as line:
        found = _rehearse(job, directory, grace, timeout, line)
    if as_json:
        echo_json(found)
        return 0 if found.fits else 1
    known = found.predicted_seconds
    spare = abs(found.grace_seconds - found.measured_seconds)
    verdict = (
        f"fits, with {human_duration(spare)} to spare"
        if found.fits
        else f"does not fit, by {human_duration(spare)}: give more --grace, or save more often"
    )
    for name, value in (
        ("saved", f"step {found.step}, {human_bytes(found.bytes)}"),
        (
            "predicted",
            "unknown: no save was measured yet" if known is None else human_duration(known),
        ),
        ("measured", human_duration(found.measured_seconds)),
        ("grace", human_duration(found.grace_seconds)),
        ("verdict", verdict),
    ):
        click.echo(f"{name:9}  {value}")
    return 0 if found.fits else 1


def _rehearse(
    job: JobDirectory, directory: Path, given_grace: float | None, timeout: float, line: LiveLine
) -> Drill:
    record = next(iter(running_records(job)), None)
    if record is None:
        raise UsageError(f"no job is running in {directory}: start one with elastic-ckpt run")
    grace = record.grace if given_grace is None else given_grace
    predicted = predicted_seconds(job, record)
    before, limit = newest_of_job(job), time.monotonic() + timeout
    while True:
        began = time.monotonic()
        saved = saved_now(job, directory, timeout, line)
        if record.bucket and (before is None or saved.path != before.path):
            _wait_for_upload(job, record.bucket, saved, limit, line)
        seconds = time.monotonic() - began
        if before is None or saved.path != before.path:
            break
        # The step was already saved, so nothing was measured.
        if time.monotonic() > limit:
            raise NotAnswered(
                "the job has finished no step since its newest checkpoint: see "
                f"{command_line('status', directory)}, or wait longer with --timeout"
            )
        time.sleep(0.1)
    return Drill(
        step=saved.step,
        bytes=saved.seal.total_bytes if saved.seal else 0,
        predicted_seconds=predicted,
        measured_seconds=seconds,
        grace_seconds=grace,
        fits=seconds <= grace,
    )


def _wait_for_upload(
    job: JobDirectory, url: str, saved: CheckpointView, limit: float, line: LiveLine
) -> None:
    """Return once the bucket has a checkpoint, or a newer one; NotAnswered if that takes too long.

    The copy leaves training its pace, and keeps to --bucket-rate, which it does not on a notice.
    """
    while time.monotonic() < limit:
        steps = [one.event.step for one in read_journal(job) if isinstance(one.event, Mirrored)]
        if max((step for step in steps if step is not None), default=-1) >= saved.step:
            return
        line.wait(None)
        time.sleep(0.2)
    raise NotAnswered(
        f"step {saved.step} is on the disk, and did not get to {url} in time: see elastic-ckpt "
        "status, or wait longer with --timeout"
    )
