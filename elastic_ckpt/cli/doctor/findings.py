"""The findings of ``elastic-ckpt doctor``, and how they are printed."""

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

State = Literal["ok", "warning", "problem", "untried"]
Unit = Literal["", "bytes", "bytes/s", "seconds", "count"]

_COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "red", "untried": "cyan"}
_WHAT_WIDTH: Final = 14
_TEXT_COLUMN: Final = 27
_WIDTHS: Final = range(60, 101)
_READ_SECONDS: Final = 0.1

_AMOUNT: Final = re.compile(r"(\d) ((?:[kMGT]?B(?:/s)?|s|min|h|d)\b)")
_GLUE: Final = "\0"
"""Keeps a number and its unit on one line; ``printable`` removes any other."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the output.

    Attributes:
        what: what was checked.
        text: what was found.
        todo: what to do about it; empty if ok.
        value: the number in the text, for scripts; None without one.
        unit: the unit of that number.
    """

    what: str
    state: State
    text: str
    todo: str = ""
    value: float | None = None
    unit: Unit = ""


Group = tuple[str, Iterable[Finding]]
"""A heading and its findings, which are checked when they are iterated."""


def ok(what: str, text: str, value: float | None = None, unit: Unit = "") -> Finding:
    """Return a finding that needs no action."""
    return Finding(what, "ok", text, value=value, unit=unit)


def untried(what: str, text: str) -> Finding:
    """Return that something was not checked, and how it would be."""
    return Finding(what, "untried", text)


class StatusLine:
    """The current activity, on a terminal's standard error; cleared before another line."""

    def __init__(self) -> None:
        self._is_seen = sys.stderr.isatty()
        self._next = 0.0

    def say(self, text: str) -> None:
        """Replace the text; a call too soon after the last one is ignored."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _READ_SECONDS
            self._write(printable(text)[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Clear the line."""
        self._next = 0.0
        self._write("")

    def _write(self, text: str) -> None:
        if self._is_seen:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def collect(groups: Iterable[Group], status: StatusLine) -> Iterator[tuple[str, Finding]]:
    """Yield each finding with its heading, while the status line names the current group."""
    for title, findings in groups:
        looking = iter(findings)
        while True:
            status.say(f"checking {title} ...")
            try:
                found = next(looking, None)
            finally:
                status.clear()
            if found is None:
                break
            yield title, _encodable(found)


def show(title: str, one: Finding, *, begins: bool) -> None:
    """Print a finding, after its heading if it is the first of its group."""
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


def show_wrong(found: Iterable[tuple[str, Finding]]) -> None:
    """Print the problems, then the warnings, each group of them under its heading."""
    for state in ("problem", "warning"):
        title = ""
        for group, one in found:
            if one.state == state:
                show(group, one, begins=group != title)
                title = group


def show_summary(found: Iterable[Finding], verbose: str = "") -> None:
    """Print the last lines: how many there are of each, what was not tried, and what was fixed.

    Args:
        verbose: the command that prints all lines; empty if they are printed.
    """
    found = list(found)
    states = [one.state for one in found]
    parts = [
        _styled(f"{count} {name}{'s' if count > 1 else ''}", fg=_COLOURS[name])
        for name in ("problem", "warning")
        if (count := states.count(name))
    ]
    wrong = ", ".join(parts) or _styled("no problems", fg=_COLOURS["ok"])
    passed, more = states.count("ok"), f" ({verbose} lists them)" if verbose else ""
    _echo(f"{wrong}; {passed} check{'s' if passed != 1 else ''} ok{more}")
    if verbose:
        for one in found:
            if one.state == "untried":
                _echo(f"{printable(one.what)}: {printable(one.text)}")
            elif one.text.startswith("fixed: "):
                _echo(f"{printable(one.what)}: {printable(one.text, 4000)}")


def _encodable(one: Finding) -> Finding:
    """Return the finding without characters that JSON cannot represent, from file or host names."""
    text, todo, what = (encodable(part) for part in (one.text, one.todo, one.what))
    return msgspec.structs.replace(one, what=what, text=text, todo=todo)


def _wrapped(text: str, mark: str = "") -> list[str]:
    columns = shutil.get_terminal_size().columns
    lines = textwrap.wrap(
        _AMOUNT.sub(rf"\1{_GLUE}\2", printable(text, 4000)),
        min(max(columns, _WIDTHS.start), _WIDTHS.stop - 1) - _TEXT_COLUMN,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,  # keep paths easy to copy
        break_on_hyphens=False,
    )
    return [line.replace(_GLUE, " ") for line in lines]


def _styled(text: str, *, fg: str | None = None, bold: bool | None = None) -> str:
    return click.style(text, fg=fg, bold=bold) if _has_colours() else text


def _has_colours() -> bool:
    """Whether to use colors; see https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _echo(text: str) -> None:
    click.echo(text, color=_has_colours())
