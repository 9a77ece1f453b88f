"""Notice sources: the ways to learn that this node will go away.

A source reports what it learns; only the supervisor decides what follows. :class:`NoticeSource`
is the contract, ``CONTRIBUTING.md`` has an example that a test runs. A package adds a source with
an entry point in the group ``elastic_ckpt.notices``, and a user selects it by name:
``elastic-ckpt run --notice-source NAME``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from elastic_ckpt.policy.deadline import (
    EarlyWarning,
    Notice,
    Reload,
    SourceStatus,
    StopNow,
    TimeLimit,
)

SourceEvent = Notice | EarlyWarning | TimeLimit | SourceStatus | StopNow | Reload
Report = Callable[[SourceEvent], None]


class NoticeSource(ABC):
    """One way to learn of a preemption. Most sources derive from ``polling.PollingSource``.

    The supervisor calls the methods from its main loop, so each must return at once.

    Attributes:
        name: the source in the notices, the journal and messages.
    """

    name: str

    @abstractmethod
    def start(self, report: Report) -> None:
        """Start to listen, and return. Called once.

        Args:
            report: may be called from any thread.
        """

    @property
    def settled(self) -> bool:
        """Whether a notice that was pending at the start has been reported by now."""
        return True

    def poll_now(self) -> None:  # noqa: B027 -- most have nothing to add
        """Look at once: a signal arrived, and this source may know its deadline."""

    def acknowledge(self) -> None:  # noqa: B027 -- most services expect no answer
        """Tell the platform that the job is sealed and need not be waited for. Never raises."""

    def stop(self) -> None:  # noqa: B027 -- a thread may end with the process
        """Stop listening. Called once."""
