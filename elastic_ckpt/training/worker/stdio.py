"""Standard output and error that survive the loss of their reader.

A terminal that hung up, or a pipe whose reader exited (``| tee`` and Ctrl-C), must not fail a
training that is about to be saved. Later output is discarded.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A descriptor that discards its output once the reader is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if not self._reader_is_gone(error):
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return super().write(data) or 0

    def _reader_is_gone(self, error: OSError) -> bool:
        regular = stat.S_ISREG(os.fstat(self.fileno()).st_mode)
        return error.errno == errno.EPIPE or (error.errno == errno.EIO and not regular)


def keep_output(directory: str, local_rank: int) -> None:
    """Replace standard output and error by the FIFOs of a directory, if it has them, and
    ``sys.stdout`` and ``sys.stderr``. They flush whole lines: a worker may be killed at any
    moment."""
    for fd, name in ((1, "out"), (2, "err")):
        with contextlib.suppress(OSError):
            fifo = os.open(f"{directory}/{name}-{local_rank}", os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(fifo, True)
            os.dup2(fifo, fd)
            os.close(fifo)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(fd: int, before: Any) -> io.TextIOWrapper:
    encoding = errors = None
    if before is not None:
        before.flush()
        encoding, errors = before.encoding, before.errors
    raw = io.BufferedWriter(_Lasting(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)
