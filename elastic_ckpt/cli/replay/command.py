"""``elastic-ckpt replay``: train a part of a job again, and compare."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import psutil

from elastic_ckpt.checkpoint.bucket.source import in_directory
from elastic_ckpt.checkpoint.bucket.transfer import pull
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.ownership.fence import count_from
from elastic_ckpt.checkpoint.verify import verify_quick
from elastic_ckpt.cli.common import Duration, echo_json, open_job
from elastic_ckpt.cli.progress.live_line import LiveLine, live_line
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.cli.replay.comparison import (
    Chain,
    Difference,
    bounds_of,
    first_difference,
    read_chain,
    spacing,
)
from elastic_ckpt.errors import CheckpointRejected, NotAnswered, ReplayFailed, UsageError
from elastic_ckpt.jobdir.node_record import job_records, node_name
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.jobdir.run_command import PROGRAM, RunCommand, command_line
from elastic_ckpt.journal.audit_events import REPLAY, Audited
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

_LOOK_SECONDS: Final = 0.3
_STOP_SECONDS: Final = 20.0
_MAX_NAMES_BYTES: Final = 16 * 1024 * 1024


class Replay(msgspec.Struct, frozen=True):
    """The result of a replay.

    Attributes:
        first, last: the steps after the first one up to the last were compared.
        digests: how many, of all ranks.
        different: where the first difference is; None for none.
        bounds: why values were compared in place of bits; empty if bits were.
        seconds: from the start of the training until its end.
    """

    checkpoint: str
    first: int
    last: int
    ranks: int
    digests: int
    different: Difference | None
    bounds: str
    seconds: float


@click.command("replay")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "last",
    metavar="STEP",
    type=click.IntRange(min=1),
    help="Compare up to this step.  [default: the last one with digests]",
)
@click.option(
    "--scratch",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Train below this directory, with room for the checkpoint.  [default: the system's]",
)
@click.option("--keep", is_flag=True, help="Leave the scratch directory, with its logs.")
@click.option(
    "--timeout",
    metavar="DURATION",
    default="1h",
    show_default=True,
    type=Duration(min=1),
    help="How long to wait for a digest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: Path,
    last: int | None,
    scratch: Path | None,
    keep: bool,
    timeout: float,
    as_json: bool,
) -> int:
    """Train a part of the job again, and compare every digest.

    \b
      elastic-ckpt run --dir ckpt --digests 50 -- train.py    # notes digests
      elastic-ckpt replay ckpt/epoch-0_step-1000 --to 1200

    The job's command runs in a scratch directory, from a copy of CHECKPOINT, with as many workers
    as wrote it, all on this machine. The job itself may run meanwhile. Its journal notes the
    result, which status and the report show.

    Bits are compared where the same processor or GPU and the same torch compute; else the norm of
    the parameters and the loss, within bounds.

    Exits with 0 if all is equal, 1 if a step differs, 70 if the training failed.
    """
    job, manifest = _sealed(checkpoint)
    recorded = read_chain(read_journal(job), manifest.step, manifest.world_size)
    recorded = {at: one for at, one in recorded.items() if last is None or at[0] <= last}
    if not recorded:
        raise UsageError(
            f"{job.root} has no digests after step {manifest.step}: pass an older checkpoint, or "
            "run the job with --digests STEPS and replay what it trains from then on"
        )
    with _scratch(scratch, keep=keep) as place:
        found = _replay(job, checkpoint, manifest, recorded, place, timeout)
    Journal(job, node_name()).write(
        Audited(
            first=found.first,
            last=found.last,
            ranks=found.ranks,
            different="" if found.different is None else printable(str(found.different), 300),
            at=0 if found.different is None else found.different.step,
            bounds=found.bounds,
        )
    )
    if as_json:
        echo_json(found)
    else:
        _show(found)
    return 0 if found.different is None else 1


def _show(found: Replay) -> None:
    steps = f"steps {found.first + 1} to {found.last}, {found.ranks} ranks, {found.digests} digests"
    if found.different is not None:
        click.echo(f"different at {found.different}")
        click.echo(f"compared {steps}")
    elif found.bounds:
        click.echo(f"equal within bounds: {steps}")
    else:
        click.echo(f"equal to the bit: {steps}")
    if found.bounds:
        click.echo(f"bits cannot be compared: {found.bounds}")


def _sealed(checkpoint: Path) -> tuple[JobDirectory, Manifest]:
    root = checkpoint.absolute().parent
    if checkpoint_key(checkpoint.name) is None:
        raise UsageError(
            f"{checkpoint} is not a checkpoint: pass one that {command_line('list', root)} shows, "
            f"as in {command_line('replay', root / 'epoch-0_step-100')}"
        )
    job = open_job(root)
    if job.name:
        raise UsageError(f"{root} belongs to a named session, which cannot be replayed alone")
    try:
        return job, verify_quick(checkpoint)
    except CheckpointRejected as error:
        raise CheckpointRejected(f"{checkpoint}: {error}") from None


def _replay(
    job: JobDirectory,
    checkpoint: Path,
    manifest: Manifest,
    recorded: Chain,
    place: Path,
    timeout: float,
) -> Replay:
    command = _command(job)
    copy = JobDirectory(place / "job")
    copy.prepare()
    with progress_bar() as watch:
        advance = watch(f"copying {checkpoint.name}", manifest.total_bytes)
        pull(in_directory(checkpoint), manifest, DiskTier(copy), advance)  # verifies every byte
    count_from(copy, manifest.run)
    given = _given(command)
    argv = _arguments(given, copy, manifest.world_size, spacing(recorded))
    began = time.monotonic()
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, cwd=command.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | given["env"] | {REPLAY: "1"},
        )  # fmt: skip
    try:
        with live_line("replay: training again") as line:
            now = _until_compared(process, copy, manifest, recorded, place, timeout, line)
    finally:
        _stop(process)
    names = {rank: _names(copy, rank) for rank in range(manifest.world_size)}
    last = max(step for step, _ in now) if now else manifest.step
    return Replay(
        str(checkpoint), manifest.step, last, manifest.world_size,
        len(recorded.keys() & now.keys()), first_difference(recorded, now, names),
        bounds_of(recorded, now), time.monotonic() - began,
    )  # fmt: skip


def _command(job: JobDirectory) -> RunCommand:
    """Return how the job was started, and say it: what a directory says is run here. UsageError if
    it does not say so, or another user's directory does."""
    if os.lstat(job.control).st_uid != os.geteuid():
        raise UsageError(f"{job.root} belongs to another user, whose command is not run here")
    found = next((one.command for one in job_records(job) if one.command), None)
    if found is None or "run" not in found.argv:
        raise UsageError(f"{job.root} does not say how the job was started")
    click.echo(f"training again, in a scratch directory: {found.line()}", err=True)
    return found


def _given(command: RunCommand) -> dict[str, Any]:
    """Return the options of the job's command."""
    from elastic_ckpt.cli.run.command import parse

    with _working_in(command.directory):  # paths are seen from there
        return parse(command.argv[command.argv.index("run") + 1 :])


def _arguments(given: Mapping[str, Any], copy: JobDirectory, ranks: int, every: int) -> list[str]:
    """Return the command of the replay: of the job's own options those that training depends on."""
    options: dict[str, object] = {
        "--dir": copy.root, "--nproc": ranks, "--digests": every, "--memory-dir": "off",
        "--max-failures": 0, "--save-interval": "86400s", "--global-batch": given["global_batch"],
        "--preload": given["preload"], "--python": given["python"],
    }  # fmt: skip
    shown = [str(word) for name, one in options.items() if one is not None for word in (name, one)]
    script = ["-m", given["module"]] if given["module"] else ["--", str(given["script"])]
    return [sys.executable, "-m", "elastic_ckpt", "run", *shown, *script, *given["args"]]


@contextlib.contextmanager
def _working_in(directory: str) -> Iterator[None]:
    here = os.getcwd()
    try:
        os.chdir(directory)
    except OSError as error:
        raise UsageError(f"the job was started in {directory}: {error.strerror}") from None
    try:
        yield
    finally:
        os.chdir(here)


def _until_compared(
    process: subprocess.Popen[bytes],
    copy: JobDirectory,
    manifest: Manifest,
    recorded: Chain,
    place: Path,
    timeout: float,
    line: LiveLine,
) -> Chain:
    """Return the replay's digests, once there are all of them, or one is different."""
    now: Chain = {}
    limit = time.monotonic() + timeout
    while True:
        ended = process.poll() is not None
        found = read_chain(read_journal(copy), manifest.step, manifest.world_size)
        if len(found) > len(now):
            limit = time.monotonic() + timeout
        now = found
        line.show(len(recorded.keys() & now.keys()), len(recorded))
        if recorded.keys() <= now.keys() or first_difference(recorded, now, {}) is not None:
            return now
        if ended:
            raise ReplayFailed(
                f"the training of the replay ended before step {max(recorded)[0]}: "
                f"{_last_words(place / 'log')}"
            )
        if time.monotonic() > limit:
            raise NotAnswered(
                f"no digest after step {max(now, default=(manifest.step,))[0]} for {timeout:.0f} s:"
                " give it longer with --timeout, or look with --keep"
            )
        time.sleep(_LOOK_SECONDS)


def _last_words(log: Path) -> str:
    """Return what a run said before the advice for its user."""
    said = log.read_text(errors="replace").partition(f"\n{PROGRAM}: next: ")[0]
    return printable(" / ".join(said.strip().splitlines()[-3:]), 600)


def _names(copy: JobDirectory, rank: int) -> list[str]:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        data = read_bounded(copy.control / "digests" / f"{rank:05d}.json", _MAX_NAMES_BYTES)
        return msgspec.json.decode(data, type=list[str])
    return []


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the replay's processes: what it has saved is not needed."""
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            with contextlib.suppress(psutil.Error):
                one.kill()
    process.wait(_STOP_SECONDS)


@contextlib.contextmanager
def _scratch(below: Path | None, *, keep: bool) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="elastic-ckpt-replay-", dir=below))
    try:
        yield place
    finally:
        if keep:
            click.echo(f"kept: {place}", err=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
