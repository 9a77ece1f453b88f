"""What a user is advised to do after an error, kept with the exception, whatever its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

PROGRAM: Final = "elastic-ckpt"
_KEY: Final = "next_steps"


def with_marks(text: str, commands: Sequence[str]) -> tuple[str, ...]:
    """Return the lines to print: ``elastic-ckpt: next: TEXT``, then a line for each command."""
    return (f"{PROGRAM}: next: {text}", *(f"  {one}" for one in commands))


def note_next_steps(error: Exception, lines: tuple[str, ...]) -> None:
    """Keep lines with an exception; those that it has already stay."""
    error.__dict__.setdefault(_KEY, lines)


def next_steps(error: Exception) -> tuple[str, ...]:
    """Return the lines of an exception; none if it has none."""
    lines: tuple[str, ...] = error.__dict__.get(_KEY, ())
    return lines
