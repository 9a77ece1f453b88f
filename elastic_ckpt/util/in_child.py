"""What may never answer (a dead file server, a name server, a driver): done in a child, bounded."""

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
"""Time for a child to put away what it made, once nobody listens to it any more."""

KILL_SECONDS: Final = 2.0
"""Until one that was killed is gone, if it can be killed."""

_ANSWER, _ERROR, _END = b"+", b"!", b"."

Work = Callable[[], Generator[Any, None, None]]
"""Called in the child alone; what it yields is heard in the parent."""


class NoAnswer(Exception):
    """There was no answer in time, or its process died; the text says which."""


class WorkFailed(Exception):
    """It could not be done; the text says why."""


def answers(
    work: Work, kind: Any, seconds: float
) -> contextlib.closing[Generator[Any, None, None]]:
    """What ``work`` yields, as it comes, from a fork of this process.

    Leave the block early and the child hears of it at its next answer: it ends ``work`` as any
    generator ends, with its ``finally``. One that does not hear is killed. What is stuck in the
    kernel cannot even be killed; nobody waits for it.

    Args:
        kind: the type of its answers, which JSON must hold.
        seconds: for all of them.

    Raises:
        NoAnswer: as it says; of the block, not of this call.
        WorkFailed: the work ended with an error; its text is in this one's.
    """
    return contextlib.closing(_answers(work, kind, seconds))


def answer(work: Work, kind: Any, seconds: float) -> Any:
    """The one thing that ``work`` yields; raises as :func:`answers`."""
    with answers(work, kind, seconds) as found:
        return next(found)


def _answers(work: Work, kind: Any, seconds: float) -> Generator[Any, None, None]:
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
        for line in _lines(reading, limit, seconds):
            if line.startswith(_END):
                return
            if line.startswith(_ERROR):
                raise WorkFailed(line[1:].decode())
            yield msgspec.json.decode(line[1:], type=kind)
        raise NoAnswer("ended without a word")
    finally:
        os.close(reading)
        _end(child)


def _lines(fd: int, limit: float, seconds: float) -> Iterator[bytes]:
    """Whole lines, until the other end is closed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    rest = b""
    while True:
        if not poll.poll(max(0.0, limit - time.monotonic()) * 1000):
            raise NoAnswer(f"did not answer within {human_duration(seconds)}")
        data = os.read(fd, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _serve(work: Work, writing: int) -> NoReturn:
    """The child: never returns into the code that forked it."""
    try:
        os.setsid()  # Ctrl-C is for the parent; the child ends as nobody listens any more
        _let_go(writing)
        with contextlib.closing(work()) as found:
            for one in found:
                _tell(writing, _ANSWER + msgspec.json.encode(one))
        _tell(writing, _END)
    except BrokenPipeError:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            _tell(writing, _ERROR + _text(error).encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _let_go(kept: int) -> None:
    """Close what was open: a child that is stuck must not keep a lock, or the end of a pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _text(error: BaseException) -> str:
    """In one line; one that nobody foresaw says what it is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, (OSError, ElasticCkptError))
    return " ".join((str(error) if known else repr(error)).split())


def _tell(fd: int, line: bytes) -> None:
    rest = line + b"\n"
    while rest:
        rest = rest[os.write(fd, rest) :]


def _end(child: int) -> None:
    """See a child off, bounded."""
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        return  # whoever started us ignores SIGCHLD, and the kernel has reaped it
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
