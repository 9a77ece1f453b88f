"""The bounded wait of a rank in an exchange, which names the ranks that are missing."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from elastic_ckpt.training.ranks.peers import Peers

log = logging.getLogger(__name__)

MEETING_SECONDS: Final = 10.0
WORKING_SECONDS: Final = 60.0
"""After how long a wait names the missing ranks: if they only had to arrive, or have work to do."""


LONGEST_LOOK_SECONDS: Final = 8.0
"""A wait looks up after one second, two, four, and from then on this often."""


class Wait:
    """The wait of one exchange: looks up, names the missing ranks, and ends at the limit."""

    def __init__(
        self, peers: Peers, key: str, name: str, patience: float, extra: float = 0.0
    ) -> None:
        self._peers = peers
        self.key = key
        self.name = name
        self._patience = patience
        self._began = time.monotonic()
        self._ends = self._began + peers.limit_seconds + extra
        self._pause = 1.0
        self._next_look = self._began + self._pause

    def shorten(self, seconds: float) -> None:
        """End within these seconds from now."""
        self._ends = min(self._ends, time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return time.monotonic() >= self._ends

    @property
    def pause(self) -> float:
        """Seconds until :meth:`look` has something to do, or the wait is over."""
        return max(0.0, min(self._next_look, self._ends) - time.monotonic())

    def look(self) -> bool:
        """Name the missing ranks if it is time to; whether it was time for a look.

        Raises:
            UnequalSteps: a rank met the leader in another exchange.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._peers.check_diverged()
        waited = now - self._began
        if waited >= self._patience:
            self._report(waited)
        self._pause = min(2 * self._pause, LONGEST_LOOK_SECONDS)
        name_in = max(0.0, self._began + self._patience - now)
        self._next_look = now + min(self._pause, name_in)
        return True

    def _report(self, waited: float) -> None:
        self._patience = 2 * max(waited, self._patience)
        ranks = self._peers.missing(self.key)
        if not ranks:
            return
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        line = (
            f"rank {self._peers.rank} has waited {waited:.0f} s for rank{'s'[: len(ranks) - 1]} "
            f"{shown} at {self.name!r}"
        )
        log.warning(line)
        with suppress(OSError):
            print(f"elastic-ckpt: {line}", file=sys.stderr, flush=True)
