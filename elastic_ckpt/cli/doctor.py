"""``elastic-ckpt doctor``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click
import msgspec

from elastic_ckpt.cli.findings import Finding, ok, show
from elastic_ckpt.cli.unit_findings import check_unit
from elastic_ckpt.cli.version_findings import check_versions
from elastic_ckpt.core.progress import human_bytes
from elastic_ckpt.core.text import shown_json
from elastic_ckpt.notices.platforms import detect

_SMALL_BYTES = 64 * 2**20  # what Docker gives a container


@click.command("doctor")
@click.option("--unit", metavar="NAME", help="Look at elastic-ckpt@NAME and its job file, too.")
@click.option("--json", "as_json", is_flag=True, help="An array, for scripts.")
def command(unit: str | None, as_json: bool) -> int:
    """Is this machine set up right?

    \b
      elastic-ckpt doctor
      elastic-ckpt doctor --unit gpt

    Each line is ok, a warning or a problem, with what to do. Exits with 1 if there is a problem.
    """
    findings = [*_machine(), *(check_unit(unit) if unit else ())]
    if as_json:
        click.echo(shown_json(msgspec.json.encode(findings)))
    else:
        show(findings)
    return 1 if any(one.state == "problem" for one in findings) else 0


def _machine() -> Iterator[Finding]:
    yield from check_versions()
    yield _memory()
    found = detect()
    yield ok("notices", f"signals{''.join(f', {name}' for name in found)}")


def _memory() -> Finding:
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        todo = "mount a tmpfs there, or run with --memory-dir off"
        return Finding("/dev/shm", "warning", f"cannot be used: {error.strerror}", todo)
    free = found.f_bavail * found.f_frsize
    if free <= _SMALL_BYTES:
        todo = "it takes twice a checkpoint; in Docker give --shm-size"
        return Finding("/dev/shm", "warning", f"{human_bytes(free)} free", todo)
    return ok("/dev/shm", f"{human_bytes(free)} free: checkpoints of half of it fit in memory")
