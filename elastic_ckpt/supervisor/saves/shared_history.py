"""What each of several nodes copies to the bucket that they share, for people: the ranks save."""

from __future__ import annotations

from collections.abc import Callable

from elastic_ckpt.supervisor.saves.history_copy import HistoryCopy
from elastic_ckpt.supervisor.saves.mirror_port import NoMirror


class SharedHistory(NoMirror):
    """See ``MirrorPort``: this node's journal and logs, and no checkpoint.

    Args:
        owner: returns the number of the claim that the job's head has made; 0 if it is not known.
        ping: is called at least every second while :meth:`close_history` waits.
    """

    def __init__(
        self, history: HistoryCopy, url: str, owner: Callable[[], int], ping: Callable[[], None]
    ) -> None:
        self._history = history
        self._url = url
        self._owner = owner
        self._ping = ping

    def serve(self, newest: object) -> str:
        """Copy them from time to time, and say where the checkpoints are."""
        del newest
        if owner := self._owner():
            self._history.offer(owner)
        return f"{self._url}: the ranks save there"

    def close_history(self, left: Callable[[], float]) -> None:
        """Copy them a last time."""
        self._history.close(left, self._ping)
