"""What the storage of a directory does, and how fast: tried in a child that may be given up."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.directory import Place
from elastic_ckpt.cli.doctor.findings import Finding, State, ok
from elastic_ckpt.cli.doctor.platform import Grace
from elastic_ckpt.cli.doctor.storage_trial import (
    CHUNK_BYTES,
    PREFIX,
    Begun,
    Making,
    Skew,
    TrialEvent,
    Tried,
    Writing,
    Wrote,
    try_storage,
)
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.policy.prediction import FIRST_MARGIN, Predictor, Route, RouteModel
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer, answers
from elastic_ckpt.util.units import human_bytes, human_duration

MOST_BYTES: Final = 256 * 1024 * 1024
MOST_SHARE: Final = 4
"""Of what is free, this part is written at the most."""

MOST_SECONDS: Final = 5.0
TRIAL_SECONDS: Final = 20.0
"""For all of it, the writing included."""

_REMOVAL_SECONDS: Final = 5.0
_SKEW_SECONDS: Final = 5.0
_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

_ELSEWHERE: Final = "give a directory on another file system"
_FOLLOWS: Final[Mapping[str, tuple[State, str]]] = {
    "fsync": ("problem", f"{_ELSEWHERE}: no save would succeed, or be there after a power cut"),
    "rename": ("problem", f"{_ELSEWHERE}: a checkpoint is sealed by a rename"),
    "O_EXCL": ("problem", f"{_ELSEWHERE}: two attempts would write to one file"),
    "O_NOFOLLOW": ("problem", f"{_ELSEWHERE}: a link in it would lead a save elsewhere"),
    "locks": ("problem", f"{_ELSEWHERE}, or mend its locks: two runs would write to one job"),
    "modes": ("warning", "let only those mount it who may read the checkpoints"),
    "writing": ("problem", "see what is wrong with the storage: no save would succeed"),
}  # fmt: skip
"""What a trial that fails is, and what to do."""

_WORKS: Final = {
    "fsync": "of a file and of a directory",
    "rename": "of a file over another one, and of a directory",
    "O_EXCL": "a name that is taken is refused",
    "O_NOFOLLOW": "a link is refused",
    "locks": "hold between two processes",
    "modes": "files for their owner alone",
}


def check_storage(place: Place, grace: Grace, say: Callable[[str], None]) -> Iterator[Finding]:
    """Each trial, how fast it writes, and whether a save fits into the grace.

    Args:
        say: is told how far it is.
    """
    wrote: Wrote | None = None
    where, doing = "", "writing"
    try:
        with answers(lambda: _trial(place), TrialEvent, TRIAL_SECONDS) as words:
            for word in words:
                if isinstance(word, Making):
                    where = word.path
                elif isinstance(word, Begun):
                    doing = word.what
                elif isinstance(word, Tried):
                    yield _tried(word)
                elif isinstance(word, Skew):
                    yield _clock(word)
                elif isinstance(word, Wrote):
                    wrote = word
                else:
                    say(_progress(word))
        where = ""  # the trial has put everything away
    except WorkFailed as error:
        text = f"{place.tried} cannot be written: {error}"
        yield Finding("writing", "problem", text, "run as its owner, or choose another directory")
    except NoAnswer as error:
        todo = f"see whether the storage is up: a save would wait, too; {where} may be left there"
        yield Finding(doing, "problem", str(error), todo)
    finally:
        if where:
            _remove(Path(where))
    yield from _speed(place, wrote)
    yield from _fit(place, grace, wrote)


def _trial(place: Place) -> Generator[TrialEvent, None, None]:
    return try_storage(
        Path(place.tried), min(MOST_BYTES, place.free_bytes // MOST_SHARE), MOST_SECONDS
    )


def _remove(directory: Path) -> None:
    """What a trial that was killed has left; a storage that is dead keeps it."""

    def remove() -> Generator[bool, None, None]:
        if directory.name.startswith(PREFIX):
            remove_tree(directory)
        yield True

    with contextlib.suppress(NoAnswer, WorkFailed):
        answer(remove, bool, _REMOVAL_SECONDS)


def _progress(word: Writing) -> str:
    return f"writing {human_bytes(word.bytes)} of {human_bytes(word.most_bytes)} ..."


def _tried(word: Tried) -> Finding:
    if not word.why:
        return ok(word.what, _WORKS[word.what])
    if word.what == "locks" and word.errno in _NO_LOCKS:
        todo = (
            "mount it with locks (Lustre: flock; NFS: without nolock); without them marker files "
            "stand in, and retention deletes nothing"
        )
        return Finding(word.what, "warning", f"there are none: {word.why}", todo)
    state, todo = _FOLLOWS[word.what]
    return Finding(word.what, state, word.why, todo)


def _clock(word: Skew) -> Finding:
    seconds = word.seconds
    if abs(seconds) <= _SKEW_SECONDS:
        return ok("file times", "agree with this clock", seconds, "seconds")
    ahead = "ahead of" if seconds > 0 else "behind"
    text = f"the storage's clock is {human_duration(abs(seconds))} {ahead} this one"
    todo = "set both by one source (NTP); ages in list and status are off by as much"
    return Finding("file times", "warning", text, todo, seconds, "seconds")


def _speed(place: Place, wrote: Wrote | None) -> Iterator[Finding]:
    if place.free_bytes // MOST_SHARE < CHUNK_BYTES:
        text = f"not measured: {human_bytes(place.free_bytes)} free is too little"
        yield Finding("write speed", "warning", text, "make room on that disk")
    if wrote is not None:
        rate = wrote.bytes / wrote.seconds
        yield ok(
            "write speed",
            f"{human_bytes(rate)}/s, by one writer, with fsync ({human_bytes(wrote.bytes)} in "
            f"{human_duration(wrote.seconds)})",
            rate,
            "bytes/s",
        )


def _fit(place: Place, grace: Grace, wrote: Wrote | None) -> Iterator[Finding]:
    """Whether a save fits into the grace, with the margin that a first prediction has."""
    seconds, source = place.saved_seconds, "by the job's own saves"
    if wrote is not None:
        pace = RouteModel(wrote.seconds / wrote.bytes, wrote.least_seconds)
        if seconds is None:
            predictor = Predictor({Route.DISK: pace})
            outlook = Outlook(grace.seconds, 0.0, place.state_bytes)
            seconds, source = save_seconds(predictor, outlook), "at this speed"
        if not place.state_bytes:
            most = grace.seconds / (FIRST_MARGIN * pace.seconds_per_byte)
            text = (
                f"up to {human_bytes(most)} fit into the grace of {human_duration(grace.seconds)}"
                f" at this speed, with a margin of {FIRST_MARGIN}"
            )
            yield ok("emergency save", text, most, "bytes")
    if place.state_bytes and seconds is not None:
        yield _verdict(place, grace, seconds, source)


def _verdict(place: Place, grace: Grace, seconds: float, source: str) -> Finding:
    text = (
        f"of {human_bytes(place.state_bytes)} takes up to {human_duration(seconds)} {source}, and "
        f"the grace is {human_duration(grace.seconds)}"
    )
    if seconds <= grace.seconds:
        return ok("emergency save", text, seconds, "seconds")
    todo = (
        "give --grace if there is more, or take a faster storage; else a notice finds only what "
        "the last save on the interval brought to the disk: save more often (--save-interval)"
    )
    return Finding("emergency save", "problem", text, todo, seconds, "seconds")
