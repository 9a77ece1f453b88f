"""The page that ``status`` prints: what is wrong, then the job in six lines, or all with ``-v``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_ckpt.cli.status.details import NARROW, at_risk_text, details, tail_lines
from elastic_ckpt.cli.status.progress import ProgressView
from elastic_ckpt.cli.status.saves import InterruptionView
from elastic_ckpt.cli.status.view import NewestView, StatusView
from elastic_ckpt.cli.status.workers import silent_seconds
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_STATES: Final = {
    "running": "green", "finished": "green", "starting": "cyan", "queued": "cyan",
    "draining": "yellow", "backing-off": "yellow", "preempted": "yellow", "failed": "red",
    "dead": "red",
}  # fmt: skip
_PIPE_WIDTH: Final = 120  # for a pipe
_LABEL_WIDTH: Final = 11  # of the longest label, with the space after it
_CHANGED: Final = "step size"  # a choice, so it is no problem, but it is said in full
_FAILED: Final = ("failed", "backing-off")
_RUNNING: Final = ("starting", "running", "draining")


def make_console() -> Console:
    """Return a console of the terminal's width; for a pipe of ``COLUMNS``, or 120."""
    console = Console()
    return console if console.is_terminal else Console(width=_pipe_width())


def show(view: StatusView, console: Console, *, verbose: bool = False) -> None:
    """Print the page; to a pipe without trailing spaces."""
    shown = page(view, console.width, verbose=verbose)
    if console.is_terminal:
        console.print(shown, crop=False)
        return
    with console.capture() as captured:
        console.print(shown, crop=False)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def page(view: StatusView, width: int = 80, *, verbose: bool = False) -> RenderableType:
    """Return the page, for a terminal of this many columns."""
    parts: list[RenderableType] = []
    for one in view.problems:
        parts += [Text(f"! {one.text}", style="bold yellow"), *_commands(one.command)]
    parts.append(_head(view))
    if view.advice:
        parts += [Text(f"→ {view.advice}", style="bold"), *_commands(*view.commands)]
    return Group(*parts, *(details(view, width) if verbose else _brief(view, width)))


def _commands(*lines: str) -> list[RenderableType]:
    """Return lines that are never wrapped, so that a terminal copies each as one."""
    return [Text(f"  {one}", no_wrap=True, overflow="ignore") for one in lines if one]


def _head(view: StatusView) -> Text:
    """Return what runs, how it is, and since when."""
    colour = _STATES.get(view.state, "white")
    name = f"{view.job}/{view.session}" if view.session else view.job
    head = Text.assemble((name, "bold"), "  ", (view.state, f"bold {colour}"))
    message = view.message.removeprefix(view.state).lstrip(", ")
    return head.append("  " + ", ".join(filter(None, [message, *_size_and_age(view)])))


def _size_and_age(view: StatusView) -> Iterator[str]:
    ranks, nodes = len(view.workers), len(view.nodes)
    if ranks:
        yield f"{ranks} rank{'s'[: ranks != 1]}" + (f" on {nodes} nodes" if nodes > 1 else "")
    if view.supervisor is not None and view.state in _RUNNING:
        yield f"for {human_duration(max(0.0, time.time() - view.supervisor.since))}"


def _brief(view: StatusView, width: int) -> list[RenderableType]:
    """Return where the job is, what is saved, what a loss would cost, and what stopped it last; of
    one that failed the last lines of the rank that failed first."""
    room = max(20, width - _LABEL_WIDTH)
    parts: list[RenderableType] = []
    if view.last_failure is not None and view.state in _FAILED:
        parts += [Text(line, "dim") for line in tail_lines(view.last_failure, width)]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _facts(view, room):
        if width >= NARROW and label != _CHANGED:
            text.truncate(room, overflow="ellipsis")
        table.add_row(label, text)
    return [*parts, table]


def _facts(view: StatusView, room: int) -> Iterator[tuple[str, Text]]:
    if view.notice is not None:
        left, notice = view.notice.seconds_left, view.notice
        yield "notice", Text(f"{notice.reason} from {notice.source}, {left:.0f} s left", "yellow")
    if view.progress is not None:
        yield "progress", Text(_fitted(_progress(view, view.progress), room))
    if view.step_size:
        yield _CHANGED, Text(view.step_size, "yellow")
    if view.state not in ("unknown", "queued") or view.newest_intact is not None:
        yield "newest", Text(_fitted(_newest(view), room))
    if view.at_risk is not None:
        yield "at risk", Text(at_risk_text(view))
    last = view.last_interruption
    if last is not None and view.state in _RUNNING:
        yield "last stop", Text(_fitted(_interruption(view, last), room))


def _fitted(parts: Iterator[str], room: int) -> str:
    """Return the first part, and of the others those that fit on its line."""
    line = next(parts)
    for one in parts:
        if len(line) + len(one) <= room:
            line += one
    return line


def _progress(view: StatusView, found: ProgressView) -> Iterator[str]:
    total = f" of {found.total_steps}" if found.total_steps else ""
    share = f" ({min(1.0, found.step / found.total_steps):.0%})" if found.total_steps else ""
    silent = silent_seconds(view.workers)
    yield f"step {found.step}{total}{share}"
    if silent is not None:
        yield f", no step for {human_duration(silent)}"
    elif found.seconds_to_end is not None:
        yield f", {human_duration(found.seconds_to_end)} to the end"
    if found.steps_per_second and silent is None:
        yield f", {found.steps_per_second:.3g} steps/s"
    if view.position is not None:
        yield f", epoch {view.position.epoch}"
    for name, value in view.reported.items():
        yield f", {name} {value:.4g}"


def _newest(view: StatusView) -> Iterator[str]:
    newest, on_disk = view.newest_intact, view.newest_on_disk
    if newest is None:
        ends = "none intact: a restart would end with 65"
        yield ends if view.is_stuck else "no checkpoint: a restart would start at step 0"
        return
    age = "" if newest.age_seconds is None else f", {human_duration(newest.age_seconds)} old"
    where = "in memory" if newest.tier == "memory" else f"on {newest.tier}"
    yield f"{_name(newest)}{age}, {where}"
    if newest.tier == "memory":
        yield f"; on disk: {_name(on_disk) if on_disk else 'none'}"
        return  # size and reason would be read as those of the one on the disk
    yield f", {human_bytes(newest.bytes)}"
    yield ", verified" if newest.verified else ""
    yield f", {newest.reason}"


def _name(one: NewestView) -> str:
    return Path(one.path).name if one.reason == "script" else f"step {one.step}"


def _interruption(view: StatusView, last: InterruptionView) -> Iterator[str]:
    rank = f", rank {last.rank}" if last.rank >= 0 else ""
    kind = f" ({last.kind})" if last.kind else ""
    yield f"{human_duration(last.age_seconds)} ago: {last.cause}{rank}{kind}"
    recovery = view.last_recovery
    if last.cause == "failure" and recovery is not None:
        yield f", recovered in {recovery.total_seconds:.1f} s"
    if last.message:
        yield f": {printable(last.message)}"


def _pipe_width() -> int:
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else _PIPE_WIDTH
