"""What in the nodes' memory outlives the loss of any one of them, from a job's journal."""

from __future__ import annotations

from elastic_ckpt.journal.events import JournalEvent, Saved, WorkersLaunched
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.node_events import ReplicaFailed, Replicated


class PeerCopies:
    """Folds the entries of all nodes, in order of time.

    Attributes:
        newest: (epoch, step) of the newest save of this incarnation of which each node has copied
            what another one holds; None without one.
        count, bytes: of all copies.
        failures, error: the number of copies that failed, and why the last one did.
    """

    def __init__(self) -> None:
        self._begin(0)
        self.count = self.bytes = self.failures = 0
        self.error = ""

    def _begin(self, nodes: int) -> None:
        """Begin with the pairs of another incarnation."""
        self.newest: tuple[int, int] | None = None
        self._nodes = nodes
        self._epochs: dict[int, int] = {}  # by step, of the saves into memory
        self._done: dict[int, set[str]] = {}  # by step, the nodes that have their copies
        self._failed: set[int] = set()

    def observe(self, entry: JournalEntry) -> None:
        """Take the next entry into account."""
        event: JournalEvent = entry.event
        match event:
            case WorkersLaunched(nodes=nodes) if not event.follows:
                self._begin(nodes or 0)
            case Saved(step=step, epoch=epoch, tier="memory"):
                self._epochs[step] = epoch
                self._look(step)
            case Replicated(step=int(step), bytes=size):
                self.count += 1
                self.bytes += size
                self._done.setdefault(step, set()).add(entry.node)
                self._look(step)
            case ReplicaFailed(step=int(step), error=error):
                self.failures, self.error = self.failures + 1, error
                self._failed.add(step)

    def _look(self, step: int) -> None:
        epoch, done = self._epochs.get(step), self._done.get(step, set())
        if epoch is None or step in self._failed or not 1 < self._nodes <= len(done):
            return
        self.newest = max(self.newest or (epoch, step), (epoch, step))
