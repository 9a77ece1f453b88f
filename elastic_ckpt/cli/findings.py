"""What ``elastic-ckpt doctor`` finds, and how it looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import click
import msgspec

State = Literal["ok", "warning", "problem"]

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


class Finding(msgspec.Struct, frozen=True):
    """One line.

    Attributes:
        what: was looked at.
        text: what was found.
        todo: what to do about it; empty if it is ok.
    """

    what: str
    state: State
    text: str
    todo: str = ""


def ok(what: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(what, "ok", text)


def show(findings: Iterable[Finding]) -> None:
    """A line each, and a second one for what to do."""
    for one in findings:
        state = click.style(f"{one.state:<8}", fg=_COLOURS[one.state])
        click.echo(f"{state} {one.what}: {one.text}")
        if one.todo:
            click.echo(f"{'':8} -> {one.todo}")
