"""On the host: disks after power cuts, each mounted on a loop device and looked at.

``python -m tests.power_cuts.replay PLACE KIND BASE LOG STATES SEED`` prints one line of JSON.
It runs in a mount namespace of its own, so that no mount outlives it; ``PLACE`` is where the disk
was mounted when it was recorded, as the seals of the script's own checkpoints name that path.
"""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.power_cuts.log import Disk, Log
from tests.power_cuts.look import Promises, look

SHOWN = 8


def main(place: str, kind: str, base: str, log: str, states: str, seed: str) -> None:
    """Look at a number of states, in the order of the log."""
    recorded = Log.read(Path(log))
    dice = random.Random(int(seed))
    disk, bad = Disk(recorded, Path(base)), []
    newest: collections.Counter[int] = collections.Counter()
    with memory() as image:
        for number, position in enumerate(positions(recorded, int(states), dice)):
            disk.cut(position, dice if number % 4 else None, image)
            promises = Promises.by(text for at, text in recorded.marks if at <= position)
            newest[max(promises.sealed, default=0)] += 1
            if complaints := mounted_and_seen(image, kind, Path(place), promises):
                what = "nothing lost" if number % 4 == 0 else "unflushed writes lost or torn"
                bad.append([f"cut after entry {position}, {what}", *complaints[:SHOWN]])
    disk.close()
    flushes = sum(one.flush for one in recorded.entries)
    print(json.dumps({
        "states": int(states), "bad": bad, "entries": len(recorded.entries), "flushes": flushes,
        "marks": len(recorded.marks), "reported": dict(sorted(newest.items())),
    }))  # fmt: skip


def positions(log: Log, count: int, dice: random.Random) -> list[int]:
    """Return where to cut: half of them just after a promise, the others anywhere."""
    begin, end = log.position("begin"), log.position("end")
    marks = [at for at, _ in log.marks if begin <= at <= end]
    near = (min(dice.choice(marks) + dice.choice((0, 0, 1, 2, 5)), end) for _ in range(count // 2))
    return sorted([*near, *(dice.randint(begin, end) for _ in range(count - count // 2))])


@contextmanager
def memory() -> Iterator[Path]:
    """Yield a path in memory for the image of a disk."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
        try:
            yield Path(directory) / "disk"
        finally:
            subprocess.run(["umount", directory], check=True)


def mounted_and_seen(image: Path, kind: str, place: Path, promises: Promises) -> list[str]:
    """Mount a disk as after the reboot, and return what is wrong on it."""
    mount = ["mount", "-t", kind, "-o", "loop", str(image), str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return [f"it cannot be mounted: {done.stderr.strip()}"]
    try:
        return list(look(place, promises))
    except OSError as error:
        return [f"the file system is damaged: {error}"]
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
