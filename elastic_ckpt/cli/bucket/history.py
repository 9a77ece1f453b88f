"""``report`` and ``logs`` of a job in a bucket, from what its owners copied there for people.

What is read is not trusted: keys by their form, sizes by a limit, lines as those of any journal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from elastic_ckpt.checkpoint.bucket.keys import HISTORY, HistoryKey
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.store import Bucket, StoredObject
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.cli.bucket.rows import BucketRow, rows_of
from elastic_ckpt.cli.bucket.status import bucket_state
from elastic_ckpt.errors import ElasticCkptError, NoUsableCheckpoint, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import shown_line
from elastic_ckpt.journal.journal import MAX_READ_BYTES

if TYPE_CHECKING:
    from elastic_ckpt.cli.report.material import Material
    from elastic_ckpt.cli.status.view import NewestView

MAX_OBJECT_BYTES: Final = 4 * 1024 * 1024
"""Our own are no larger; others are left out."""

_PAGES: Final = 20
_REQUESTS: Final = 8


def bucket_logs(url: BucketUrl, ranks: Collection[int], *, processes: bool) -> Iterator[str]:
    """Yield the end of what the workers of the newest incarnation printed, with headings.

    Raises:
        UsageError: there is none, or that of our own processes is asked for.
    """
    store = open_store(url)
    every = [found for found in _listing(store) if found[0].kind == "logs"]
    claim = max((key.claim for key, _ in every), default=0)
    mine = [found for found in every if found[0].claim == claim]
    incarnation = max((key.worker[0] for key, _ in mine), default=0)
    mine = [found for found in mine if found[0].worker[0] == incarnation]
    mine = [found for found in mine if not ranks or found[0].worker[1] in ranks]
    if processes or not mine:
        what = "process logs" if processes else "no worker output"
        raise UsageError(
            what
            + (f" of rank {' and '.join(map(str, ranks))}" if ranks and not processes else "")
            + (" are not copied to a bucket" if processes else f" in {url}")
            + ": they are in the directory of the run, on its machine; elastic-ckpt status "
            f"{url} says which"
        )
    mine.sort(key=lambda found: found[0].worker)
    for (key, _), data in zip(mine, _read(store, mine), strict=True):
        yield f"== incarnation {key.worker[0]}, rank {key.worker[1]} (the end of it)"
        for line in (data or b"").removesuffix(b"\n").split(b"\n"):
            yield shown_line(line)


def collect_bucket(url: BucketUrl, collect: Callable[[JobDirectory], Material]) -> Material:
    """Return the input of a report from a bucket.

    Raises:
        NoUsableCheckpoint: it holds neither a history nor a checkpoint.
    """
    store = open_store(url)
    every = _listing(store)
    rows = rows_of(store)
    if not every and not rows:
        raise NoUsableCheckpoint(f"{url} holds no job: correct the URL")
    with tempfile.TemporaryDirectory(prefix="elastic-ckpt-report-") as directory:
        job = JobDirectory(Path(directory) / url.prefix.rpartition("/")[2])
        job.prepare()
        _write_journals(job, store, [found for found in every if found[0].kind == "journal"])
        _write_records(job, store, [found for found in every if found[0].kind == "nodes"])
        found = collect(job)
    checkpoints = [_view(url, row) for row in rows if not row.listed.superseded]
    newest = next((one for one in checkpoints if one.intact), None)
    shown_newest = _newest(newest)
    state, message = _state(store, found)
    status = msgspec.structs.replace(
        found.status, state=state, message=message, commands=(), memory_only=[], rejected=[],
        newest_intact=shown_newest, newest_on_disk=shown_newest, warnings=[],
        advice="" if state in ("finished", "running") else
        f"rerun the same command on any machine; elastic-ckpt pull {url} DIR brings it to one",
    )  # fmt: skip
    return replace(
        found, directory=str(url), status=status, checkpoints=checkpoints[:100],
        older=len(checkpoints[100:]),
    )  # fmt: skip


def _state(store: Bucket, found: Material) -> tuple[str, str]:
    """Return state and message as the bucket has them: the record may be from before the end."""
    state, shown = bucket_state(store)
    known = found.status.state
    if state == "running":
        return ("running" if known in ("dead", "unknown") else known), f"{shown} is running it"
    if state == "silent":
        return "dead", f"{shown} has been silent"
    if known in ("finished", "preempted", "failed"):
        return known, found.status.message
    return "unknown", "how its last run ended was not copied to the bucket"


def _newest(view: CheckpointView | None) -> NewestView | None:
    from elastic_ckpt.cli.status.view import NewestView

    if view is None or view.seal is None:
        return None
    seal = view.seal
    return NewestView(
        view.step, str(view.path), view.tier, seal.total_bytes, view.age_seconds, seal.reason,
        view.verified,
    )  # fmt: skip


def _listing(store: Bucket) -> list[tuple[HistoryKey, StoredObject]]:
    found = (
        (HistoryKey.parse(one.key), one)
        for page in islice(store.listing(HISTORY), _PAGES)
        for one in page
    )
    return [(key, one) for key, one in found if key and one.bytes <= MAX_OBJECT_BYTES]


def _read(
    store: Bucket, found: Iterable[tuple[HistoryKey, StoredObject]]
) -> Iterator[bytes | None]:
    """Yield the bytes of each; None for what cannot be read any more."""

    def get(one: tuple[HistoryKey, StoredObject]) -> bytes | None:
        try:
            return store.get(one[1].key, MAX_OBJECT_BYTES)
        except (OSError, ElasticCkptError):
            return None

    with ThreadPoolExecutor(_REQUESTS, "history") as pool:
        yield from pool.map(get, found)


def _write_journals(
    job: JobDirectory, store: Bucket, found: list[tuple[HistoryKey, StoredObject]]
) -> None:
    """Write the journal of each node, that of the first owner first. A machine that has run the
    job twice has copied its early lines twice: each line counts once."""
    budget = MAX_READ_BYTES
    chosen: list[tuple[HistoryKey, StoredObject]] = []
    for one in sorted(found, key=lambda one: one[0].claim, reverse=True):
        budget -= one[1].bytes
        if budget >= 0:
            chosen.insert(0, one)
    seen: set[int] = set()
    for (key, _), data in zip(chosen, _read(store, chosen), strict=True):
        with open(job.journal(key.name), "ab") as file:
            for line in (data or b"").splitlines(keepends=True):
                if (digest := hash(line)) not in seen:
                    seen.add(digest)
                    file.write(line)


def _write_records(
    job: JobDirectory, store: Bucket, found: list[tuple[HistoryKey, StoredObject]]
) -> None:
    newest = max((key.claim for key, _ in found), default=0)
    mine = [one for one in found if one[0].claim == newest]
    for (key, _), data in zip(mine, _read(store, mine), strict=True):
        job.node_record(key.name).write_bytes(data or b"")


def _view(url: BucketUrl, row: BucketRow) -> CheckpointView:
    seal = row.listed.seal
    return CheckpointView(
        Path(f"{url}/{seal.name}"), seal.epoch, seal.step, row.manifest, row.age_seconds,
        not row.why, row.verified, row.why, tier="bucket", session=seal.session,
    )  # fmt: skip
