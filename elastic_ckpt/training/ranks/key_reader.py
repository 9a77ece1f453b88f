"""Reads keys of the job's store that are not set yet, without polling it.

The store's own blocking call cannot be interrupted, holds up every other call of its connection,
and prints a warning when its time is over. So a thread makes it, on a connection of its own; the
caller waits for the thread, and can look up from time to time, or be interrupted by a signal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final

BLOCK: Final = timedelta(days=30)
"""Maximum time of a call of the store: the caller gives up earlier, and leaves the thread to it."""


class KeyRead:
    """The values of some keys, once all of them are set."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        self._done = threading.Event()
        self._values: list[bytes] = []
        self._error: RuntimeError | None = None

    @property
    def done(self) -> bool:
        """Whether :meth:`values` returns at once."""
        return self._done.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait up to this long; whether it is done."""
        return self._done.wait(max(0.0, seconds))

    def values(self) -> list[bytes]:
        """Return the values in the keys' order, once done; RuntimeError if the store has failed."""
        if self._error is not None:
            raise self._error
        return self._values

    def run(self, read: Callable[[list[str]], list[bytes]]) -> None:
        """Read, in the reader's thread."""
        try:
            self._values = read(self.keys)
        except RuntimeError as error:
            self._error = error
        self._done.set()


class KeyReader:
    """Reads for one thread, one set of keys at a time."""

    def __init__(self, shared: Any, connect: Callable[[], Any]) -> None:
        """``connect`` returns a connection of the reader's own, made at first use; None if the
        ``shared`` store can be used by two threads at once."""
        self._shared = shared
        self._connect = connect
        self._store: Any = None
        self._readings: SimpleQueue[KeyRead] | None = None
        self._newest: KeyRead | None = None

    def read(self, keys: list[str]) -> KeyRead:
        """Begin to read; the same reading again if the newest one is of these keys. One that is not
        done is left to its thread, which a new one replaces.

        Raises:
            LeaderLost: no connection.
        """
        newest = self._newest
        if newest is not None and not newest.done:
            if newest.keys == keys:
                return newest
            self._store = self._readings = None
        if self._readings is None:
            self._begin()
        assert self._readings is not None
        self._newest = reading = KeyRead(keys)
        self._readings.put(reading)
        return reading

    def idle_connection(self) -> Any:
        """Return the reader's own connection while it reads nothing; None if it has none of its
        own. LeaderLost if the store does not answer."""
        if self._store is None:
            self._store = self._connect()
        return self._store

    def _begin(self) -> None:
        store, shared = self.idle_connection(), self._shared
        readings: SimpleQueue[KeyRead] = SimpleQueue()
        self._readings = readings
        if store is not None:
            store.set_timeout(BLOCK)

        def read(keys: list[str]) -> list[bytes]:
            if store is None:
                shared.wait(keys, BLOCK)
            return [bytes(value) for value in (store or shared).multi_get(keys)]

        def run() -> None:
            while True:
                readings.get().run(read)

        threading.Thread(target=run, name="key-reader", daemon=True).start()
