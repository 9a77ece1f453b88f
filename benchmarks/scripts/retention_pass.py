"""One retention pass in a process that has made one before: its wall times and processor time.

    python retention_pass.py DIR COUNT

``DIR`` has COUNT checkpoints, of which the rule keeps COUNT: after a first pass one is added, so
that the second, which counts, deletes one.
"""

import shutil
import sys
import time
from pathlib import Path

import msgspec

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.manifest import (
    EngineInfo,
    FileEntry,
    SealHeader,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.prune import Retainer
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.retention import Retention

CONTENTS = b"state" * 20


def fresh_job(root: Path) -> JobDirectory:
    """An empty job directory."""
    job = JobDirectory.at(root)
    job.prepare()
    return job


def fill(job: JobDirectory, first: int, last: int) -> None:
    """Sealed checkpoints of these steps with the files of two ranks; later ones are copies."""
    for step in range(first, last + 1):
        model = next(iter(job.root.glob("epoch-*")), None)
        if model is None:
            seal_one(job, step)
        else:
            copy_one(job, model, step)


def seal_one(job: JobDirectory, step: int) -> None:
    """One as a job of two ranks seals it."""
    attempt = DiskAttempt.begin(job, step)
    header = SealHeader(
        job="benchmark", attempt=attempt.identity, incarnation=1, created="", reason="interval",
        epoch=0, step=step, step_in_epoch=step, sample_start_index=step, samples_per_step=1,
        order_seed=0, dataset_fingerprint="", dataset_size=0, world_size=2,
        data_parallel_size=2, engine=EngineInfo("torch"), torch="",
    )  # fmt: skip
    files: list[FileEntry] = []
    for rank in range(2):
        part = attempt.part(rank)
        for kind in ("modeling", "optimizer", "ranks"):
            part.write(f"{kind}/{rank:05d}.safetensors", CONTENTS)
            part.write(f"{kind}/{rank:05d}.json", CONTENTS)
        files += part.finish(2, header if rank == 0 else None)
    attempt.publish(header, files)


def copy_one(job: JobDirectory, model: Path, step: int) -> None:
    """A copy of a checkpoint as that of another step; not durable, as thousands take minutes."""
    place = job.root / ".attempts" / "copy"
    shutil.copytree(model, place)
    old = read_manifest(model)
    named = {"step": step, "attempt": f"{step:016x}"}
    header = SealHeader(**{f: getattr(old, f) for f in SealHeader.__struct_fields__} | named)
    (place / MANIFEST_NAME).write_bytes(encode(make_manifest(header, old.files)))
    place.rename(job.checkpoint(0, step))


def main() -> None:
    """Print the figures as JSON."""
    job, count = JobDirectory.at(sys.argv[1]), int(sys.argv[2])
    retainer = Retainer(job, Journal(job, "benchmark"), lambda line: print(line, file=sys.stderr))
    retainer.rule = Retention(last=count)
    newest = max(int(path.name.rpartition("-")[2]) for path in job.root.glob("epoch-*"))
    for step in (newest + 1, newest + 2):
        fill(job, step, step)
        began = time.time(), time.process_time()
        retainer.after_save()
        retainer.finish(lambda: False)
        ended = time.time(), time.process_time()
    left = len(list(job.root.glob("epoch-*")))
    if left != count:
        raise SystemExit(f"{left} checkpoints are left of {count}")
    spent = {"wall": [began[0], ended[0]], "cpu_seconds": ended[1] - began[1]}
    sys.stdout.buffer.write(msgspec.json.encode(spent) + b"\n")


if __name__ == "__main__":
    main()
