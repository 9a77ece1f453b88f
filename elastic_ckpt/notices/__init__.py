"""Sources of notices: who may say that this node will go away.

A source only ever enqueues; the supervisor alone decides what follows from a notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from elastic_ckpt.core.deadline import Notice

Enqueue = Callable[[Notice], None]


class NoticeSource(Protocol):
    """One way to learn of a preemption."""

    name: str

    def start(self, enqueue: Enqueue) -> None:
        """Begin to listen; call ``enqueue`` for each notice, from any thread."""

    def stop(self) -> None:
        """Stop listening; called once."""
