"""What a mirror takes from the training that goes on beside it.

The real mirror copies a checkpoint that was just sealed into a bucket. The bucket is a directory,
so that no server takes its share of the cores. The mirror runs in a process of its own, and sees
the steps, as in the supervisor; ``beside.py`` has the rest.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from beside import Beside, counter, in_turns, tell
from harness import Options, Places, Report, places, read_options
from ranks import run_ranks

from tests.checkpoints import make_checkpoint, open_job


def mirror_when_told(pipe: Connection, directory: str, url: str, steps: Synchronized[int]) -> None:
    """A mirror: for each step number it copies that checkpoint, and answers its CPU seconds."""
    from elastic_ckpt.checkpoint.bucket.object_store import open_store
    from elastic_ckpt.checkpoint.bucket.url import BucketUrl
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.journal.journal import Journal
    from elastic_ckpt.supervisor.saves.mirror import Mirror
    from elastic_ckpt.supervisor.settings import MirrorSettings, RunSettings

    job = JobDirectory(Path(directory))
    settings = RunSettings(
        directory=job.root, script=Path("train.py"), args=(), name="job", node="node",
        mirror=MirrorSettings(url),
    )  # fmt: skip
    mirror = Mirror(
        settings, open_store(BucketUrl.parse(url), make=True), "run", Journal(job, "node"),
        lambda: steps.value, print, lambda: None, lambda: None,
    )  # fmt: skip
    mirror.start()
    while number := pipe.recv():
        used, done = time.process_time(), f"step {number}, sealed"
        while done not in mirror.serve(number):
            time.sleep(0.05)
        pipe.send(time.process_time() - used)
    mirror.close(lambda: 10.0)


def contest(rank: int, options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each block, and of the mirror."""
    from elastic_ckpt.jobdir.paths import JobDirectory

    root = where.disk / "job"

    def prepare(turn: int) -> None:
        data = {f"modeling/{n}": bytes(int(options.megabytes * 2.5e5)) for n in range(4)}
        make_checkpoint(JobDirectory(root), turn, contents=data, durable=True)

    if rank:
        return in_turns(options, None, None, prepare)
    open_job(root)
    done = counter()
    mirror = Beside(mirror_when_told, str(root), f"file://{where.disk}/bucket", done)
    try:
        return in_turns(options, mirror, done, prepare)
    finally:
        mirror.close()


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=500.0)
    with places(options.directory) as where:
        found = run_ranks(contest, where.disk / "log", options, where)[0]
    title = f"Training seconds lost to one copy of {options.megabytes:.0f} MB, 2 ranks"
    report = Report("mirror_cost", title, {"megabytes": options.megabytes})
    tell(report, found, "a mirror's copy").show(options)


if __name__ == "__main__":
    main()
