"""Priorities of lines in systemd's journal: ``<3>`` before a line that goes there, else nothing.

https://www.freedesktop.org/software/systemd/man/sd-daemon.html
"""

from __future__ import annotations

import functools
import os
from enum import IntEnum


class Priority(IntEnum):
    """The priority of a line, as in syslog; ``journalctl -p warning`` shows up to 4."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


class Line(str):
    """A line for the user that has a priority; any other string has ``INFO``."""

    priority: Priority

    def __new__(cls, text: str, priority: Priority) -> Line:
        """Return the text with its priority."""
        made = super().__new__(cls, text)
        made.priority = priority
        return made


def warning(text: str) -> Line:
    """Return a line about something that the user may have to fix."""
    return Line(text, Priority.WARNING)


def priority_of(line: str) -> Priority:
    """Return a line's priority."""
    return line.priority if isinstance(line, Line) else Priority.INFO


@functools.cache
def is_journal(fd: int = 2) -> bool:
    """Whether a descriptor is a connection to the journal, by the variable that systemd sets."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def marked(text: str, priority: Priority, fd: int = 2) -> str:
    """Return text for a descriptor: if that is the journal, each line begins with its priority."""
    if priority is Priority.INFO or not is_journal(fd):
        return text
    return "\n".join(f"<{int(priority)}>{line}" for line in text.split("\n"))
