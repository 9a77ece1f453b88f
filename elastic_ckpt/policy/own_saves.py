"""A script that saves by itself: what it writes, when that is complete, and how to ask it."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.units import parse_duration

NEWEST: Final = "{newest}"
"""Stands for the newest intact checkpoint in the arguments of a resume."""

SETTLE_SECONDS: Final = 1.0
"""How long nothing may have changed once the last file is there: other ranks write theirs, too."""

_NEVER_MARKED: Final = 2
"""So many checkpoints without the last file, and none with it, were not all torn."""

NOT_SEALED: Final = "it was not sealed"
"""How a reason begins why one was set aside that was torn by a kill, and is no damage."""

_QUIET_SECONDS: Final = 20.0
_NUMBER: Final = re.compile(r"\d+")
_COMMAND: Final = "command:"
_SIGNAL: Final = "signal:"
_PLACEHOLDER: Final = re.compile(r"(?<!\$)\{(?!newest\})\w+\}")
_TWO_WORDS: Final = re.compile(r"-[\w-]+\s+\{newest\}$")
_WILD: Final = re.compile(r"[*?\[]")

FileStamps = tuple[tuple[str, int, int, int], ...]
"""Of every file of a checkpoint: its relative path, bytes, time of change in ns, and inode."""


@dataclass(frozen=True)
class CompleteWhen:
    """When a checkpoint is complete while the script runs: when ``marker`` is there, when nothing
    has changed for ``quiet`` seconds, or, with neither, when the script has ended with code 0."""

    marker: str = ""
    quiet: float = 0.0

    @property
    def at_exit(self) -> bool:
        """Whether only the end of the script tells."""
        return not self.marker and not self.quiet

    def of(self, *, is_file: bool) -> CompleteWhen:
        """Return the rule for a file or a directory: no marker can lie in a file."""
        return CompleteWhen(quiet=_QUIET_SECONDS) if self.marker and is_file else self

    def __str__(self) -> str:
        return self.marker or (f"quiet:{self.quiet:g}s" if self.quiet else "exit")


@dataclass(frozen=True)
class OwnSaves:
    """What a run was told about the script's own checkpoints; nothing unless ``watch`` is set.

    Attributes:
        watch: patterns of files and directories, relative to the directory that the run starts in.
        on_notice: ``signal:SIGTERM`` or ``command:./save.sh``, to make the script save.
        resume_args: appended to the script's arguments if there is an intact checkpoint.
        finished_when: a path that exists once the script has done all its work; empty for exit
            code 0 without a notice.
    """

    watch: tuple[str, ...] = ()
    complete: CompleteWhen = field(default_factory=lambda: CompleteWhen(quiet=_QUIET_SECONDS))
    on_notice: str = "signal:SIGTERM"
    resume_args: tuple[str, ...] = ()
    finished_when: str = ""

    def __bool__(self) -> bool:
        return bool(self.watch)

    @property
    def names_newest(self) -> bool:
        """Whether the script is told which checkpoint to load."""
        return any(NEWEST in one for one in self.resume_args)

    def arguments(self, newest: str) -> tuple[str, ...]:
        """Return what to append to the script's arguments; nothing without an intact checkpoint."""
        return tuple(one.replace(NEWEST, newest) for one in self.resume_args) if newest else ()


def own_saves(
    *,
    watch: Iterable[str],
    complete_when: str | None,
    on_notice: str | None,
    resume_args: Iterable[str],
    finished_when: str | None,
) -> OwnSaves:
    """Check the options about the script's own checkpoints.

    Raises:
        UsageError: one is malformed, or has no meaning without ``--watch``.
    """
    patterns = tuple(watch)
    needs = (("--complete-when", complete_when), ("--resume-args", tuple(resume_args)),
             ("--finished-when", finished_when))  # fmt: skip
    if not patterns:
        for option, value in needs:
            if value:
                raise UsageError(f"{option} needs --watch: say which checkpoints the script writes")
    if any(not one or one.endswith("/") or "\0" in one for one in patterns):
        raise UsageError("--watch: give a file or a directory without a slash at its end")
    asks = on_notice or f"{_SIGNAL}SIGTERM"
    signal_of(asks)
    words: list[str] = []
    for text in resume_args:
        try:
            words += shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--resume-args {text!r}: {error}") from None
    if one := next((word for word in words if _TWO_WORDS.match(word)), ""):
        apart = ", ".join(f'"{part}"' for part in one.split())
        raise UsageError(f"--resume-args: {one!r} is one argument; in a job file write [{apart}]")
    if unknown := _PLACEHOLDER.search(" ".join(words)):
        raise UsageError(f"--resume-args: {unknown[0]} is not known; {NEWEST} is the newest path")
    return OwnSaves(
        patterns,
        parse_complete_when(complete_when) if complete_when else CompleteWhen(quiet=_QUIET_SECONDS),
        asks,
        tuple(words),
        finished_when or "",
    )


def parse_complete_when(text: str) -> CompleteWhen:
    """Parse the name of a file, ``quiet:20s`` or ``exit``.

    Raises:
        UsageError: it is none of these.
    """
    if text == "exit":
        return CompleteWhen()
    if text.startswith("quiet:"):
        try:
            seconds = parse_duration(text.removeprefix("quiet:"))
        except UsageError as error:
            raise UsageError(f"--complete-when quiet: {error}") from None
        if seconds < SETTLE_SECONDS:
            raise UsageError("--complete-when quiet: give at least 1s")
        return CompleteWhen(quiet=seconds)
    if text.startswith("/") or ".." in text.split("/") or _WILD.search(text):
        raise UsageError(
            f"--complete-when {text!r}: give the name of a file inside the checkpoint that is "
            "written last, quiet:20s, or exit"
        )
    return CompleteWhen(marker=text)


def signal_of(on_notice: str) -> signal.Signals | None:
    """Return the signal that makes the script save; None for a command.

    Raises:
        UsageError: it is neither a signal that a script can handle nor a command.
    """
    if on_notice.startswith(_COMMAND) and on_notice != _COMMAND:
        return None
    name = on_notice.removeprefix(_SIGNAL).upper()
    name = name if name.startswith("SIG") else f"SIG{name}"
    known = getattr(signal.Signals, name, None) if on_notice.startswith(_SIGNAL) else None
    if known is None or known in (signal.SIGKILL, signal.SIGSTOP):
        raise UsageError(
            f"--on-notice {on_notice!r}: give signal:SIGTERM, another signal that the script "
            "handles, or command:./save.sh"
        )
    return signal.Signals(known)


def command_of(on_notice: str) -> str:
    """Return the shell command that makes the script save; empty for a signal."""
    return on_notice.removeprefix(_COMMAND) if on_notice.startswith(_COMMAND) else ""


def step_of(name: str) -> int:
    """Return the last number in a checkpoint's name, which is its step in most of them; else 0."""
    found = _NUMBER.findall(name)
    return int(found[-1][-18:]) if found else 0


def is_overwritten(pattern: str) -> bool:
    """Return whether a pattern names one path, which the script must overwrite each time."""
    return not _WILD.search(pattern)


@dataclass
class Growth:
    """What is known of one checkpoint that is being written.

    Attributes:
        stamps: of its files, as of the last look.
        since: when they were first seen like this, in monotonic seconds.
        begun: when any of them was first seen, or changed after a seal; monotonic seconds.
    """

    stamps: FileStamps
    since: float
    begun: float


def is_complete(
    rule: CompleteWhen, growth: Growth, now: float, *, is_archive: bool = False
) -> bool:
    """Return whether a checkpoint is complete while the script runs, at monotonic ``now``.

    Args:
        is_archive: it is a file whose end shows that it is complete; it is checked before it is
            sealed, so it need not rest for long, nor at all if the script rewrites it all the time.
    """
    still = now - growth.since
    if rule.marker:
        there = any(path == rule.marker for path, *_ in growth.stamps)
        return there and still >= SETTLE_SECONDS
    if not rule.quiet or not any(size for _, size, *_ in growth.stamps):
        return False
    if is_archive and (still >= SETTLE_SECONDS or now - growth.begun >= rule.quiet):
        return True
    return still >= rule.quiet


def is_being_overwritten(rule: CompleteWhen, sealed: FileStamps, stamps: FileStamps) -> bool:
    """Return whether sealed files were written again, but not yet the one that is written last.
    A rank's file that only comes after it is sealed with the others."""
    if not rule.marker or set(sealed) <= set(stamps):
        return False
    return any(one in stamps for one in sealed if one[0] == rule.marker)


def may_be_complete(
    rule: CompleteWhen,
    stamps: FileStamps,
    *,
    is_archive: bool,
    left_well: bool,
    sealed_at: int = 0,
    rebooted: bool = False,
) -> bool:
    """Return whether what lies there is complete, once no process writes to it any more.

    Only a marker proves that of a directory whose writer was killed; an archive can be checked.
    After a power cut a marker proves nothing: it may be on the disk, and the other files not.

    Args:
        is_archive: it is a file whose end shows that it is complete; if ``rebooted``, one whose
            checksums do.
        left_well: the script ended with code 0, by itself.
        sealed_at: newest time of change of an earlier seal of this path, in ns; 0 without one. Only
            a marker that was written again makes a changed directory another checkpoint.
        rebooted: it was written before this machine's last boot, or on another machine.
    """
    if rebooted and not left_well and (sealed_at or not is_archive):
        return False  # what was written over a sealed one may be older than that
    if rule.marker:
        return any(path == rule.marker and changed > sealed_at for path, _, changed, _ in stamps)
    if not any(size for _, size, *_ in stamps):  # a disk that was full leaves empty files
        return False
    return left_well or (is_archive and not rule.at_exit)


def never_marked(
    rule: CompleteWhen, directories: Sequence[FileStamps], *, ever_sealed: bool
) -> bool:
    """Return whether the last file's name must be wrong: a writer that was killed leaves one
    directory without it, not several and never one with it."""
    if not rule.marker or ever_sealed or len(directories) < _NEVER_MARKED:
        return False
    return not any(path == rule.marker for stamps in directories for path, *_ in stamps)


def why_torn(rule: CompleteWhen, *, was_sealed: bool, rebooted: bool = False) -> str:
    """Return why a checkpoint is set aside that is not as a seal says, and not complete."""
    if was_sealed:
        return "it was changed after it was sealed"
    if rebooted:
        return (
            f"{NOT_SEALED} before the machine went down: the disk may lack parts of it; if you "
            "know that it is intact, move it back"
        )
    what = f"{rule.marker} is missing" if rule.marker else f"not complete by {rule}"
    return f"{NOT_SEALED}: {what}, or it is damaged"
