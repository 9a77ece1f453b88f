"""``elastic-ckpt doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import Duration, JobPath, echo_json
from elastic_ckpt.cli.doctor.bucket import check_bucket_url
from elastic_ckpt.cli.doctor.directory import (
    CheckedPath,
    check_directory,
    inspect_directory,
)
from elastic_ckpt.cli.doctor.filesystem import check_filesystem
from elastic_ckpt.cli.doctor.findings import (
    Finding,
    Group,
    StatusLine,
    collect,
    show,
    show_summary,
    show_wrong,
)
from elastic_ckpt.cli.doctor.gpus import check_gpus
from elastic_ckpt.cli.doctor.machine import check_clock, check_limits, check_network
from elastic_ckpt.cli.doctor.memory import check_memory
from elastic_ckpt.cli.doctor.platform import Grace, check_platform, find_grace, nodes
from elastic_ckpt.cli.doctor.repairs import check_leftovers
from elastic_ckpt.cli.doctor.storage import check_storage
from elastic_ckpt.cli.doctor.systemd_unit import check_unit
from elastic_ckpt.cli.doctor.versions import check_versions
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.notices.platforms import detect
from elastic_ckpt.util.gpus import auto_workers, find_gpus


@click.command("doctor")
@click.argument(
    "directory", metavar="[DIR]", envvar="ELASTIC_CKPT_DIR", type=JobPath(), required=False
)
@click.option(
    "--grace",
    metavar="DURATION",
    type=Duration(min=0),
    help="Time from a signal to the end of this node.  [default: as for run]",
)
@click.option("--python", metavar="PATH", default="", help="Check this Python, as run --python.")
@click.option("--unit", metavar="NAME", help="Also check elastic-ckpt@NAME and its job file.")
@click.option("--fix", is_flag=True, help="Repair what is safe to repair in DIR.")
@click.option("-v", "--verbose", is_flag=True, help="Print every check, also those that are ok.")
@click.option("--json", "as_json", is_flag=True, help="An array, for scripts.")
def command(
    directory: Path | BucketUrl | None,
    grace: float | None,
    python: str,
    unit: str | None,
    fix: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Check this machine, and whether DIR is suitable for checkpoints.

    \b
      elastic-ckpt doctor /data/ckpt
      elastic-ckpt doctor /data/ckpt --grace 120
      elastic-ckpt doctor --unit gpt

    Problems are printed first, then warnings, each with what to do; the rest is counted. Up to 268
    MB are written to DIR, or its nearest existing parent, for up to 5 s, and removed again; without
    DIR no storage is tested. DIR may be a SLURM job number, or the URL of a bucket, which is tried
    with one object.

    --fix removes what killed doctor commands left in DIR, and sets damaged checkpoints aside, as a
    start would. Nothing else is changed.

    Exits with 1 if there is a problem.
    """
    if fix and not isinstance(directory, Path):
        raise UsageError("--fix repairs a job directory: pass it")
    status = StatusLine()
    found: list[tuple[str, Finding]] = []
    for title, one in collect(_groups(directory, grace, python, unit, fix, status), status):
        if verbose and not as_json:
            show(title, one, begins=title not in [group for group, _ in found])
        found.append((title, one))
    findings = [one for _, one in found]
    if as_json:
        echo_json(findings)
    elif verbose:
        show_summary(findings)
    else:
        show_wrong(found)
        show_summary(findings, command_line("doctor", "-v", *[directory] * (directory is not None)))
    return 1 if any(one.state == "problem" for one in findings) else 0


def _groups(
    directory: Path | BucketUrl | None,
    given: float | None,
    python: str,
    unit: str | None,
    fix: bool,
    status: StatusLine,
) -> Iterator[Group]:
    """Yield the groups of findings; each is checked when it is iterated."""
    yield "versions", check_versions(python)
    workers = auto_workers()
    status.say("checking devices ...")
    gpus = find_gpus()
    yield "devices", check_gpus(gpus, workers, python=python)
    platforms = detect()
    status.say("checking the platform ...")
    grace = find_grace(given, platforms)
    yield "platform", check_platform(platforms, grace)
    path: CheckedPath | Finding | None = None
    if isinstance(directory, BucketUrl):
        status.say("checking the bucket ...")
        yield "checkpoints", check_bucket_url(directory, status.say)
    else:
        status.say("checking the directory ...")
        path = inspect_directory(directory)
        yield "checkpoints", _checkpoints(path, platforms, grace, fix, status)
    yield "memory", check_memory(path if isinstance(path, CheckedPath) else None)
    yield "machine", _machine(workers, bool(gpus.devices))
    if unit:
        yield "unit", check_unit(unit)


def _checkpoints(
    path: CheckedPath | Finding, platforms: list[str], grace: Grace, fix: bool, status: StatusLine
) -> Iterator[Finding]:
    if isinstance(path, Finding):
        yield path
        return
    yield from check_directory(path)
    yield from check_leftovers(path, fix=fix)
    yield check_filesystem(path.tested, platforms, nodes=nodes())
    yield from check_storage(path, grace, status.say)


def _machine(workers: int, has_gpus: bool) -> Iterator[Finding]:
    yield check_clock()
    yield from check_limits(workers, gpus=has_gpus)
    yield from check_network()
