"""``elastic-ckpt save``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from elastic_ckpt.checkpoint.catalog import CheckpointView, newest_of_job
from elastic_ckpt.cli.common import directory_argument, open_job, read_slots, timeout_option
from elastic_ckpt.cli.progress.live_line import LiveLine, live_line
from elastic_ckpt.errors import NotAnswered, UsageError
from elastic_ckpt.jobdir.node_record import NodeRecord, job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.place import moved_from
from elastic_ckpt.jobdir.prediction_file import read_predictor
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.jobdir.save_requests import ask_for_save
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.protocol.run_state import TERMINAL
from elastic_ckpt.protocol.stepless import CREATE_ONE


@click.command("save")
@directory_argument
@timeout_option
def command(directory: Path, timeout: float) -> int:
    """Save a checkpoint now, and wait until it is on the disk.

    \b
      elastic-ckpt save ckpt
      elastic-ckpt save ckpt --timeout 60 && elastic-ckpt verify ckpt --full

    All ranks save at the same step and continue to train. Prints the path of the checkpoint.

    Exits with 0 if it is saved, 70 if it was not saved in time, 64 if no job is running in DIR.
    """
    job = open_job(directory)
    with live_line("waiting for the checkpoint") as line:
        saved = saved_now(job, directory, timeout, line)
    click.echo(saved.url or str(saved.path))
    return 0


def saved_now(job: JobDirectory, directory: Path, timeout: float, line: LiveLine) -> CheckpointView:
    """Request a checkpoint, and wait for at most ``timeout`` seconds until it is on the disk; the
    line shows the wait.

    Raises:
        UsageError: no job is running.
        NotAnswered: no checkpoint was saved in time, or the script has no Session.
    """
    running, see = running_records(job), f"see {command_line('status', directory)}"
    if not running:
        raise UsageError(f"no job is running in {directory}: start one with elastic-ckpt run")
    slots = [slot for record in running for slot in read_slots(record) if slot.attached]
    reached = max((slot.shown_step for slot in slots), default=0)
    session = next((slot.session for slot in slots), "")
    before = newest_of_job(job)
    request = ask_for_save(job)
    asked = _made_at(request)
    limit, expected = time.monotonic() + timeout, predicted_seconds(job, running[0])
    try:
        while time.monotonic() < limit:
            # Read first, so that the checkpoint it may have left is seen below.
            _require_session(running_now := running_records(job))
            ended = not running_now
            newest = newest_of_job(job)
            # If its step is sealed already, that checkpoint answers the request.
            reached_it = newest and newest.session == session and newest.step >= reached > 0
            if newest and newest.own:
                # What was written before the request may be sealed only now.
                is_new = newest.own.changed >= asked and _is_newer(newest, before)
            else:
                is_new = bool(newest and (not before or newest.path != before.path))
            if newest and (reached_it or is_new):
                return newest
            if ended:
                raise NotAnswered(f"the job has ended without a new checkpoint: {see}")
            line.wait(expected, timeout)
            time.sleep(0.1)
    finally:
        request.unlink(missing_ok=True)
    raise NotAnswered(f"no new checkpoint within {timeout:.0f} s: {see}")


def predicted_seconds(job: JobDirectory, record: NodeRecord) -> float | None:
    """Return the prediction for a notice now; None before the first measured save."""
    from elastic_ckpt.supervisor.saves.forecast import seconds_to_boundary

    predictor = read_predictor(job)
    if not predictor.last_bytes:
        return None
    now = time.monotonic()
    rest = max((seconds_to_boundary(slot, now) for slot in read_slots(record)), default=0.0)
    uploads = bool(record.bucket)
    outlook = Outlook(record.grace, rest, predictor.last_bytes, uploads=uploads)
    return save_seconds(predictor, outlook)


def _require_session(running: Sequence[NodeRecord]) -> None:
    """Raise NotAnswered if the script has run for a minute without a Session."""
    if any(one.sessionless and not one.saves_itself for one in running):
        raise NotAnswered(
            "the script has created no Session, so there is nothing to save: "
            f"{CREATE_ONE} ({command_line('run', '--help')})"
        )


def _made_at(request: Path) -> int:
    """Return when a request was made, in ns, by the clock of the storage if it is still there."""
    try:
        return request.stat().st_mtime_ns
    except OSError:  # it was served at once
        return time.time_ns()


def _is_newer(newest: CheckpointView, before: CheckpointView | None) -> bool:
    """Return whether one of the script's own was sealed later, be it the same file once more."""
    known = before.own.number if before and before.own else 0
    return bool(newest.own and newest.own.number > known)


def running_records(job: JobDirectory) -> list[NodeRecord]:
    """Return the records of supervisors that run, or may run on another host."""
    return [
        record
        for record in job_records(job)
        if record.state not in TERMINAL
        and record.owner.is_alive() is not False
        and (record.owner.is_alive() is None or not moved_from(job, record))
    ]
