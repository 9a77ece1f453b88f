"""What retention knows of a job's checkpoints, and remembers from one pass to the next.

A pass after each save would otherwise read every kept checkpoint again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import scan_with_inodes, view
from elastic_ckpt.checkpoint.quarantine import original_name, rejected
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key


@dataclass(frozen=True)
class Retainable:
    """A checkpoint as retention sees it.

    Attributes:
        intact: as in ``CheckpointView``, when it was last looked at.
        attempt, bytes, metrics, automatic: as its manifest says; empty without a valid one.
    """

    path: Path
    step: int
    intact: bool
    attempt: str = ""
    bytes: int = 0
    metrics: Mapping[str, float] | None = None
    automatic: bool = False


def look_at(path: Path) -> Retainable:
    """Read a checkpoint's manifest and compare its files' sizes; never raises for a bad one."""
    found = view(path)
    manifest = found.manifest
    if manifest is None:
        return Retainable(path, found.step, found.intact)
    return Retainable(
        path, found.step, found.intact, manifest.attempt, manifest.total_bytes, manifest.metrics,
        manifest.automatic,
    )  # fmt: skip


class KnownCheckpoints:
    """The intact checkpoints that earlier passes of one process have seen. One thread at a time.

    A directory is known by its name and inode. What is decided upon it has to be confirmed by
    :meth:`still_true`, as a file may have gone since.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], Retainable] = {}
        self._remembered: set[Path] = set()  # not looked at by the last look
        self._aside: frozenset[tuple[str, int]] | None = None
        self._lines: list[list[Path]] = []

    def look(self, job: JobDirectory) -> tuple[list[Retainable], list[list[Retainable]]]:
        """Return the checkpoints, newest first, and the superseded ones by lines: those that were
        superseded together, newest first; the line that was set aside last ends.

        Raises:
            OSError: the storage does not answer.
        """
        entries = scan_with_inodes(job)
        lines = self._superseded_lines(job)
        inodes = dict(self._aside or ())
        every = [*entries, *((path, inodes.get(path.name, 0)) for line in lines for path in line)]
        seen: dict[tuple[str, int], Retainable] = {}
        found: dict[Path, Retainable] = {}
        for path, inode in every:
            key = (str(path), inode)
            one = found[path] = self._seen.get(key) or look_at(path)
            if one.intact and inode:
                seen[key] = one
        self._remembered = {one.path for key, one in seen.items() if key in self._seen}
        self._seen = seen
        return [found[path] for path, _ in entries], [[found[p] for p in line] for line in lines]

    def still_true(self, some: Iterable[Retainable]) -> bool:
        """Look at those of some that the last look remembered; if one is not as it was seen, forget
        all and return False."""
        if all(look_at(one.path) == one for one in some if one.path in self._remembered):
            return True
        self._seen = {}
        return False

    def _superseded_lines(self, job: JobDirectory) -> list[list[Path]]:
        aside: frozenset[tuple[str, int]] = frozenset()
        if job.owns(job.superseded):
            with os.scandir(job.superseded) as entries:
                aside = frozenset((entry.name, entry.inode()) for entry in entries)
        if aside != self._aside:
            self._aside, self._lines = aside, superseded_lines(job) if aside else []
        return self._lines


def superseded_lines(job: JobDirectory) -> list[list[Path]]:
    """Return what was superseded together, newest first; the line that was set aside last ends."""
    lines: dict[str, list[Path]] = {}
    for one in rejected(job, job.superseded):  # in the order of their times
        lines[one.line] = [*lines.pop(one.line, []), Path(one.path)]
    return [
        sorted(line, key=lambda path: checkpoint_key(original_name(path)) or (0, 0), reverse=True)
        for line in lines.values()
    ]
