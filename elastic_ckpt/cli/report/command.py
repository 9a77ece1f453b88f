"""``elastic-ckpt report``."""

from __future__ import annotations

import contextlib
import gc
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, open_job
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.util.files import write_atomic

if TYPE_CHECKING:
    from elastic_ckpt.cli.report.material import Material


@click.command("report")
@directory_argument
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="File to write or replace; - for standard output.  [default: report.html; - with --json]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures of the page as JSON.")
def command(directory: Path | BucketUrl, output: str | None, as_json: bool) -> int:
    """Write the history of the job in DIR as one page of HTML.

    \b
      elastic-ckpt report checkpoints
      elastic-ckpt report checkpoints -o /var/www/html/gpt.html
      elastic-ckpt report 4711 --output - | gzip > report.html.gz
      elastic-ckpt report checkpoints --json | jq .goodput
      elastic-ckpt report s3://bucket/job

    It answers what was lost and why, whether the job is safe now, whether its checkpoints were
    good, and what the disturbances cost; then it shows all that happened. The page needs no network
    and contains no script. Of a bucket it shows what the runs copied there with each upload.
    """
    job = None if isinstance(directory, BucketUrl) else open_job(directory)
    if output is None:
        output = "-" if as_json else "report.html"
    if output != "-":
        _check(Path(output))  # before the work
    from elastic_ckpt.cli.report.material import collect

    with uncollected():
        material = _from_bucket(directory) if job is None else collect(job)
        page = _json(material) if as_json else _page(material)
    if output == "-":
        click.echo(page)
        return 0
    try:
        write_atomic(Path(output), f"{page}\n".encode())
    except OSError as error:
        raise _unusable(Path(output), error) from None
    click.echo(f"wrote {Path(output).resolve()}")
    return 0


def _page(material: Material) -> str:
    from elastic_ckpt.cli.report.page import render

    return render(material)


def _json(material: Material) -> str:
    import msgspec

    from elastic_ckpt.cli.report.figures import figures
    from elastic_ckpt.util.text import shown_json

    return shown_json(msgspec.json.encode(figures(material)))


def _from_bucket(url: Path | BucketUrl) -> Material:
    from elastic_ckpt.cli.bucket.history import collect_bucket
    from elastic_ckpt.cli.report.material import collect

    return collect_bucket(BucketUrl.parse(str(url)), collect)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection: a long journal is a million objects without cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check(path: Path) -> None:
    """Raise DirectoryUnusable for anything but a regular file, which would be replaced."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise DirectoryUnusable(f"{path} is not a regular file: give another path with -o")


def _unusable(path: Path, error: OSError) -> DirectoryUnusable:
    return DirectoryUnusable(
        f"cannot write {path}: {error.strerror or error}; give another path with -o"
    )
