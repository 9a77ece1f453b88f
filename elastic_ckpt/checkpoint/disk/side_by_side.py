"""Work on several files of a checkpoint at the same time: a core each, as far as there are any."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from elastic_ckpt.checkpoint.disk.hashed_file import LARGE_BYTES
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.progress import Advance, ignore

_THREADS: Final = min(4, os.cpu_count() or 1)
"""Files that are read at the same time; more would only take turns."""

_File = TypeVar("_File")
_Result = TypeVar("_Result")


def side_by_side(
    work: Callable[[_File, Advance], _Result],
    files: Sequence[_File],
    total_bytes: int,
    advance: Advance = ignore,
) -> list[_Result]:
    """Return what ``work`` returns for each file, in their order; raises what one of them raised,
    and the others stop at their next call of ``advance``.

    Args:
        work: takes a file and ``advance``.
        total_bytes: of all files; a thread must be worth its while.
        advance: is called by one thread at a time; may raise.
    """
    threads = min(_THREADS, len(files), total_bytes // LARGE_BYTES)
    if threads < 2:
        return [work(file, advance) for file in files]
    shared = _OneAtATime(advance)
    with ThreadPoolExecutor(threads, "files") as pool:
        found = [pool.submit(work, file, shared) for file in files]
        try:
            return [one.result() for one in found]
        except BaseException:
            shared.stopped = True
            pool.shutdown(cancel_futures=True)
            raise


class _OneAtATime:
    """Lets several threads share one ``advance``, one at a time; stops all of them."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self.stopped = False

    def __call__(self, count: int) -> None:
        with self._lock:
            if self.stopped:
                raise CheckpointRejected("another of its files failed verification")
            self._advance(count)
