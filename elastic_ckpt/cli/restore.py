"""``elastic-ckpt restore``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from elastic_ckpt.checkpoint.lineage import restore
from elastic_ckpt.checkpoint.ownership.job_lock import OwnedJob, Patience
from elastic_ckpt.cli.common import directory_argument, open_job
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory


@click.command("restore")
@directory_argument
@click.argument("name")
def command(directory: Path, name: str) -> int:
    """Go back to a checkpoint: the next run continues from it.

    \b
      elastic-ckpt restore ckpt epoch-0_step-120
      elastic-ckpt restore ckpt fold0/epoch-0_step-120

    NAME is an older checkpoint in DIR, or one that was superseded; elastic-ckpt list shows both.
    What is newer, or of another branch, is moved to .superseded, from where it can be restored in
    the same way. One of a named session has the session before it: fold0/epoch-0_step-120.

    Exits with 0, with 73 while the job runs, with 65 if NAME is not intact.
    """
    job = open_job(directory)
    job.prepare()
    patience = Patience(lambda line: click.echo(f"elastic-ckpt: {line}", err=True))
    owned = OwnedJob(job, node_name(), f"restore-{os.getpid()}", "", patience)
    try:
        there, moved = restore(job, name, f"elastic-ckpt restore {name}")
        owned.ownership.rewind()
    finally:
        owned.release()
    for path in moved:
        click.echo(f"superseded  {JobDirectory.holding(path.parent).shown(path)}")
    click.echo(f"the next run continues from {JobDirectory.holding(there.parent).shown(there)}")
    return 0
