"""What lies where the script writes its checkpoints."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from elastic_ckpt.checkpoint.archive import check_archive
from elastic_ckpt.policy.own_saves import FileStamps, is_overwritten, step_of
from elastic_ckpt.util.files import files_below


@dataclass(frozen=True)
class Found:
    """A file or directory that a pattern matches.

    Attributes:
        path: absolute; never a link.
        overwritten: the pattern names this path alone, so the script overwrites it each time.
    """

    path: Path
    overwritten: bool

    @property
    def is_file(self) -> bool:
        """Whether it is no directory."""
        return not self.path.is_dir()


def find(patterns: Iterable[str], base: Path) -> Iterator[Found]:
    """Yield what the patterns match below ``base``, each path once; links only where a pattern
    names one, as what they lead to."""
    seen: set[Path] = set()
    for pattern in patterns:
        overwritten = is_overwritten(pattern)
        place = base / Path(pattern).expanduser()
        names = [str(place)] if overwritten else sorted(glob.glob(_below(base, pattern)))
        for name in names:
            if os.path.islink(name) and not overwritten:
                continue
            path = Path(os.path.realpath(name) if os.path.islink(name) else name)
            if path not in seen and path.exists():
                seen.add(path)
                yield Found(path, overwritten)


def matches(patterns: Iterable[str], base: Path, path: Path) -> bool:
    """Return whether :func:`find` can yield a path: a seal may name any."""
    for pattern in patterns:
        place = base / Path(pattern).expanduser()
        if is_overwritten(pattern) and path in (place, Path(os.path.realpath(place))):
            return True
        parts = zip(path.parts, place.parts, strict=False)
        if len(path.parts) == len(place.parts) and all(fnmatchcase(*both) for both in parts):
            return ".." not in path.parts
    return False


def _below(base: Path, pattern: str) -> str:
    """Return a pattern for absolute paths; wild characters in ``base`` stand for themselves."""
    expanded = Path(pattern).expanduser()
    return str(expanded) if expanded.is_absolute() else f"{glob.escape(str(base))}/{expanded}"


def stamps_of(path: Path) -> FileStamps:
    """Return the stamps of all regular files below a path, or of the file itself; nothing if it
    has vanished. OSError if a directory cannot be read."""
    try:
        if not path.is_dir():
            return _stamp(path, path.name)
        return tuple(one for name in files_below(path) for one in _stamp(path / name, name))
    except FileNotFoundError:  # the script deletes it meanwhile
        return ()


def changed_at(stamps: FileStamps) -> int:
    """Return the newest time of change, in ns since the epoch."""
    return max((changed for _, _, changed, _ in stamps), default=0)


def oldest_first(every: Iterable[Found]) -> list[tuple[Found, FileStamps]]:
    """Return files and directories with their stamps, in the order in which they were written;
    by their step if that was at the same moment. OSError as :func:`stamps_of`."""
    stamped = [(found, stamps_of(found.path)) for found in every]
    return sorted(stamped, key=lambda one: (changed_at(one[1]), step_of(one[0].path.name)))


def check_archives(found: Found, stamps: FileStamps) -> None:
    """Check the ends of files that show by themselves whether they are complete.

    Raises:
        CheckpointRejected: one is torn.
        OSError: one cannot be read.
    """
    root = found.path.parent if found.is_file else found.path
    for name, *_ in stamps:
        check_archive(root, name)


def _stamp(path: Path, name: str) -> FileStamps:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ()
    if not stat.S_ISREG(found.st_mode):
        return ()
    return ((name, found.st_size, found.st_mtime_ns, found.st_ino),)


def glance(path: Path, marker: str) -> tuple[tuple[int, int, int], ...]:
    """Return what changes when a file is rewritten, a directory's names change, or the file in it
    that is written last, if it is known; cheap."""
    return tuple(_look_at(one) for one in ((path, path / marker) if marker else (path,)))


def _look_at(path: Path) -> tuple[int, int, int]:
    try:
        found = os.lstat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_size, found.st_mtime_ns, found.st_ino)
