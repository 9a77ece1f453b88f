"""Sources of notices: who may say that this node will go away.

A source only ever tells; the supervisor alone decides what follows. To add one, write a class
that derives from :class:`NoticeSource` (one that asks a service derives from
:class:`~elastic_ckpt.notices.polling.PollingSource` and says what it asks), and list it in
``platforms.py``. Nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from elastic_ckpt.policy.deadline import EarlyWarning, Notice, SourceStatus, TimeLimit

SourceEvent = Notice | EarlyWarning | TimeLimit | SourceStatus
Report = Callable[[SourceEvent], None]


class NoticeSource(ABC):
    """One way to learn of a preemption.

    Attributes:
        name: what its notices call it.
    """

    name: str

    @abstractmethod
    def start(self, report: Report) -> None:
        """Begin to listen, and return; ``report`` may be called from any thread."""

    @property
    def settled(self) -> bool:
        """Whether a notice that was pending when it started would have been told by now."""
        return True

    def poll_now(self) -> None:  # noqa: B027 -- most have nothing to add
        """Another source gave a notice: look now, this one may know the deadline."""

    def acknowledge(self) -> None:  # noqa: B027 -- most services want no answer
        """The job is sealed and the node may go; bounded, and no failure matters."""

    def stop(self) -> None:  # noqa: B027 -- a thread may end with the process
        """Stop listening; called once."""
