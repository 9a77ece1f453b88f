"""A watcher in each rank for jobs without a supervisor: a SIGTERM to any rank is a notice.

It runs the same agreement as a supervisor, with each rank as a node of its own. A thread, which
does not depend on the rank's progress, sets the flag on the rank's private board, reads
``entered``, posts it in the job's store, and answers with the maximum over all ranks.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from types import FrameType
from typing import Any, Final

from elastic_ckpt.errors import LeaderLost
from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind, answer_step
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.training.ranks.job_store import private_store
from elastic_ckpt.training.ranks.key_reader import KeyReader
from elastic_ckpt.training.ranks.peers import Peers

POLL_SECONDS: Final = 0.05
FENCE_SECONDS: Final = 0.001
ANSWER_SECONDS: Final = 20.0
END_SECONDS: Final = 5.0

_REQUEST: Final = 1


class SoloWatcher:
    """Watches for a SIGTERM to this process or its peers; one per process."""

    def __init__(self, board: Board, peers: Peers) -> None:
        self._board = board
        self._peers = peers
        self._noticed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notice-watch", daemon=True)

    def start(self) -> None:
        """Install the handler, in the main thread only, and start to watch."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._notice)
        self._thread.start()
        # A thread inside the store at interpreter exit aborts the process with SIGABRT.
        atexit.register(self._end)

    def _end(self) -> None:
        self._ended.set()
        self._thread.join(END_SECONDS)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def _run(self) -> None:
        store = self._connect()
        while not self._noticed:
            try:
                if store is not None and store.check(["stop/wanted"]):
                    break
            except Exception:  # the rank that hosts the store has exited
                store = None
            if self._ended.wait(POLL_SECONDS):
                return
        self._board.raise_flag(_REQUEST)
        time.sleep(FENCE_SECONDS)
        entered = self._board.entered()
        if store is not None:
            try:
                store.set("stop/wanted", b"1")
                entered = self._exchange(store, entered[0])
            except Exception:  # the store is gone, and so are the other ranks
                self._board.abort(_REQUEST)
                return
        self._board.post_answer(RequestAnswer(_REQUEST, RequestKind.STOP, answer_step(entered)))

    def _connect(self) -> Any:
        try:
            return private_store() if self._peers.world_size > 1 else None
        except LeaderLost:
            return None

    def _exchange(self, store: Any, entered: int) -> list[int]:
        store.set(f"stop/entered/{self._peers.rank}", str(entered))
        keys = [f"stop/entered/{rank}" for rank in range(self._peers.world_size)]
        reading = KeyReader(store, lambda: None).read(keys)
        limit = time.monotonic() + ANSWER_SECONDS
        while not reading.wait(POLL_SECONDS):
            if self._ended.is_set() or time.monotonic() > limit:
                raise TimeoutError("a rank did not post the step that it entered")
        return [int(value) for value in reading.values()]
