"""One node of ``bucket_nodes.py``: says that it is ready, waits for one line, does its part, and
prints a line of JSON: when it began and ended by the wall clock, and its memory.

    bucket_node.py ours|alone|plain up|down ROOT PREFIX RANK MEGABYTES

``ours`` goes through :class:`BucketTier`, as a rank does; ``alone`` is obstore with the same files,
parts and requests at a time; ``plain`` is obstore as it is by default. Rank 0 of ``ours up`` leads.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import obstore

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bucket import LARGE_FILES, THREADS, get_alone

from elastic_ckpt.checkpoint.bucket.attempt import BucketAttempt, BucketPart
from elastic_ckpt.checkpoint.bucket.object_store import (
    AHEAD_PARTS,
    CHUNK_BYTES,
    PARTS,
    UPLOADS,
    BucketStore,
    open_store,
)
from elastic_ckpt.checkpoint.bucket.ownership import claim_after, new_owner, newest_claim
from elastic_ckpt.checkpoint.bucket.tier import BucketTier, LocalRank
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.disk import side_by_side
from elastic_ckpt.checkpoint.disk.tier import DiskAttempt
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched
from tests import s3
from tests.checkpoints import make_header, open_job

NODES = 2
STEP = 8
ATTEMPT = "0123456789abcdef"
PATIENCE_SECONDS = 600.0


def memory(name: str) -> int:
    """Return a line of this process's status, in bytes: ``VmRSS``, or its peak ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {name}")


def write(directory: Path, rank: int, megabytes: float) -> list[Path]:
    """Write a rank's share of a checkpoint: some large files and some small ones."""
    each = int(megabytes * 1e6 / NODES / LARGE_FILES)
    block = secrets.token_bytes(2**20)
    sizes = {f"modeling/{rank}-{number}": each for number in range(LARGE_FILES)}
    sizes |= {f"optimizer/{rank}-small-{number}": 2000 for number in range(8)}
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            while size:
                size -= file.write(block[:size])
    return [directory / name for name in sizes]


def put_alone(store: BucketStore, root: Path, files: list[Path], *, same: bool) -> None:
    """Upload a rank's files by obstore alone."""
    more = {"chunk_size": CHUNK_BYTES, "max_concurrency": UPLOADS} if same else {}
    ours_at_once = min(side_by_side._THREADS, PARTS // (UPLOADS + AHEAD_PARTS))
    with ThreadPoolExecutor(ours_at_once if same else THREADS) as pool:
        keys = [f"alone/{path.relative_to(root)}" for path in files]
        list(
            pool.map(
                lambda pair: obstore.put(store.plain, *pair, **more), zip(keys, files, strict=True)
            )
        )


def save(attempt: BucketAttempt, job: JobDirectory, part: BucketPart, root: Path) -> None:
    """Upload a rank's files; the leader then waits for the other's, and seals."""
    header = make_header(DiskAttempt(job, ATTEMPT, STEP))
    header = msgspec.structs.replace(header, world_size=NODES)
    files = part.finish(NODES, header)
    mine = root.parent / f"files-{part.rank}"
    mine.with_suffix(".new").write_bytes(msgspec.json.encode(files))
    mine.with_suffix(".new").rename(mine)
    if part.rank:
        return
    others = root.parent / "files-1"
    limit = time.monotonic() + PATIENCE_SECONDS
    while not others.exists():
        if time.monotonic() > limit:
            raise SystemExit("the other node did not upload its files")
        time.sleep(0.002)
    files += msgspec.json.decode(others.read_bytes(), type=list[FileEntry])
    attempt.seal(header, files, Retention())


def ours(way: str, root: Path, store: BucketStore, rank: int, size: float) -> Callable[[], object]:
    """Prepare a rank of ours; return what is measured."""
    job = open_job(root)
    claim = (
        claim_after(store, newest_claim(store), new_owner("bench", "node"))
        if rank == 0 and way == "up"
        else None
    )
    tier = BucketTier(store, job, lambda: claim or _no_claim(), LocalRank(0, 1, NODES))
    if way == "down":
        [seal] = [one.key for page in store.listing("seals/") for one in page]
        return lambda: tier.open(Ref("bucket", seal, "")).verify(rank, NODES, unwatched)
    ref = Ref("bucket", f"1.{STEP}", ATTEMPT)
    attempt = tier.begin(STEP, int(size * 1e6), ATTEMPT) if rank == 0 else tier.join(ref)
    part = attempt.part(rank)
    for path in write(attempt.path, rank, size):
        part.claim(str(path.relative_to(attempt.path)))
    return lambda: save(attempt, job, part, root)


def _no_claim() -> None:
    raise SystemExit("only the leader has a claim")


def main() -> None:
    """Do one node's part."""
    who, way, place, prefix, number, megabytes = sys.argv[1:]
    root, rank, size = Path(place), int(number), float(megabytes)
    store = open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/{prefix}"))
    assert isinstance(store, BucketStore)
    if who == "ours":
        act = ours(way, root, store, rank, size)
    elif way == "up":
        files = write(root, rank, size)
        act = lambda: put_alone(store, root, files, same=who == "alone")  # noqa: E731
    else:
        act = lambda: get_alone(store, root, "alone")  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    act()
    ended = time.time()
    peak = memory("VmHWM") - before
    print(json.dumps({"began": began, "ended": ended, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
