"""Signals in workers.

Notices travel on the board. A SIGTERM that reaches a worker comes from SLURM, which signals every
process of a step, or from torch elastic, which signals on a membership change; neither may kill
the worker before the save. Handlers here never act on the training.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

Handler = Callable[[int, FrameType | None], Any]

_NOTICES: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


def ignore_notices() -> None:
    """Have notices do nothing here; unlike SIG_IGN this does not last through an exec."""
    for number in _NOTICES:
        signal.signal(number, _nothing)


def set_terminate_hook(handler: Handler) -> None:
    """What a SIGTERM does in this worker's main process."""
    signal.signal(signal.SIGTERM, handler)


def shield_data_loaders() -> None:
    """Keep a SIGTERM that is not the worker's own from killing its DataLoader children.

    Torch gives each child a handler that lets such a signal kill it, which fails the batch. The
    hook is private to torch; ``tests/integration/test_signals.py`` fails if it moves.
    """
    signal_handling: Any = importlib.import_module("torch.utils.data._utils.signal_handling")
    original = signal_handling._set_worker_signal_handlers

    def shielded(*args: Any) -> None:
        # Blocked first: from here on until the thread listens, a SIGTERM waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        original(*args)
        threading.Thread(target=_obey_parent_alone, name="sigterm", daemon=True).start()

    signal_handling._set_worker_signal_handlers = shielded


def _obey_parent_alone() -> None:
    """In a DataLoader child: end on the parent's SIGTERM, ignore everybody else's."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)


def _nothing(number: int, frame: FrameType | None) -> None:
    return
