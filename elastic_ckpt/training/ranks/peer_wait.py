"""The bounded wait of a rank in an exchange, which names the ranks that are missing."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from elastic_ckpt.errors import SaveFailed
    from elastic_ckpt.training.ranks.peers import Peers

log = logging.getLogger(__name__)

MEETING_SECONDS: Final = 10.0
WORKING_SECONDS: Final = 60.0
"""After how long a wait names the missing ranks: if they only had to arrive, or have work to do."""


class Wait:
    """The wait of one exchange: polls, names the missing ranks, and ends at the limit."""

    def __init__(
        self, peers: Peers, key: str, name: str, patience: float, extra: float = 0.0
    ) -> None:
        self._peers = peers
        self.key = key
        self.name = name
        self._patience = patience
        self._began = time.monotonic()
        self._ends = self._began + peers.limit_seconds + extra
        self._next_look = self._began + 1.0

    def shorten(self, seconds: float) -> None:
        """End within these seconds from now."""
        self._ends = min(self._ends, time.monotonic() + seconds)

    def poll(self, late: SaveFailed) -> None:
        """Pause until the next look at the store; raise ``late`` at the limit."""
        now = time.monotonic()
        if now > self._ends:
            raise late
        if now > self._next_look:
            self._next_look = now + 1.0
            self._peers.check_diverged()
            if now - self._began > self._patience:
                self._report(now - self._began)
        time.sleep(self._peers.pause_seconds)

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
