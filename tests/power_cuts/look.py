"""What must hold of the job directory on a disk after a power cut.

Functions return complaints instead of raising, so that one test can name every bad state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.cleanup import recover, take_over
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.own.seal import OwnSeal, copies_of, seals, verify
from elastic_ckpt.checkpoint.ownership.fence import Ownership, new_record, newest_number
from elastic_ckpt.checkpoint.quarantine import original_name, rejected
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import ignore
from tests.power_cuts.scene import (
    OVERWRITTEN,
    RANKS,
    STEPS,
    archive,
    contents,
    keeper,
    script_contents,
)


@dataclass
class Promises:
    """What the job had been told by the moment of the cut.

    Attributes:
        sealed: steps that were reported sealed, and that nothing may have removed.
        damaged: steps whose bytes were damaged on purpose.
        aside: steps that were reported set aside.
        own: numbers of the seals of the script's own checkpoints, and their steps, likewise.
        newest_own: the largest step of a script's checkpoint that was reported sealed.
    """

    sealed: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    aside: set[int] = field(default_factory=set)
    own: dict[int, int] = field(default_factory=dict)
    own_going: set[int] = field(default_factory=set)
    newest_own: int = 0

    @classmethod
    def by(cls, marks: Iterable[str]) -> Promises:
        """Return what these marks have promised."""
        made = cls()
        for mark in marks:
            what, _, rest = mark.partition(":")
            number, _, step = rest.partition(":")
            if what == "sealed":
                made.sealed.add(int(number))
            elif what == "going":
                made.sealed.discard(int(number))
            elif what == "damaging":
                made.sealed.discard(int(number))
                made.damaged.add(int(number))
            elif what == "aside":
                made.aside.add(int(number))
            elif what == "own-sealed":
                made.own[int(number)] = int(step)
                made.newest_own = max(made.newest_own, int(step))
            elif what == "own-going":
                made.own.pop(int(number), None)
                made.own_going.add(int(number))
        return made


def look(place: Path, promises: Promises) -> Iterator[str]:
    """Yield what is wrong on a mounted disk, before and after the clean-up of a start."""
    if not (place / "job").is_dir():
        if promises.sealed or promises.own:
            yield "the job directory is gone"
        return
    job = JobDirectory.at(place / "job")
    yield from (f"before the clean-up: {one}" for one in _store(job, promises))
    yield from (f"before the clean-up: {one}" for one in _own_seals(job, promises))
    number = newest_number(job) + 1
    job.prepare()
    run = Ownership.claim(job, number, new_record(job, "host", "after", "", None))
    take_over(job, run)
    for path, what in recover(job, fence=run):
        if what.startswith("left"):
            yield f"the clean-up left {path.name}: {what}"
    own = keeper(job, place, number)
    newest = own.prepare(lambda: False)
    yield from (f"after the clean-up: {one}" for one in _store(job, promises))
    yield from (f"after the clean-up: {one}" for one in _own_seals(job, promises))
    yield from _what_a_start_loads(job, place, promises, newest)


def _what_a_start_loads(
    job: JobDirectory, place: Path, promises: Promises, newest_own: str
) -> Iterator[str]:
    """Yield what is wrong with what a run and a script can find by now."""
    wanted = max(promises.sealed, default=0)
    found = DiskTier(job).newest()
    if (found.key[1] if found else 0) < wanted:
        yield f"a start would load {found.key if found else None}, reported was step {wanted}"
    step = int(Path(newest_own).name.partition("-")[2] or "0") if newest_own else 0
    if Path(newest_own).name != OVERWRITTEN and step < promises.newest_own:
        yield f"the script would load {newest_own}, reported was step {promises.newest_own}"
    if left := [path.name for path in job.attempts.iterdir()]:
        yield f"attempts are left: {left}"
    for path in place.glob("out/step-*"):
        yield from _script_directory(path)
    last = place / OVERWRITTEN
    if last.exists() and last.read_bytes() not in {archive(one) for one in STEPS}:
        yield f"{OVERWRITTEN} is torn, and the script would load it"


def _store(job: JobDirectory, promises: Promises) -> Iterator[str]:
    there = set()
    for path in scan(job):
        step = int(path.name.rpartition("-")[2])
        if step in promises.damaged:
            continue
        there.add(step)
        try:
            verify_full(path)
        except (CheckpointError, OSError) as error:
            yield f"{path.name} stands there: {error}"
            continue
        for rank in range(RANKS):
            for name, data in contents(step, rank).items():
                if (path / name).read_bytes() != data:
                    yield f"{path.name}/{name} is not what was saved"
    if gone := promises.sealed - there:
        yield f"reported sealed and gone: {sorted(gone)}"
    aside = {original_name(Path(one.path)) for one in rejected(job) if one.reason}
    for step in promises.aside:
        if f"epoch-0_step-{step}" not in aside:
            yield f"step {step} was set aside and is not in quarantine with its reason"


def _own_seals(job: JobDirectory, promises: Promises) -> Iterator[str]:
    there = {one.number: one for one in seals(job)}
    for number, one in there.items():
        if number in promises.own_going:
            continue
        if why := _why_lost(job, one):
            yield f"the script's {one.path}, seal {number}, is not intact: {why}"
    if gone := set(promises.own) - there.keys():
        yield f"the script's, reported sealed and gone: {sorted(gone)}"


def _why_lost(job: JobDirectory, one: OwnSeal) -> str:
    """Return why a sealed checkpoint is neither in its place nor in its copy; empty if it is."""
    why = ""
    for root in [None, copies_of(job, one.number)][: 1 + one.copied]:
        try:
            verify(one, ignore, root)
        except (CheckpointError, OSError) as error:
            why = str(error)
        else:
            return ""
    return why


def _script_directory(path: Path) -> Iterator[str]:
    wanted = script_contents(int(path.name.partition("-")[2]))
    for name, data in wanted.items():
        try:
            found = (path / name).read_bytes()
        except OSError as error:
            yield f"the script would load {path.name}, where {name} is missing: {error}"
            continue
        if found != data:
            yield f"the script would load {path.name}, where {name} is torn"
