"""``elastic-ckpt status``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from elastic_ckpt.cli.common import directory_argument, human_age, open_job
from elastic_ckpt.cli.save_view import EmergencySaveView
from elastic_ckpt.cli.status_view import StatusView, WorkerView, gather
from elastic_ckpt.core.duration import human_duration
from elastic_ckpt.core.progress import human_bytes
from elastic_ckpt.core.text import printable, shown_json
from elastic_ckpt.errors import UsageError
from elastic_ckpt.store.records import FailureRecord, RecoveryRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLOURS = {
    "running": "green", "finished": "green", "starting": "cyan", "draining": "yellow",
    "backing-off": "yellow", "preempted": "yellow", "failed": "red", "dead": "red",
}  # fmt: skip


_TAIL_LINES = 6  # of what a rank printed before it failed; elastic-ckpt logs has the rest


@click.command("status")
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="One object, for scripts.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
def command(directory: Path, as_json: bool, watch: bool) -> int:
    """How is the job in DIR: state, ranks, newest valid checkpoint, what was lost.

    \b
    Exits with 0 if it runs well or has finished, 1 if it is degraded or preempted and waiting
    to be run again, 2 if it is dead.
    """
    if as_json and watch:
        raise UsageError("--json shows one moment, --watch is for people: choose one")
    job = open_job(directory)
    if as_json:
        view = gather(job)
        click.echo(shown_json(msgspec.json.encode(view)))
        return view.exit_code
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not watch:
        view = gather(job)
        console.print(_page(view))
        return view.exit_code
    view = gather(job)
    try:
        with Live(_page(view), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1.0)
                view = gather(job)
                live.update(_page(view), refresh=True)
    except KeyboardInterrupt:
        return view.exit_code


def _page(view: StatusView) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = _COLOURS.get(view.state, "white")
    head = Text.assemble((view.job, "bold"), "  ", (view.state, f"bold {colour}"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(view):
        facts.add_row(name, Text(value))  # a reason is text, not mark-up
    parts: list[RenderableType] = [head]
    if view.message != view.state:
        parts.append(Text(view.message))
    parts.append(facts)
    if view.nodes:
        parts.append(_nodes(view))
    if view.workers:
        parts.append(_workers(view))
    return Group(*parts)


def _facts(view: StatusView) -> list[tuple[str, str]]:
    """Label and text of each line; a script of the docs prints the same."""
    facts: list[tuple[str, str]] = []
    if view.notice is not None:
        notice = view.notice
        facts.append(
            ("notice", f"{notice.reason} from {notice.source}, {notice.seconds_left:.0f} s left")
        )
    if view.position is not None:
        place = view.position
        facts.append(
            ("position", f"step {place.step}, epoch {place.epoch}, "
                         f"sample {place.sample_start_index}")
        )  # fmt: skip
    facts.append(("newest valid", _newest(view)))
    for bad in view.rejected[:5]:
        facts.append(("rejected", f"{printable(Path(bad.path).name)}: {bad.reason}"))
    if view.last_save is not None:
        save = view.last_save
        how = f"FAILED: {save.error}" if save.error else f"{save.actual_seconds:.2f} s"
        facts.append(("last save", f"{save.reason}, {how}"))
    if view.last_failure is not None:
        facts.append(("last failure", _failure(view.last_failure)))
    if view.last_recovery is not None:
        facts.append(("last recovery", _recovery(view.last_recovery)))
    if view.last_emergency_save is not None:
        facts.append(("last emergency save", _emergency(view.last_emergency_save)))
    if view.save_interval is not None:
        facts.append(("save interval", view.save_interval.why))
    restarts = view.restarts
    facts.append(
        ("restarts", f"{restarts.failures} after failures ({restarts.failures_left} left), "
                     f"{restarts.preemptions} after preemptions")
    )  # fmt: skip
    if view.goodput is not None:
        facts.append(
            ("goodput", f"{view.goodput:.0%}, {view.lost_work_seconds:.1f} s of work lost")
        )
    if view.supervisor is not None:
        watch = view.supervisor
        alive = {True: "alive", False: "gone", None: "on another host"}[watch.alive]
        facts.append(("supervisor", f"pid {watch.pid} on {watch.host}, {alive}"))
    return facts


def _failure(last: FailureRecord) -> str:
    """What it was, and the end of what the rank printed: there stands why."""
    who = f"rank {last.rank}, " if last.rank >= 0 else ""
    ago = human_age(max(0.0, time.time() - last.wall))
    lines = [f"{who}{last.kind}, {ago} ago: {last.message}"]
    return "\n".join(lines + [f"  {line}" for line in last.tail[-_TAIL_LINES:]])


def _recovery(last: RecoveryRecord) -> str:
    stages = ", ".join(
        f"{name.replace('_', ' ')} {seconds:.2f}"
        for name, seconds in last.stages.items()
        if seconds
    )
    return f"{last.total_seconds:.1f} s: {stages}; from step {last.step} ({last.tier})"


def _emergency(save: EmergencySaveView) -> str:
    known = save.predicted_seconds
    predicted = "not predicted" if known is None else f"predicted {human_duration(known)}"
    return f"{predicted}, took {human_duration(save.actual_seconds)}"


def _own_work(worker: WorkerView) -> str:
    """``80 of 120 ms``: the rest it waits for the others; and whether they wait for it."""
    if worker.step_seconds is None or worker.busy_seconds is None:
        return "-"
    times = f"{1000 * worker.busy_seconds:.0f} of {1000 * worker.step_seconds:.0f} ms"
    return times if worker.slow is None else f"{times}, SLOW: {worker.slow:.1f} x the others'"


def _newest(view: StatusView) -> str:
    newest = view.newest_valid
    if newest is None:
        return "none: a restart would begin at step 0"
    return (
        f"step {newest.step} ({newest.reason}, {newest.tier}, {human_bytes(newest.bytes)}, "
        f"{human_age(newest.age_seconds)} old)"
    )


def _nodes(view: StatusView) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "host", "state", "what it does"):
        table.add_column(title, overflow="fold")
    for node in view.nodes:
        name = f"{node.node} (leads)" if node.leads else node.node
        state = "gone" if node.alive is False else node.state
        table.add_row(name, node.host, state, node.message)
    return table


def _workers(view: StatusView) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = {worker.node for worker in view.workers}
    several = len(names) > 1
    if several:
        table.add_column("node")
    for title in ("rank", "pid", "phase", "step", "last beat", "memory", "cpu", "own work"):
        justify: Literal["left", "right"] = "left" if title == "phase" else "right"
        table.add_column(title, justify=justify, overflow="fold")
    for worker in view.workers:
        beat = worker.last_beat_seconds
        cpu = worker.cpu_percent
        table.add_row(
            *([worker.node] if several else []),
            str(worker.rank),
            str(worker.pid),
            worker.phase,
            str(worker.step),
            "-" if beat is None else f"{beat:.1f} s",
            human_bytes(worker.rss_bytes),
            "-" if cpu is None else f"{cpu:.0f} %",
            _own_work(worker),
        )
    return table
