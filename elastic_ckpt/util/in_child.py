"""Runs work that may hang (a dead file server, name server or driver) in a child, bounded."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final, NoReturn

import msgspec

from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.util.units import human_duration

PATIENCE_SECONDS: Final = 2.0
"""Time for a child to clean up after the parent has stopped listening."""

KILL_SECONDS: Final = 2.0
"""Time for a killed child to end; one that is stuck in the kernel does not."""

_IDLE_SECONDS: Final = 1.0

_ANSWER, _ERROR, _END = b"+", b"!", b"."

Work = Callable[[], Generator[Any, None, None]]
"""Called in the child only; the parent receives what it yields."""

Idle = Callable[[float], None]
"""Called in the parent while it waits."""


class NoAnswer(Exception):
    """The work did not answer in time, or its process died; the text says which."""


class WorkFailed(Exception):
    """The work failed; the text says why."""


def answers(
    work: Work, kind: Any, seconds: float, idle: Idle | None = None
) -> contextlib.closing[Generator[Any, None, None]]:
    """Run ``work`` in a fork of this process and yield its answers as they arrive.

    If the block is left early, the child's next answer fails, and ``work`` ends as any generator
    ends, with its ``finally``. A child that does not answer is killed; one that is stuck in the
    kernel is left behind.

    Args:
        kind: the type of the answers, which JSON must be able to hold.
        seconds: time for all of them.
        idle: called about once in each second without an answer, with the seconds since the start.

    Raises:
        NoAnswer: in the block: no answer in time, or the child died.
        WorkFailed: in the block: the work raised an error, whose text this one has.
    """
    return contextlib.closing(_answers(work, kind, seconds, idle))


def answer(work: Work, kind: Any, seconds: float, idle: Idle | None = None) -> Any:
    """Return the only answer of ``work``; as :func:`answers`."""
    with answers(work, kind, seconds, idle) as found:
        return next(found)


def _answers(
    work: Work, kind: Any, seconds: float, idle: Idle | None
) -> Generator[Any, None, None]:
    limit = time.monotonic() + seconds
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _serve(work, writing)
    os.close(writing)
    try:
        for line in _lines(reading, limit, seconds, idle):
            if line.startswith(_END):
                return
            if line.startswith(_ERROR):
                raise WorkFailed(line[1:].decode())
            yield msgspec.json.decode(line[1:], type=kind)
        raise NoAnswer("ended without an answer")
    finally:
        os.close(reading)
        _end(child)


def _lines(fd: int, limit: float, seconds: float, idle: Idle | None) -> Iterator[bytes]:
    """Yield whole lines until the other end is closed."""
    began = time.monotonic()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    rest = b""
    while True:
        left = max(0.0, limit - time.monotonic())
        if not poll.poll(min(left, _IDLE_SECONDS if idle else left) * 1000):
            if time.monotonic() >= limit:
                raise NoAnswer(f"did not answer within {human_duration(seconds)}")
            if idle is not None:
                idle(time.monotonic() - began)
            continue
        data = os.read(fd, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _serve(work: Work, writing: int) -> NoReturn:
    """Run the work in the child; never returns into the code that forked it."""
    try:
        os.setsid()  # Ctrl-C is for the parent, whose end the child notices
        _close_others(writing)
        with contextlib.closing(work()) as found:
            for one in found:
                _write(writing, _ANSWER + msgspec.json.encode(one))
        _write(writing, _END)
    except BrokenPipeError:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            _write(writing, _ERROR + _text(error).encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _close_others(kept: int) -> None:
    """Close inherited files: a stuck child must not keep a lock, or the end of a pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _text(error: BaseException) -> str:
    """Return an error in one line; of an unexpected one its type, too."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, (OSError, ElasticCkptError))
    return " ".join((str(error) if known else repr(error)).split())


def _write(fd: int, line: bytes) -> None:
    rest = line + b"\n"
    while rest:
        rest = rest[os.write(fd, rest) :]


def _end(child: int) -> None:
    """Wait for a child's end, bounded, and kill it if need be."""
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        return  # our parent ignored SIGCHLD, so the kernel has already reaped the child
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(PATIENCE_SECONDS * 1000):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        if poll.poll(KILL_SECONDS * 1000):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
    finally:
        os.close(pidfd)
