"""Signals to the supervisor as notices.

The handlers only append to a deque and, through the wake-up descriptor, end the supervisor's
wait. SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are notices; SIGHUP is one if a terminal hung up, and
requests a reload otherwise. A second SIGINT within three seconds stops immediately.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from types import FrameType
from typing import Final

from elastic_ckpt.notices import NoticeSource, Report
from elastic_ckpt.policy.deadline import Notice, Reload, StopNow

SECOND_INTERRUPT_SECONDS: Final = 3.0
INTERACTIVE_GRACE_SECONDS: Final = 300.0
"""Ctrl-C comes from a person: no platform is about to kill the job."""

_NOTICES: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


_early: deque[tuple[int, float]] = deque()


def hold_signals() -> None:
    """Hold SIGTERM and the like until a source starts: one would end the starting process or, as
    PID 1, be lost. Ctrl-C still ends it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _hold)


def _hold(number: int, frame: FrameType | None) -> None:
    _early.append((number, time.monotonic()))


def is_held() -> bool:
    """Return whether a signal has come that waits for a source."""
    return bool(_early)


class SignalSource(NoticeSource):
    """Turns signals into notices; must be started in the main thread."""

    name = "signal"

    def __init__(self, grace: float, *, is_guess: bool = False) -> None:
        """
        Args:
            grace: seconds from a signal to the end of the node.
            is_guess: another source knows the real deadline once it has polled.
        """
        self._grace = grace
        self._is_guess = is_guess
        self._report: Report = lambda event: None
        self._arrived: deque[tuple[int, float]] = deque()
        self._last_interrupt = float("-inf")
        self._handled: list[int] = []
        self._terminal = False

    def start(self, report: Report) -> None:
        self._report = report
        # Checked now: after a hang-up there is no terminal any more.
        self._terminal = _has_terminal()
        for number in (*_NOTICES, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the user wants a hang-up to change nothing
            signal.signal(number, self._arrive)
            self._handled.append(number)
        while _early:
            self._arrived.append(_early.popleft())

    def stop(self) -> None:
        """Ignore further signals: a repeat must not change the exit code."""
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)

    def hold(self) -> None:
        """Keep further signals, and those not delivered, for the next source of this process."""
        for number in self._handled:
            if number != signal.SIGHUP:
                signal.signal(number, _hold)
        _early.extend(self._arrived)

    @property
    def pending(self) -> bool:
        """Whether a signal has arrived that was not delivered."""
        return bool(self._arrived)

    def deliver(self) -> None:
        """Report the signals that arrived; called in the supervisor's loop."""
        while self._arrived:
            number, at = self._arrived.popleft()
            if number == signal.SIGHUP and not self._terminal:
                self._report(Reload())
                continue
            if number == signal.SIGINT:
                if at - self._last_interrupt < SECOND_INTERRUPT_SECONDS:
                    self._report(StopNow())
                self._last_interrupt = at
            self._report(self._notice(number, at))

    def _notice(self, number: int, at: float) -> Notice:
        grace = self._grace
        if number == signal.SIGINT:
            grace = max(grace, INTERACTIVE_GRACE_SECONDS)
        name = signal.Signals(number).name
        return Notice(self.name, name, at + grace, is_guess=self._is_guess)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, time.monotonic()))


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
