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
from elastic_ckpt.cli.doctor.findings import Finding, Group, StatusLine, collect, show, show_summary
from elastic_ckpt.cli.doctor.gpus import check_gpus
from elastic_ckpt.cli.doctor.machine import check_clock, check_limits, check_network
from elastic_ckpt.cli.doctor.memory import check_memory
from elastic_ckpt.cli.doctor.platform import Grace, check_platform, find_grace, nodes
from elastic_ckpt.cli.doctor.storage import check_storage
from elastic_ckpt.cli.doctor.systemd_unit import check_unit
from elastic_ckpt.cli.doctor.versions import check_versions
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
@click.option("--unit", metavar="NAME", help="Also check elastic-ckpt@NAME and its job file.")
@click.option("--json", "as_json", is_flag=True, help="An array, for scripts.")
def command(
    directory: Path | BucketUrl | None, grace: float | None, unit: str | None, as_json: bool
) -> int:
    """Check this machine, and whether DIR is suitable for checkpoints.

    \b
      elastic-ckpt doctor /data/ckpt
      elastic-ckpt doctor /data/ckpt --grace 120
      elastic-ckpt doctor --unit gpt

    Each line is ok, a warning or a problem, with what to do. Up to 268 MB are written to DIR, or
    its nearest existing parent, for up to 5 s, and removed again; without DIR no storage is
    tested. DIR may be a SLURM job number, or the URL of a bucket, which is tried with one object.

    Exits with 1 if there is a problem.
    """
    status = StatusLine()
    found: list[Finding] = []
    titles: list[str] = []
    for title, one in collect(_groups(directory, grace, unit, status), status):
        if not as_json:
            show(title, one, begins=title not in titles)
        titles.append(title)
        found.append(one)
    if as_json:
        echo_json(found)
    else:
        show_summary(found)
    return 1 if any(one.state == "problem" for one in found) else 0


def _groups(
    directory: Path | BucketUrl | None, given: float | None, unit: str | None, status: StatusLine
) -> Iterator[Group]:
    """Yield the groups of findings; each is checked when it is iterated."""
    yield "versions", check_versions()
    workers = auto_workers()
    status.say("checking devices ...")
    gpus = find_gpus()
    yield "devices", check_gpus(gpus, workers)
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
        yield "checkpoints", _checkpoints(path, platforms, grace, status)
    yield "memory", check_memory(path if isinstance(path, CheckedPath) else None)
    yield "machine", _machine(workers, bool(gpus.devices))
    if unit:
        yield "unit", check_unit(unit)


def _checkpoints(
    path: CheckedPath | Finding, platforms: list[str], grace: Grace, status: StatusLine
) -> Iterator[Finding]:
    if isinstance(path, Finding):
        yield path
        return
    yield from check_directory(path)
    yield check_filesystem(path.tested, platforms, nodes=nodes())
    yield from check_storage(path, grace, status.say)


def _machine(workers: int, has_gpus: bool) -> Iterator[Finding]:
    yield check_clock()
    yield from check_limits(workers, gpus=has_gpus)
    yield from check_network()
