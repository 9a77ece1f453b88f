"""What the supervisor knows of the copies in a bucket; ``mirror.py`` makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol


def forever() -> float:
    """Return the seconds until a deadline that nobody has set."""
    return math.inf


class MirrorPort(Protocol):
    """The copies in a bucket. Nothing here waits for the store, but for ``close``.

    With ``--mirror`` the directory is the job's place, and whatever happens to the copies, the run
    goes on. With ``--dir URL`` the bucket is: what it lacks is not saved.
    """

    @property
    def lost(self) -> str:
        """Who has taken the job over in its bucket; empty while this run owns it, and always if
        the bucket has only copies."""

    def start(self) -> None:
        """Start its thread; once."""

    def serve(self, newest: object) -> str:
        """Take in what is on the disk; return one line for ``status``, empty without a mirror.

        Args:
            newest: differs from the last call's once something else is the newest there.
        """

    def hurry(self, left: Callable[[], float] = forever) -> None:
        """Spare neither training nor the network from now on: the node goes away.

        Args:
            left: seconds until it does; asked by another thread.
        """

    def flush(self) -> None:
        """Begin to bring what the disk has now to a bucket that is the job's place; ``flushed``
        tells when that is done."""

    @property
    def flushed(self) -> bool:
        """Whether that is done, or has taken too long."""

    @property
    def lacks(self) -> str:
        """What is missing in a bucket that is the job's place, as the end of a line; empty if
        nothing is."""

    def close(self, left: Callable[[], float]) -> None:
        """Copy the newest checkpoint; give up when ``left`` returns no seconds."""

    def close_history(self, left: Callable[[], float]) -> None:
        """Copy for people how the run has ended, once that is written; give up likewise."""


class NoMirror:
    """The mirror of a run that has none."""

    lost = lacks = ""
    flushed = True

    def start(self) -> None:
        """Do nothing."""

    def serve(self, newest: object) -> str:
        """Return nothing to show."""
        del newest
        return ""

    def hurry(self, left: Callable[[], float] = forever) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self, left: Callable[[], float]) -> None:
        """Do nothing."""

    def close_history(self, left: Callable[[], float]) -> None:
        """Do nothing."""
