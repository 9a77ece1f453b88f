"""Protection of workers from signals.

Notices reach workers through the board. A SIGTERM to a worker comes from SLURM, which signals every
process of a step, or from torch elastic, which signals on a membership change. Neither may kill the
worker before the save, so the handlers never affect the training.
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
    """Make notice signals do nothing in this process; unlike SIG_IGN, an exec resets that."""
    for number in _NOTICES:
        signal.signal(number, _nothing)


def set_terminate_hook(handler: Handler) -> None:
    """Set what a SIGTERM does in this worker's main process, until the script sets a handler. A
    forked child dies of it as usual, as ``Process.terminate`` sends one."""
    signal.signal(signal.SIGTERM, handler)
    masks = threading.local()

    def hold() -> None:
        # Python would lose a signal between the fork and the child's first line.
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def release_child() -> None:
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_child)


def shield_data_loaders() -> None:
    """Let only the worker's own SIGTERM end its DataLoader children.

    Torch gives each child a handler that ends it on any SIGTERM, which fails the batch. The
    replaced functions are private to torch; ``tests/integration/test_signals.py`` fails if they
    move.
    """
    loader: Any = importlib.import_module("torch.utils.data.dataloader")
    iterator = loader._MultiProcessingDataLoaderIter
    start = iterator.__init__

    def started(*args: Any, **kwargs: Any) -> None:
        # The children inherit the mask: until they listen, a SIGTERM stays pending.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            start(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    iterator.__init__ = started
    signal_handling: Any = importlib.import_module("torch.utils.data._utils.signal_handling")
    original = signal_handling._set_worker_signal_handlers

    def shielded(*args: Any) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        original(*args)
        threading.Thread(target=_obey_parent_alone, name="sigterm", daemon=True).start()

    signal_handling._set_worker_signal_handlers = shielded


def _obey_parent_alone() -> None:
    """End this DataLoader child on its parent's SIGTERM, and ignore any other."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)


def _nothing(number: int, frame: FrameType | None) -> None:
    return
