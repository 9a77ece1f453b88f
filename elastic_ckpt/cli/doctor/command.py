"""``elastic-ckpt doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import msgspec

from elastic_ckpt.cli.doctor.directory import (
    Place,
    check_directory,
    check_filesystem,
    look_at,
    named,
)
from elastic_ckpt.cli.doctor.findings import Finding, Group, StatusLine, collect, show, show_sum
from elastic_ckpt.cli.doctor.gpus import check_gpus
from elastic_ckpt.cli.doctor.machine import check_clock, check_limits, check_network
from elastic_ckpt.cli.doctor.memory import check_memory
from elastic_ckpt.cli.doctor.platform import Grace, check_platform, find_grace, nodes
from elastic_ckpt.cli.doctor.storage import check_storage
from elastic_ckpt.cli.doctor.systemd_unit import check_unit
from elastic_ckpt.cli.doctor.versions import check_versions
from elastic_ckpt.cli.gpus import auto_workers, find_gpus
from elastic_ckpt.notices.platforms import detect
from elastic_ckpt.util.text import shown_json


class _Unasked(click.Path):
    """A path that is not looked at: on a storage that is dead not even that would return."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As it was typed."""
        return value


@click.command("doctor")
@click.argument(
    "directory",
    metavar="[DIR]",
    envvar="ELASTIC_CKPT_DIR",
    type=_Unasked(file_okay=False),
    required=False,
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="Time between a notice and the end of the machine.  [default: as run has it]",
)
@click.option("--unit", metavar="NAME", help="Look at elastic-ckpt@NAME and its job file, too.")
@click.option("--json", "as_json", is_flag=True, help="An array, for scripts.")
def command(directory: str | None, grace: float | None, unit: str | None, as_json: bool) -> int:
    """Is this machine set up right, and is DIR good for checkpoints?

    \b
      elastic-ckpt doctor /data/ckpt
      elastic-ckpt doctor /data/ckpt --grace 120
      elastic-ckpt doctor --unit gpt

    Each line is ok, a warning or a problem, with what to do. In DIR, or above it while it is not
    there, up to 268 MB are written for up to 5 s, and removed again; without DIR no storage is
    tried. DIR may be the number of a SLURM job.

    Exits with 1 if there is a problem.
    """
    status = StatusLine()
    found: list[Finding] = []
    titles: list[str] = []
    for title, one in collect(_groups(named(directory), grace, unit, status), status):
        if not as_json:
            show(title, one, begins=title not in titles)
        titles.append(title)
        found.append(one)
    if as_json:
        click.echo(shown_json(msgspec.json.encode(found)))
    else:
        show_sum(found)
    return 1 if any(one.state == "problem" for one in found) else 0


def _groups(
    directory: str | None, given: float | None, unit: str | None, status: StatusLine
) -> Iterator[Group]:
    """All there is to look at, each looked at in its turn."""
    yield "versions", check_versions()
    workers = auto_workers()
    status.say("looking at devices ...")
    gpus = find_gpus()
    yield "devices", check_gpus(gpus, workers)
    platforms = detect()
    status.say("looking at the platform ...")
    grace = find_grace(given, platforms)
    yield "platform", check_platform(platforms, grace)
    status.say("looking at the directory ...")
    place = look_at(directory)
    yield "checkpoints", _checkpoints(place, platforms, grace, status)
    yield "memory", check_memory(place if isinstance(place, Place) else None)
    yield "machine", _machine(workers, bool(gpus.devices))
    if unit:
        yield "unit", check_unit(unit)


def _checkpoints(
    place: Place | Finding, platforms: list[str], grace: Grace, status: StatusLine
) -> Iterator[Finding]:
    if isinstance(place, Finding):
        yield place
        return
    yield from check_directory(place)
    yield check_filesystem(place.tried, platforms, nodes=nodes())
    yield from check_storage(place, grace, status.say)


def _machine(workers: int, has_gpus: bool) -> Iterator[Finding]:
    yield check_clock()
    yield from check_limits(workers, gpus=has_gpus)
    yield from check_network()
