"""``elastic-ckpt nodes``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job
from elastic_ckpt.cli.status.nodes import NodeView, node_views, shown_record
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.left_out import LeftOutNode, read_left_out, remove_left_out
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.util.text import printable


@click.command("nodes")
@directory_argument
@click.option(
    "--let-in",
    metavar="NAME",
    multiple=True,
    help="Let a node in again that is left out. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(directory: Path | BucketUrl, let_in: tuple[str, ...], as_json: bool) -> int:
    """Show the nodes of the job in DIR, or let one in again.

    \b
      elastic-ckpt nodes checkpoints
      elastic-ckpt nodes checkpoints --let-in node7

    A node is left out if its own check fails, or if its workers are the first to fail several times
    in a row. One that is let in takes part at once, whatever its check says. DIR may be the number
    of a SLURM job, or the URL of a bucket. This works even if no supervisor runs.

    Exits with 64 if NAME is not left out.
    """
    if isinstance(directory, BucketUrl):
        job, found = None, _in_bucket(directory)
    else:
        job = open_job(directory)
        found = read_left_out(job)
    left_out = {one.node: one for one in found}
    unknown = [name for name in let_in if name not in left_out]
    if unknown:
        known = f"; left out: {', '.join(left_out)}" if left_out else "; no node is"
        raise UsageError(f"{printable(', '.join(unknown))} is not left out{known}")
    for name in let_in:
        one = left_out.pop(name)
        if job is None or one.url:
            _remove_in_bucket(BucketUrl.parse(one.url or str(directory)), name)
        if job is not None:
            remove_left_out(job, name)
    records = [] if job is None else job_records(job)
    record = shown_record(records)
    run = [one for one in records if record and one.run_id == record.run_id]
    nodes = node_views(record, run)
    if as_json:
        echo_json({"nodes": nodes, "left_out": list(left_out.values()), "let_in": let_in})
        return 0
    for name in let_in:
        click.echo(f"{name} is let in: it takes part from the next incarnation on")
    if not let_in:
        for line in _lines(nodes, left_out, directory):
            click.echo(line)
    return 0


def _in_bucket(url: BucketUrl) -> list[LeftOutNode]:
    from elastic_ckpt.supervisor.cluster.left_out import notes_in

    return notes_in(open_store(url))


def _remove_in_bucket(url: BucketUrl, name: str) -> None:
    from elastic_ckpt.supervisor.cluster.left_out import remove_in

    remove_in(open_store(url), name)


def _lines(
    nodes: list[NodeView], left_out: dict[str, LeftOutNode], directory: Path | BucketUrl
) -> list[str]:
    width = max((len(name) for name in [*left_out, *(one.node for one in nodes)]), default=0)
    lines = []
    for node in nodes:
        state = "gone" if node.alive is False else node.state
        leads = ", leads" if node.leads else ""
        lines.append(f"{node.node:<{width}}  {state}{leads} on {node.host}: {node.message}")
    for name, one in left_out.items():
        lines.append(f"{name:<{width}}  left out since {since(one)}: {one.why}")
        lines.append(f"  {command_line('nodes', directory, '--let-in', name)}")
    return lines or ["no node is left out, and no run on several nodes is active"]


def since(one: LeftOutNode) -> str:
    """Return when a node was left out, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.since))
