"""``elastic-ckpt copy``, and its two halves ``push`` and ``pull``."""

from __future__ import annotations

import click

from elastic_ckpt.checkpoint.bucket.take import is_in_step, require_step
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.cli.bucket.places import (
    BucketPlace,
    CopyPlace,
    DirectoryPlace,
    place_at,
)
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.errors import NoUsableCheckpoint, UsageError
from elastic_ckpt.util.units import human_bytes


@click.command("copy")
@click.argument("origin", metavar="FROM")
@click.argument("target", metavar="TO")
@click.argument("name", default="")
def command(origin: str, target: str, name: str) -> int:
    """Copy the newest checkpoint from one place to another.

    \b
      elastic-ckpt copy ckpt s3://bucket/job
      elastic-ckpt copy s3://bucket/job /scratch/job
      elastic-ckpt copy s3://bucket/job gs://other/job epoch-0_step-120

    FROM and TO are directories or URLs: s3://, gs:// or az:// with a prefix of the job's own;
    docs/bucket.md tells where credentials are read from. Of each named session the newest is
    copied as well, or only NAME.

    Every byte is verified on the way, and the copy counts once it is sealed; killed at any moment
    it leaves nothing that a job would load, and a repeat goes on where it was.

    Exits with 0, with 65 if there is nothing to copy or it is damaged, with 73 if a place is in
    use, holds another job or cannot be used.
    """
    return copy(place_at(origin), place_at(target, make=True), origin, name)


@click.command("push")
@click.argument("directory", metavar="DIR", envvar="ELASTIC_CKPT_DIR")
@click.argument("url")
@click.argument("name", default="")
def push_command(directory: str, url: str, name: str) -> int:
    """Copy the newest checkpoint of DIR into a bucket.

    \b
      elastic-ckpt push ckpt s3://bucket/job

    As elastic-ckpt copy DIR URL. Refused if another machine has continued the job in the bucket:
    pull that one first.
    """
    there = place_at(url, make=True)
    if not isinstance(there, BucketPlace):
        raise UsageError(f"{url!r} is no URL of a bucket: elastic-ckpt copy takes two directories")
    return copy(place_at(directory), there, directory, name)


@click.command("pull")
@click.argument("url")
@click.argument("directory", metavar="DIR", envvar="ELASTIC_CKPT_DIR")
@click.argument("name", default="")
def pull_command(url: str, directory: str, name: str) -> int:
    """Copy the newest checkpoint of a bucket into DIR.

    \b
      elastic-ckpt pull s3://bucket/job ckpt
      elastic-ckpt run --dir ckpt -- train.py

    As elastic-ckpt copy URL DIR; DIR may be new. If another machine has continued the job in the
    bucket, what DIR has beyond it is moved to .superseded.
    """
    origin = place_at(url)
    if not isinstance(origin, BucketPlace):
        raise UsageError(f"{url!r} is no URL of a bucket: elastic-ckpt copy takes two directories")
    return copy(origin, place_at(directory), url, name)


def copy(origin: CopyPlace, target: CopyPlace, shown_origin: str, name: str) -> int:
    """Copy, and print a line for each checkpoint; raises as ``command`` documents."""
    identity = origin.identity()
    if not identity:
        raise NoUsableCheckpoint(f"{shown_origin} holds no job: correct the path or the URL")
    newest = _becomes_newest(origin, target) and not name
    patience = Patience(lambda line: click.echo(f"elastic-ckpt: {line}", err=True))
    count = 0
    taken = target.taken(identity, patience, newest=newest, origin=origin)
    with progress_bar() as watch, taken as put:
        for item in origin.items(name):
            count += 1
            size = item.manifest.total_bytes
            done = "copied" if put(item, watch(f"copying {item.name}", size)) else "is there"
            click.echo(f"{done:8}  {item.name}  {human_bytes(size)}")
        if not count:
            what = f"no {name}" if name else "no intact checkpoint"
            raise NoUsableCheckpoint(
                f"{what} in {shown_origin}: elastic-ckpt list {shown_origin} shows what is there"
            )
    return 0


def _becomes_newest(origin: CopyPlace, target: CopyPlace) -> bool:
    """Return whether what is copied goes before what the target has.

    Raises:
        BucketRefused: a directory's would go before what another machine has done since.
    """
    if isinstance(origin, DirectoryPlace) and isinstance(target, BucketPlace):
        require_step(origin.job, target.store)
        return True
    if isinstance(origin, BucketPlace) and isinstance(target, DirectoryPlace):
        return not is_in_step(target.job, origin.store)
    return False
