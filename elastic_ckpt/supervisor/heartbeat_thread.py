"""Writes a heartbeat while the supervisor's loop goes round; in a thread, as storage may hang."""

from __future__ import annotations

import contextlib
import threading
import time

from elastic_ckpt.jobdir.heartbeat import (
    BEAT_SECONDS,
    Heartbeat,
    renew_heartbeat,
    write_heartbeat,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board


class HeartbeatThread:
    """The heartbeat of one node."""

    def __init__(self, job: JobDirectory, node: str, board: Board) -> None:
        self._job = job
        self._node = node
        self._board = board
        self._turned = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start beating."""
        self._turned.set()
        self._thread.start()

    def turn(self) -> None:
        """Note that the loop has gone round; without this there is no next beat."""
        self._turned.set()

    def stop(self) -> None:
        """Stop beating; does not wait for storage that hangs."""
        self._over.set()

    def _beat(self) -> None:
        write = write_heartbeat
        while not self._over.is_set():
            self._turned.wait(BEAT_SECONDS)
            if self._turned.is_set():
                self._turned.clear()
                with contextlib.suppress(OSError):  # the next one may get there
                    write(self._job, self._node, self._now())
                    write = renew_heartbeat
            self._over.wait(BEAT_SECONDS)

    def _now(self) -> Heartbeat:
        slots = [slot for slot in self._board.read_slots() if slot.attached]
        last = min(slots, key=lambda slot: slot.finished, default=None)
        if last is None:
            return Heartbeat(time.time())
        return Heartbeat(time.time(), last.epoch, last.shown_step, last.sample_start_index)
