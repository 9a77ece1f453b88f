"""What ``elastic-ckpt doctor`` finds, and how it looks."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Final, Literal

import click
import msgspec

from elastic_ckpt.util.text import encodable, printable

State = Literal["ok", "warning", "problem"]
Unit = Literal["", "bytes", "bytes/s", "seconds", "count"]

_COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "red"}
_WHAT_WIDTH: Final = 14
_TEXT_COLUMN: Final = 27
_WIDTHS: Final = range(60, 101)
_READ_SECONDS: Final = 0.1

_AMOUNT: Final = re.compile(r"(\d) ((?:[kMGT]?B(?:/s)?|s|min|h|d)\b)")
_GLUE: Final = "\0"
"""Keeps a number and its unit on one line; ``printable`` leaves none of its own."""


class Finding(msgspec.Struct, frozen=True):
    """One line.

    Attributes:
        what: was looked at.
        text: what was found.
        todo: what to do about it; empty if it is ok.
        value: the number that the text is about, for scripts; None if there is none.
        unit: of that number.
    """

    what: str
    state: State
    text: str
    todo: str = ""
    value: float | None = None
    unit: Unit = ""


Group = tuple[str, Iterable[Finding]]
"""What belongs together, under one heading; looked at when it is iterated over."""


def ok(what: str, text: str, value: float | None = None, unit: Unit = "") -> Finding:
    """Nothing to do."""
    return Finding(what, "ok", text, value=value, unit=unit)


class StatusLine:
    """What is being done, on a terminal's standard error; gone before another line is written."""

    def __init__(self) -> None:
        self._is_seen = sys.stderr.isatty()
        self._next = 0.0

    def say(self, text: str) -> None:
        """In place of what it said before; what comes too soon after that is left out."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _READ_SECONDS
            self._write(printable(text)[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Say nothing."""
        self._next = 0.0
        self._write("")

    def _write(self, text: str) -> None:
        if self._is_seen:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def collect(groups: Iterable[Group], status: StatusLine) -> Iterator[tuple[str, Finding]]:
    """Everything with its heading, while the status line says what is being looked at."""
    for title, findings in groups:
        looking = iter(findings)
        while True:
            status.say(f"looking at {title} ...")
            try:
                found = next(looking, None)
            finally:
                status.clear()
            if found is None:
                break
            yield title, _encodable(found)


def show(title: str, one: Finding, *, begins: bool) -> None:
    """A finding below its heading, which is shown if the group begins with it."""
    if begins:
        _echo(_styled(title, bold=True))
    what = printable(one.what)
    head = f"  {_styled(f'{one.state:<9}', fg=_COLOURS[one.state])}{what:<{_WHAT_WIDTH}}  "
    lines = [*_wrapped(one.text), *_wrapped(one.todo, "-> ")]
    if len(what) > _WHAT_WIDTH:
        _echo(head.rstrip())
        head = " " * _TEXT_COLUMN
    for line in lines:
        _echo(f"{head}{line}")
        head = " " * _TEXT_COLUMN


def show_sum(found: Iterable[Finding]) -> None:
    """The last line: how many problems and warnings there are."""
    states = [one.state for one in found]
    parts = [
        _styled(f"{count} {name}{'s' if count > 1 else ''}", fg=_COLOURS[name])
        for name in ("problem", "warning")
        if (count := states.count(name))
    ]
    _echo(", ".join(parts) or _styled("nothing is wrong", fg=_COLOURS["ok"]))


def _encodable(one: Finding) -> Finding:
    """Names of files and hosts may hold what JSON cannot."""
    text, todo, what = (encodable(part) for part in (one.text, one.todo, one.what))
    return msgspec.structs.replace(one, what=what, text=text, todo=todo)


def _wrapped(text: str, mark: str = "") -> list[str]:
    columns = shutil.get_terminal_size().columns
    lines = textwrap.wrap(
        _AMOUNT.sub(rf"\1{_GLUE}\2", printable(text, 4000)),
        min(max(columns, _WIDTHS.start), _WIDTHS.stop - 1) - _TEXT_COLUMN,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,  # a path is to be copied
        break_on_hyphens=False,
    )
    return [line.replace(_GLUE, " ") for line in lines]


def _styled(text: str, *, fg: str | None = None, bold: bool | None = None) -> str:
    return click.style(text, fg=fg, bold=bold) if _has_colours() else text


def _has_colours() -> bool:
    """https://no-color.org: any value but an empty one says no."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _echo(text: str) -> None:
    click.echo(text, color=_has_colours())
