"""Record a job on real file systems, cut the power, and look at what each disk holds.

``python -m tests.power_cuts ROOM SEED KIND OPTIONS FSYNC STATES STEPS [KIND ...]`` prints one line
of JSON per :class:`~tests.power_cuts.Case`. Start it with :func:`tests.power_cuts.outcomes`: in a
mount namespace of its own, so that nothing stays.
"""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from tests import uml
from tests.power_cuts import Case, Outcome
from tests.power_cuts.guest import TOOK
from tests.power_cuts.log import Disk, Log
from tests.power_cuts.look import Promises, look

DISK_BYTES: Final = 320 * 1024 * 1024
LOG_BYTES: Final = 400 * 1024 * 1024  # as much as is written, far below
GUEST_SECONDS: Final = 300.0
TOOL_SECONDS: Final = 60.0
SHOWN: Final = 6
_MODULES: Final = ("drivers/md/dm-mod", "drivers/md/dm-log-writes")
_MKFS: Final = {
    "ext4": ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}


def main(directory: str, seed: str, *arguments: str) -> None:
    """Record all cases in one guest, then look at each one's states."""
    cases = [Case.of(arguments[at : at + 5]) for at in range(0, len(arguments), 5)]
    run("mount", "-t", "tmpfs", "tmpfs", directory)  # it ends with the mount namespace
    room = Path(directory)
    places = [record_place(room, number, case) for number, case in enumerate(cases)]
    boot(room, cases, places)
    for case, place in zip(cases, places, strict=True):
        outcome = looked_at(case, place, room / "image", int(seed))
        print(msgspec.json.encode(outcome).decode(), flush=True)


def record_place(room: Path, number: int, case: Case) -> Path:
    """Make a disk with a file system, a copy of it, and room for its log."""
    place = room / f"{number}-{case.kind}"
    place.mkdir()
    for path, size in ((disk_of(place), DISK_BYTES), (log_of(place), LOG_BYTES)):
        path.touch()
        os.truncate(path, size)
    run(*_MKFS[case.kind], str(disk_of(place)))
    run("cp", "--sparse=always", str(disk_of(place)), str(base_of(place)))
    return place


def disk_of(place: Path) -> Path:
    return place.with_suffix(".disk")


def log_of(place: Path) -> Path:
    return place.with_suffix(".log")


def base_of(place: Path) -> Path:
    return place.with_suffix(".base")


def boot(room: Path, cases: list[Case], places: list[Path]) -> None:
    """Run the job once for each case, in one guest."""
    disks, arguments = [], []
    for case, place in zip(cases, places, strict=True):
        names = [f"/dev/ubd{chr(ord('a') + len(disks) + at)}" for at in range(2)]
        disks += [disk_of(place), log_of(place)]
        arguments += [str(place), *names, case.kind, case.options, case.fsync, str(case.steps)]
    command = uml.python("tests.power_cuts.guest", *arguments)
    console = uml.run(room, command, disks=disks, modules=_MODULES, seconds=GUEST_SECONDS)
    took = [line for line in console.splitlines() if line.startswith(TOOK)]
    print(*took, sep="\n", file=sys.stderr)


def looked_at(case: Case, place: Path, image: Path, seed: int) -> Outcome:
    """Look at a number of states, in the order of the log."""
    log = Log.read(log_of(place))
    dice = random.Random(seed)
    outcome = Outcome(case.name, case.states, len(log.entries), log.flushes)
    reported: collections.Counter[int] = collections.Counter()
    disk = Disk(log, base_of(place))
    try:
        for number, position in enumerate(positions(log, case.states, dice)):
            disk.cut(position, dice if number % 4 else None, image)
            promises = Promises.by(text for at, text in log.marks if at <= position)
            reported[max(promises.sealed, default=0)] += 1
            if complaints := mounted_and_seen(image, case.kind, place, promises):
                what = "unflushed writes lost or torn" if number % 4 else "nothing lost"
                cut = f"{case.name}, cut after entry {position}, {what}"
                outcome.bad.append("\n    ".join([cut, *complaints[:SHOWN]]))
    finally:
        disk.close()
    outcome.reported = {str(step): count for step, count in sorted(reported.items())}
    return outcome


def positions(log: Log, count: int, dice: random.Random) -> list[int]:
    """Return where to cut: half of them just after a mark, the others anywhere."""
    begin, end = log.position("begin"), log.position("end")
    marks = [at for at, _ in log.marks if begin <= at <= end]
    near = [dice.choice(marks) + dice.choice((0, 0, 1, 2, 5)) for _ in range(count // 2)]
    anywhere = [dice.randint(begin, end) for _ in range(count - len(near))]
    return sorted(min(at, end) for at in near + anywhere)


def mounted_and_seen(image: Path, kind: str, place: Path, promises: Promises) -> list[str]:
    """Mount a disk as after the reboot, and return what is wrong on it."""
    mount = ["mount", "-t", kind, "-o", "loop", str(image), str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=TOOL_SECONDS)
    if done.returncode:
        return [f"it cannot be mounted: {done.stderr.strip()}"]
    try:
        return list(look(place, promises))
    except OSError as error:
        return [f"the file system is damaged: {error}"]
    finally:
        run("umount", str(place))


def run(*command: str) -> None:
    """Run a tool; what it prints goes to standard error."""
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=TOOL_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
